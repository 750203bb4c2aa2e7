// Attention that is causal by blocks of positions: a query sees the new tokens of its own block as well.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "kernels/attention.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::Head;
using testing::isa_levels;
using testing::normals;
using testing::random_head;

// Softmax over the first `visible` slots of one head, in double.
std::vector<double> exact(const Head& head, const float* q, int d, int64_t visible, double scale) {
  std::vector<double> p(static_cast<size_t>(visible)), out(static_cast<size_t>(d));
  double max = -1e300, sum = 0;
  for (int64_t s = 0; s < visible; ++s) {
    double dot = 0;
    for (int c = 0; c < d; ++c) dot += head.k[static_cast<size_t>(s * d + c)] * q[c];
    p[static_cast<size_t>(s)] = dot * scale;
    max = std::max(max, dot * scale);
  }
  for (double& x : p) sum += x = std::exp(x - max);
  for (int64_t s = 0; s < visible; ++s)
    for (int c = 0; c < d; ++c)
      out[static_cast<size_t>(c)] += p[static_cast<size_t>(s)] / sum * head.v[static_cast<size_t>(s * d + c)];
  return out;
}

TEST(BlockAttention, MatchesDouble) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    EXPECT_TRUE(rc::check([] {
      KvLayout layout;
      layout.dtype = *rc::gen::element(DType::kF32, DType::kBF16, DType::kI8);
      layout.page_slots = *rc::gen::element(4, 32);
      // Now and then more rows than one item of work takes (384), with narrow heads: the oracle is slow.
      const bool many = *rc::gen::inRange(0, 8) == 0;
      layout.head_dim = many ? 12 : *rc::gen::element(12, 16, 64, 128);
      const int heads = *rc::gen::inRange(1, 4), d = layout.head_dim;
      const auto tokens = many ? *rc::gen::inRange<int64_t>(380, 420) : *rc::gen::inRange<int64_t>(1, 40);
      const auto old = *rc::gen::element<int64_t>(0, 3, 16, 250);
      const int64_t block = *rc::gen::element<int64_t>(2, 4, 16, 17, 1000);
      // The cache ends where the new tokens begin, inside a block or between two.
      const int64_t first = old;
      std::vector<Head> kv;
      std::vector<KvHeadView> views;
      for (int h = 0; h < heads; ++h) kv.push_back(random_head(layout, old, tokens, first, 100 * static_cast<uint32_t>(h)));
      for (const Head& h : kv) views.push_back(h.view());
      const auto q = normals(static_cast<size_t>(tokens * heads * d), 7);
      std::vector<float> out(q.size()), again(q.size());
      AttentionShape shape;
      shape.query_heads = shape.kv_heads = heads;
      shape.scale = 1 / std::sqrt(static_cast<float>(d));
      shape.block = block;
      Engine e(2), one(1), bf16(2, ActivationType::kBF16);
      AttentionSequence s{q.data(), out.data(), tokens, first, views.data()};
      attention(e.ctx, layout, shape, {&s, 1});
      s.out = again.data();
      attention(one.ctx, layout, shape, {&s, 1});
      RC_ASSERT(out == again);
      attention(bf16.ctx, layout, shape, {&s, 1});
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t end = std::min(((first + t) / block + 1) * block, first + tokens);
        for (int h = 0; h < heads; ++h) {
          const auto at = static_cast<size_t>((t * heads + h) * d);
          const auto expected = exact(kv[static_cast<size_t>(h)], &q[at], d, end, shape.scale);
          for (size_t c = 0; c < expected.size(); ++c) {
            RC_ASSERT(std::fabs(out[at + c] - expected[c]) <= 1e-5);
            RC_ASSERT(std::fabs(again[at + c] - expected[c]) <= 4e-2);
          }
        }
      }
    }));
  }
}

// A block's rows in lanes: whatever the pages, with scores that grow, so that the maximum is raised again and again, and
// heads in halves; the bits of any number of threads and any company.
TEST(BlockAttention, RowsInLanesWhateverThePagesAndTheScores) {
  for (const int d : {32, 64, 128})
    for (const int page_slots : {1, 5, 16, 32})
      for (const int64_t block : {1, 16})
        for (const auto& [tokens, old] : {std::pair<int64_t, int64_t>{16, 0}, {9, 30}, {16, 47}, {13, 250}, {33, 300}, {64, 5}}) {
          const KvLayout layout{DType::kBF16, d, page_slots};
          constexpr int kHeads = 3;
          std::vector<Head> kv;
          std::vector<KvHeadView> views;
          const auto n = static_cast<size_t>(old + tokens), width = static_cast<size_t>(d);
          for (int h = 0; h < kHeads; ++h) {
            auto k = normals(n * width, 10 + static_cast<uint32_t>(h)), v = normals(n * width, 20);
            kv.emplace_back(layout, old + tokens);
            for (size_t s = 0; s < n; ++s) {
              for (size_t c = 0; c < width; ++c) k[s * width + c] *= 0.2f + 0.04f * static_cast<float>(s);
              kv.back().push(&k[s * width], &v[s * width], static_cast<int32_t>(s));
            }
          }
          for (const Head& h : kv) views.push_back(h.view());
          auto q = normals(static_cast<size_t>(tokens * kHeads * d), 7);
          for (float& x : q) x = to_float(to_bf16(x));
          std::vector<float> out(q.size()), again(q.size()), other(q.size());
          AttentionShape shape;
          shape.query_heads = shape.kv_heads = kHeads;
          shape.scale = 1 / std::sqrt(static_cast<float>(d));
          shape.block = block;
          Engine one(1, ActivationType::kBF16), three(3, ActivationType::kBF16);
          AttentionSequence s{q.data(), out.data(), tokens, old, views.data()};
          attention(one.ctx, layout, shape, {&s, 1});
          AttentionSequence both[] = {s, s};
          both[0].out = other.data();
          both[1].out = again.data();
          attention(three.ctx, layout, shape, both);
          ASSERT_EQ(out, again);
          ASSERT_EQ(out, other);
          // The same planned, item by item, for two layers one after the other, whose second finds what the first left.
          AttentionPlan plan(three.ctx, layout, shape, both);
          ASSERT_EQ(plan.first_item(0), 0);
          ASSERT_EQ(plan.first_item(2), plan.items());
          for (int layer = 0; layer < 2; ++layer) {
            std::fill(other.begin(), other.end(), NAN);
            for (int64_t i = plan.first_item(1); i-- > 0;) plan.item(one.ctx, both, i, static_cast<int>(i % 3));
            ASSERT_EQ(out, other);
          }
          for (int64_t t = 0; t < tokens; ++t) {
            const int64_t end = std::min((old + t) / block * block + block, old + tokens);
            for (int h = 0; h < kHeads; ++h) {
              const auto at = static_cast<size_t>((t * kHeads + h) * d);
              const auto expected = exact(kv[static_cast<size_t>(h)], &q[at], d, end, shape.scale);
              for (size_t c = 0; c < expected.size(); ++c)
                ASSERT_NEAR(out[at + c], expected[c], 1.2e-2) << d << " pages of " << page_slots << ", row " << t;
            }
          }
        }
}

TEST(BlockAttention, RefusesWindowsAndEmptyBlocks) {
  KvLayout layout;
  layout.head_dim = 8;
  const Head head = random_head(layout, 0, 4, 0, 1);
  const KvHeadView view = head.view();
  std::vector<float> q(32), out(32);
  const AttentionSequence s{q.data(), out.data(), 4, 0, &view};
  Engine e;
  AttentionShape shape{1, 1, 1.0f};
  shape.block = 0;
  EXPECT_THROW(attention(e.ctx, layout, shape, {&s, 1}), BadInput);
  shape.block = 4;
  shape.window = 8;
  EXPECT_THROW(attention(e.ctx, layout, shape, {&s, 1}), BadInput);
  shape.window = 0;
  shape.causal = false;
  EXPECT_THROW(attention(e.ctx, layout, shape, {&s, 1}), BadInput);
  shape.causal = true;
  attention(e.ctx, layout, shape, {&s, 1});
}

}  // namespace
}  // namespace lacuna

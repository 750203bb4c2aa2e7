// Attention over two sets of slots, one of them without causality, put together by log-sum-exp.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "kernels/attention.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Head;
using testing::isa_levels;
using testing::normals;
using testing::random_head;

struct Case {
  KvLayout cache_layout, sink_layout;
  int group = 1, kv_heads = 1;
  int64_t tokens = 1, first_position = 600, window = 0;
  std::vector<Head> cache, sinks;
  std::vector<float> q;

  int64_t heads() const { return int64_t{group} * kv_heads; }
  AttentionShape shape() const {
    return {static_cast<int>(heads()), kv_heads, 1.0f / std::sqrt(static_cast<float>(cache_layout.head_dim)), window};
  }
};

struct Result {
  std::vector<float> out, lse, share;
};

Result run(Context& ctx, const Case& c) {
  std::vector<KvHeadView> cache, sinks;
  for (const Head& h : c.cache) cache.push_back(h.view());
  for (const Head& h : c.sinks) sinks.push_back(h.view());
  const auto rows = static_cast<size_t>(c.tokens * c.heads());
  Result own{std::vector<float>(c.q.size()), std::vector<float>(rows), std::vector<float>(rows)}, other = own;
  const AttentionSequence first{c.q.data(), own.out.data(), c.tokens, c.first_position, cache.data(), own.lse.data()};
  const AttentionSequence second{c.q.data(), other.out.data(), c.tokens, 0, sinks.data(), other.lse.data()};
  AttentionShape shape = c.shape();
  attention(ctx, c.cache_layout, shape, {&first, 1});
  shape.window = 0;
  shape.causal = false;
  attention(ctx, c.sink_layout, shape, {&second, 1});
  merge_attention(ctx, static_cast<int64_t>(rows), c.cache_layout.head_dim, own.out.data(), own.lse.data(),
                  other.out.data(), other.lse.data(), own.share.data());
  return own;
}

// One softmax over both sets, in double.
double error_of(const Case& c, const Result& got) {
  const int64_t d = c.cache_layout.head_dim, stride = c.heads() * d;
  const double scale = c.shape().scale;
  double worst = 0;
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t h = 0; h < c.heads(); ++h) {
      const float* q = &c.q[static_cast<size_t>(t * stride + h * d)];
      std::vector<double> weights, out(static_cast<size_t>(d));
      std::vector<const double*> values;
      double top = -1e300;
      const auto see = [&](const Head& head, int64_t i) {
        double s = 0;
        for (int64_t e = 0; e < d; ++e) s += q[e] * head.k[static_cast<size_t>(i * d + e)];
        weights.push_back(s * scale);
        top = std::max(top, s * scale);
        values.push_back(&head.v[static_cast<size_t>(i * d)]);
      };
      const Head& cache = c.cache[static_cast<size_t>(h / c.group)];
      const Head& sinks = c.sinks[static_cast<size_t>(h / c.group)];
      for (int64_t i = 0; i <= cache.length() - c.tokens + t; ++i)
        if (c.window == 0 || cache.position(i) > c.first_position + t - c.window) see(cache, i);
      for (int64_t i = 0; i < sinks.length(); ++i) see(sinks, i);
      double total = 0;
      double of_cache = 0;
      for (double& w : weights) total += w = std::exp(w - top);
      for (size_t i = 0; i + static_cast<size_t>(sinks.length()) < weights.size(); ++i) of_cache += weights[i];
      worst = std::max(worst, std::fabs(of_cache / total - got.share[static_cast<size_t>(t * c.heads() + h)]));
      for (size_t i = 0; i < weights.size(); ++i)
        for (int64_t e = 0; e < d; ++e) out[static_cast<size_t>(e)] += weights[i] / total * values[i][e];
      for (int64_t e = 0; e < d; ++e)
        worst = std::max(worst,
                         std::fabs(out[static_cast<size_t>(e)] - got.out[static_cast<size_t>(t * stride + h * d + e)]));
      worst = std::max(worst, std::fabs(top + std::log(total) - got.lse[static_cast<size_t>(t * c.heads() + h)]));
    }
  return worst;
}

Case make(DType dtype, int d, int group, int kv_heads, int64_t old, int64_t tokens, int64_t sinks, int64_t window,
          uint32_t seed) {
  Case c;
  c.cache_layout = {dtype, d, 32};
  c.sink_layout = {DType::kF32, d, static_cast<int>(sinks)};
  c.group = group;
  c.kv_heads = kv_heads;
  c.tokens = tokens;
  c.window = window;
  c.first_position = 9000;
  for (int g = 0; g < kv_heads; ++g) {
    c.cache.push_back(
        random_head(c.cache_layout, old + g, tokens, c.first_position, seed + static_cast<uint32_t>(g) * 7));
    c.sinks.push_back(random_head(c.sink_layout, sinks, 0, sinks, seed + 1000 + static_cast<uint32_t>(g)));
  }
  c.q = normals(static_cast<size_t>(tokens * c.heads() * d), seed + 3);
  return c;
}

TEST(MergeAttention, IsOneSoftmaxOverBothSets) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    EXPECT_TRUE(rc::check([] {
      const auto dtype = *rc::gen::element(DType::kF32, DType::kBF16, DType::kI8);
      const auto tokens = *rc::gen::oneOf(rc::gen::inRange<int64_t>(1, 4), rc::gen::inRange<int64_t>(1, 120));
      const Case c = make(dtype, *rc::gen::element(8, 33, 64, 128), *rc::gen::inRange(1, 8), *rc::gen::inRange(1, 3),
                          *rc::gen::inRange<int64_t>(0, 300), tokens, *rc::gen::inRange<int64_t>(1, 150),
                          *rc::gen::element<int64_t>(0, 1, 40), *rc::gen::inRange<uint32_t>(0, 10000));
      MemoryAccount memory;
      Context one(memory, 1), three(memory, 3);
      one.activations = three.activations = ActivationType::kF32;
      const Result a = run(one, c), b = run(three, c);
      RC_ASSERT(a.out == b.out);
      RC_ASSERT(a.lse == b.lse);
      RC_ASSERT(a.share == b.share);
      RC_ASSERT(error_of(c, a) < 2e-5);
    }));
  }
}

TEST(MergeAttention, LongHeadsSplitIntoChunks) {
  for (const int64_t tokens : {1, 9}) {
    const Case c = make(DType::kF32, 32, 2, 2, 5000, tokens, 1500, 0, 5);
    MemoryAccount memory;
    Context ctx(memory, 2);
    ctx.activations = ActivationType::kF32;
    EXPECT_LT(error_of(c, run(ctx, c)), 2e-5) << tokens;
  }
}

TEST(MergeAttention, FarApartLogarithmsDoNotOverflow) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  float out[] = {1, 2, 3, 4}, lse[] = {-5000, 90}, other[] = {7, 8, 9, 10};
  const float other_lse[] = {5000, 90};
  merge_attention(ctx, 2, 2, out, lse, other, other_lse);
  EXPECT_EQ(out[0], 7);
  EXPECT_EQ(out[1], 8);
  EXPECT_EQ(out[2], 6);
  EXPECT_EQ(out[3], 7);
  EXPECT_EQ(lse[0], 5000);
  EXPECT_NEAR(lse[1], 90 + std::log(2.0), 1e-5);
}

// Observed attention beside sinks: every row counts as much as the sinks left of it.
TEST(MergeAttention, ColumnSumsTakeSharesOfRows) {
  EXPECT_TRUE(rc::check([] {
    const auto tokens = *rc::gen::inRange<int64_t>(1, 500);
    const int r = *rc::gen::inRange(1, 4), d = *rc::gen::element(8, 33);
    const int64_t window = *rc::gen::element<int64_t>(0, 40), stride = r + *rc::gen::inRange(0, 3);
    const KvLayout layout{DType::kF32, d, 32};
    const Head head = random_head(layout, *rc::gen::inRange<int64_t>(0, 200), tokens, 700, 5);
    const auto q = normals(static_cast<size_t>(tokens * r * d), 6);
    auto share = normals(static_cast<size_t>(tokens * stride), 7);
    for (float& x : share) x = 1 / (1 + std::exp(-x));
    MemoryAccount memory;
    Context ctx(memory, 2);
    const int64_t n = head.length();
    std::vector<float> sums(static_cast<size_t>(r * n));
    attention_column_sums(ctx, layout, head.view(), q.data(), tokens, r, 0, 700, 0.3f, window, sums.data(),
                          share.data(), stride);
    for (int64_t j = 0; j < r; ++j) {
      const auto rows = testing::exact_rows(head, d, q.data() + j * d, tokens, r * d, 700, 0.3f, window);
      for (int64_t i = 0; i < n; ++i) {
        double wanted = 0;
        for (int64_t t = 0; t < tokens; ++t)
          wanted += share[static_cast<size_t>(t * stride + j)] * rows[static_cast<size_t>(t * n + i)];
        RC_ASSERT(std::fabs(sums[static_cast<size_t>(j * n + i)] - wanted) < 1e-4);
      }
    }
  }));
}

TEST(MergeAttention, RefusesBadRequests) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  const Case c = make(DType::kF32, 8, 1, 1, 4, 2, 3, 0, 1);
  const KvHeadView view = c.sinks[0].view(), none{view.pages, 0};
  std::vector<float> out(16), lse(2);
  AttentionShape shape = c.shape();
  shape.causal = false;
  AttentionSequence s{c.q.data(), out.data(), 2, 0, &none, nullptr};
  EXPECT_THROW(attention(ctx, c.sink_layout, shape, {&s, 1}), BadInput);  // no slot at all
  s.heads = &view;
  shape.window = 2;
  EXPECT_THROW(attention(ctx, c.sink_layout, shape, {&s, 1}), BadInput);
  EXPECT_THROW(merge_attention(ctx, 2, 0, out.data(), lse.data(), out.data(), lse.data()), BadInput);
  EXPECT_THROW(merge_attention(ctx, 2, 8, out.data(), nullptr, out.data(), lse.data()), BadInput);
}

}  // namespace
}  // namespace lacuna

#include "kernels/latent_heads.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::Head;
using testing::isa_levels;
using testing::normals;

// Rows of three sequences, the second of which has nothing before it, and where they lie.
struct Sequences {
  Sequences(const KvLayout& layout, int heads, std::vector<int64_t> before, std::vector<int64_t> rows) {
    for (size_t s = 0; s < rows.size(); ++s)
      for (int h = 0; h < heads; ++h) {
        kv.emplace_back(layout, before[s] + rows[s]);
        const std::vector<float> zero(static_cast<size_t>(layout.head_dim));
        for (int64_t i = 0; i < before[s]; ++i) kv.back().push(zero.data(), zero.data(), static_cast<int32_t>(i));
      }
    for (const Head& h : kv) views.push_back(h.view());
    for (size_t s = 0; s < rows.size(); ++s)
      list.push_back({&views[s * static_cast<size_t>(heads)], rows[s], before[s]});
  }
  std::vector<Head> kv;
  std::vector<KvHeadView> views;
  std::vector<KvRows> list;
};

double norm_of(const float* x, int d, const float* w, const float* b, double eps, int i) {
  double mean = 0, variance = 0;
  for (int c = 0; c < d; ++c) mean += x[c] / static_cast<double>(d);
  for (int c = 0; c < d; ++c) variance += (x[c] - mean) * (x[c] - mean) / static_cast<double>(d);
  return (x[i] - mean) / std::sqrt(variance + eps) * w[i] + b[i];
}

TEST(PrepareHeads, NormsTurnsAndAppendsAsDoubleDoes) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    for (const int d : {32, 64})
      for (const DType dtype : {DType::kBF16, DType::kF32})
        for (const int heads : {1, 2, 3, 5, 8})
          for (const int rotated : {0, 16, 48, 64}) {
            if (rotated > d) continue;
            const KvLayout layout{dtype, d, 5};
            const std::vector<int64_t> before = {7, 0, 31}, rows = {9, 17, 1};
            const int64_t m = 27, width = int64_t{heads} * d, stride = 3 * width + 8, half = rotated / 2;
            const auto x = normals(static_cast<size_t>(m * stride), 1), w = normals(static_cast<size_t>(4 * d), 2),
                       angle = normals(static_cast<size_t>(m * half + 1), 3);
            std::vector<float> cosine, sine;
            for (const float a : angle) {
              cosine.push_back(std::cos(a));
              sine.push_back(std::sin(a));
            }
            const HeadPreparation how{{&w[0], &w[static_cast<size_t>(d)], 1e-5f},
                                      {&w[static_cast<size_t>(2 * d)], &w[static_cast<size_t>(3 * d)], 1e-3f},
                                      rotated,
                                      cosine.data(),
                                      sine.data()};
            for (const bool queries : {true, false}) {
              Sequences all(layout, heads, before, rows), split(layout, heads, before, rows);
              auto y = x, parts = x;
              Engine e(2, ActivationType::kBF16), one(1, ActivationType::kBF16);
              prepare_heads(e.ctx, layout, how, all.list, heads, 0, m, y.data(), stride, queries);
              // The same in three calls, whose ends are not those of the sequences.
              for (const auto& [first, n] : {std::pair<int64_t, int64_t>{0, 8}, {8, 10}, {18, 9}}) {
                HeadPreparation rest = how;
                rest.cosine += first * half;
                rest.sine += first * half;
                prepare_heads(one.ctx, layout, rest, split.list, heads, first, n,
                              &parts[static_cast<size_t>(first * stride)], stride, queries);
              }
              for (int64_t i = 0; i < m; ++i) {
                const size_t s = i < 9 ? 0 : i < 26 ? 1 : 2;
                const int64_t t = i - (s == 0 ? 0 : s == 1 ? 9 : 26);
                const float* row = &x[static_cast<size_t>(i * stride)];
                const auto turned = [&](const float* head, const LayerNorm& norm, int c) {
                  const auto at = [&](int j) { return norm_of(head, d, norm.weight, norm.bias, norm.eps, j); };
                  if (c >= rotated) return at(c);
                  const auto a = static_cast<size_t>(i * half + c / 2);
                  return c % 2 == 0 ? at(c) * cosine[a] - at(c + 1) * sine[a] : at(c) * cosine[a] + at(c - 1) * sine[a];
                };
                for (int h = 0; h < heads; ++h) {
                  const size_t at = s * static_cast<size_t>(heads) + static_cast<size_t>(h);
                  const auto slot = all.kv[at].slot_bytes(before[s] + t),
                             again = split.kv[at].slot_bytes(before[s] + t);
                  ASSERT_EQ(slot, again);
                  const auto value = [&](int64_t c) {
                    if (dtype == DType::kF32)
                      return static_cast<double>(reinterpret_cast<const float*>(slot.data())[c]);
                    return static_cast<double>(to_float(reinterpret_cast<const BF16*>(slot.data())[c]));
                  };
                  int32_t position = 0;
                  std::memcpy(&position, &slot[static_cast<size_t>(2 * d) * dtype_size(dtype)], 4);
                  ASSERT_EQ(position, before[s] + t);
                  for (int c = 0; c < d; ++c) {
                    const double k = turned(row + width + h * d, how.k_norm, c), v = row[2 * width + h * d + c];
                    const double step = dtype == DType::kBF16 ? 0x1p-8 : 1e-6;
                    ASSERT_NEAR(value(c), k, step * std::fabs(k) + 1e-5);
                    ASSERT_NEAR(value(d + c), v, step * std::fabs(v));
                    const auto j = static_cast<size_t>(i * stride + h * d + c);
                    if (queries)
                      ASSERT_NEAR(y[j], turned(row + h * d, how.q_norm, c), 2e-5);
                    else
                      ASSERT_EQ(y[j], x[j]);
                    ASSERT_EQ(parts[j], y[j]);
                  }
                }
                for (int64_t j = i * stride + 3 * width; j < (i + 1) * stride; ++j)
                  ASSERT_EQ(y[static_cast<size_t>(j)], x[static_cast<size_t>(j)]);
              }
            }
          }
  }
}

TEST(PrepareHeads, RefusesBadRequests) {
  const KvLayout layout{DType::kBF16, 64, 8};
  Sequences s(layout, 1, {0}, {4});
  std::vector<float> x(4 * 192), w(64, 1.0f);
  Engine e(1, ActivationType::kBF16);
  const HeadPreparation how{{w.data(), w.data(), 1e-5f}, {w.data(), w.data(), 1e-5f}, 16, w.data(), w.data()};
  const auto call = [&](const HeadPreparation& h, int heads, int64_t first, int64_t rows, float* qkv, int64_t stride) {
    prepare_heads(e.ctx, layout, h, s.list, heads, first, rows, qkv, stride, true);
  };
  EXPECT_THROW(call(how, 0, 0, 4, x.data(), 192), BadInput);
  EXPECT_THROW(call(how, 1, 0, 5, x.data(), 192), BadInput);
  EXPECT_THROW(call(how, 1, -1, 2, x.data(), 192), BadInput);
  EXPECT_THROW(call(how, 1, 0, 4, x.data(), 191), BadInput);
  HeadPreparation odd = how;
  odd.rotated = 80;
  EXPECT_THROW(call(odd, 1, 0, 4, x.data(), 192), BadInput);
  odd = how;
  odd.cosine = nullptr;
  EXPECT_THROW(call(odd, 1, 0, 4, x.data(), 192), BadInput);
  odd = how;
  odd.k_norm.eps = 0;
  EXPECT_THROW(call(odd, 1, 0, 4, x.data(), 192), BadInput);
  call(how, 1, 0, 0, x.data(), 192);
  call(how, 1, 0, 4, x.data(), 192);
}

}  // namespace
}  // namespace lacuna

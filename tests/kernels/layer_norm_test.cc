#include "kernels/layer_norm.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "kernels/elementwise.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::isa_levels;
using testing::normals;

// (x - mean) / sqrt(variance + eps) of one row, in double.
std::vector<double> exact_norm(const float* x, int64_t d, double eps) {
  double mean = 0, variance = 0;
  for (int64_t c = 0; c < d; ++c) mean += x[c];
  mean /= static_cast<double>(d);
  for (int64_t c = 0; c < d; ++c) variance += (x[c] - mean) * (x[c] - mean);
  variance /= static_cast<double>(d);
  std::vector<double> y(static_cast<size_t>(d));
  for (int64_t c = 0; c < d; ++c) y[static_cast<size_t>(c)] = (x[c] - mean) / std::sqrt(variance + eps);
  return y;
}

TEST(LayerNorm, MatchesDouble) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    EXPECT_TRUE(rc::check([] {
      const auto m = *rc::gen::inRange<int64_t>(1, 30), groups = *rc::gen::inRange<int64_t>(1, 5),
                 d = *rc::gen::inRange<int64_t>(1, 300);
      const int64_t stride = groups * d + *rc::gen::element(0, 9);
      const bool affine = *rc::gen::arbitrary<bool>(), add = *rc::gen::arbitrary<bool>();
      const float offset = *rc::gen::element(0.0f, 3.0f, -100.0f);
      const auto size = static_cast<size_t>(m * stride);
      auto x = normals(size, 1);
      for (float& f : x) f += offset;
      const auto weight = normals(static_cast<size_t>(d), 2), bias = normals(static_cast<size_t>(d), 3);
      const LayerNorm norm{affine ? weight.data() : nullptr, affine ? bias.data() : nullptr, 1e-5f};
      const auto before = normals(size, 4);
      auto y = before, again = before;
      Engine e, one(1);
      const auto mode = add ? LinearMode::kAccumulate : LinearMode::kStore;
      layer_norm(e.ctx, norm, x.data(), m, d, y.data(), mode, groups, stride);
      layer_norm(one.ctx, norm, x.data(), m, d, again.data(), mode, groups, stride);
      RC_ASSERT(y == again);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t at = i * stride + g * d;
          const auto exact = exact_norm(&x[static_cast<size_t>(at)], d, 1e-5);
          for (int64_t c = 0; c < d; ++c) {
            const auto j = static_cast<size_t>(at + c), k = static_cast<size_t>(c);
            const double expected = (affine ? exact[k] * weight[k] + bias[k] : exact[k]) + (add ? before[j] : 0);
            // What subtracting the mean loses of an offset, in deviations, which eps keeps from being 0.
            RC_ASSERT(std::fabs(y[j] - expected) <= 1e-5 + 3e-7 * std::fabs(offset) * (d == 1 ? 320 : d < 4 ? 40 : 4) *
                                                               (1 + std::fabs(expected)));
          }
        }
        for (int64_t j = i * stride + groups * d; j < (i + 1) * stride; ++j)
          RC_ASSERT(y[static_cast<size_t>(j)] == before[static_cast<size_t>(j)]);
      }
      if (add) return;
      layer_norm(one.ctx, norm, x.data(), m, d, x.data(), mode, groups, stride);  // in place
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = i * stride; j < i * stride + groups * d; ++j)
          RC_ASSERT(x[static_cast<size_t>(j)] == y[static_cast<size_t>(j)]);
    }));
  }
}

TEST(LayerNorm, OfAConstantRowIsItsBias) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    Engine e;
    for (const int64_t d : {1, 5, 16, 128, 2048}) {
      const std::vector<float> x(static_cast<size_t>(d), 1e6f), weight(x), bias = normals(x.size(), 1);
      std::vector<float> y(x.size());
      layer_norm(e.ctx, {weight.data(), bias.data(), 1e-6f}, x.data(), 1, d, y.data());
      EXPECT_EQ(y, bias);
    }
  }
}

TEST(AdaptiveNorm, TakesEachRowsOwnShiftAndScale) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    EXPECT_TRUE(rc::check([] {
      const auto m = *rc::gen::inRange<int64_t>(1, 40), d = *rc::gen::inRange<int64_t>(2, 600),
                 n = *rc::gen::inRange<int64_t>(1, 6);
      const bool affine = *rc::gen::arbitrary<bool>();
      const int64_t stride = 6 * d;
      const auto x = normals(static_cast<size_t>(m * d), 1), table = normals(static_cast<size_t>(n * stride), 2);
      const auto weight = normals(static_cast<size_t>(d), 3), bias = normals(static_cast<size_t>(d), 4);
      std::vector<int32_t> of_row;
      for (int64_t i = 0; i < m; ++i) of_row.push_back(static_cast<int32_t>(*rc::gen::inRange<int64_t>(0, n)));
      const LayerNorm norm{affine ? weight.data() : nullptr, affine ? bias.data() : nullptr, 1e-5f};
      std::vector<float> y(x.size()), gated = normals(x.size(), 5);
      const auto before = gated;
      Engine e(*rc::gen::inRange(1, 4));
      const int64_t at = 3 * d;
      adaptive_norm(e.ctx, norm, x.data(), m, d, {table.data() + at, stride, of_row.data()}, y.data());
      add_gated(e.ctx, x.data(), m, d, {table.data() + 5 * d, stride, of_row.data()}, gated.data());
      for (int64_t i = 0; i < m; ++i) {
        const auto exact = exact_norm(&x[static_cast<size_t>(i * d)], d, 1e-5);
        const float* row = &table[static_cast<size_t>(of_row[static_cast<size_t>(i)] * stride)];
        for (int64_t c = 0; c < d; ++c) {
          const auto j = static_cast<size_t>(i * d + c), k = static_cast<size_t>(c);
          const double normed = affine ? exact[k] * weight[k] + bias[k] : exact[k];
          RC_ASSERT(std::fabs(y[j] - (normed * (1.0 + row[4 * d + c]) + row[3 * d + c])) <= 2e-5);
          RC_ASSERT(std::fabs(gated[j] - (before[j] + static_cast<double>(x[j]) * row[5 * d + c])) <= 2e-6);
        }
      }
    }));
  }
}

TEST(GatedNorm, IsAddGatedAndThenAdaptiveNorm) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    EXPECT_TRUE(rc::check([] {
      const auto m = *rc::gen::inRange<int64_t>(1, 40), d = *rc::gen::inRange<int64_t>(1, 400),
                 n = *rc::gen::inRange<int64_t>(1, 6);
      const int64_t stride = 3 * d;
      const auto size = static_cast<size_t>(m * d);
      const auto branch = normals(size, 1), table = normals(static_cast<size_t>(n * stride), 2),
                 weight = normals(static_cast<size_t>(d), 3);
      std::vector<int32_t> of_row;
      for (int64_t i = 0; i < m; ++i) of_row.push_back(static_cast<int32_t>(*rc::gen::inRange<int64_t>(0, n)));
      const LayerNorm norm{*rc::gen::arbitrary<bool>() ? weight.data() : nullptr, nullptr, 1e-5f};
      const RowTable gate{table.data(), stride, of_row.data()}, shift_scale{table.data() + d, stride, of_row.data()};
      auto x = normals(size, 4), expected = x;
      std::vector<float> y(size), expected_y(size);
      Engine e(*rc::gen::inRange(1, 4)), one(1);
      gated_norm(e.ctx, branch.data(), gate, norm, x.data(), m, d, shift_scale, y.data());
      add_gated(one.ctx, branch.data(), m, d, gate, expected.data());
      adaptive_norm(one.ctx, norm, expected.data(), m, d, shift_scale, expected_y.data());
      RC_ASSERT(x == expected);
      RC_ASSERT(y == expected_y);
    }));
  }
  Engine e;
  float x[16] = {}, y[16] = {};
  const int32_t zero[2] = {};
  const RowTable table{x, 0, zero}, none{};
  const LayerNorm norm{nullptr, nullptr, 1e-5f};
  EXPECT_THROW(gated_norm(e.ctx, x, table, norm, x, 2, 8, table, x), BadInput);
  EXPECT_THROW(gated_norm(e.ctx, nullptr, table, norm, x, 2, 8, table, y), BadInput);
  EXPECT_THROW(gated_norm(e.ctx, x, none, norm, x, 2, 8, table, y), BadInput);
  EXPECT_THROW(gated_norm(e.ctx, x, table, norm, x, 2, 0, table, y), BadInput);
}

TEST(GeluTanh, MatchesDoubleOverTheWholeRange) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    std::vector<float> x;
    for (float v = -30; v < 30; v += 0.00137f) x.push_back(v);
    for (const float v : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e20f, -1e20f, 2e38f, -3e38f}) x.push_back(v);
    auto y = x, again = x;
    Engine e, one(1);
    gelu_tanh(e.ctx, y.data(), static_cast<int64_t>(x.size()));
    gelu_tanh(one.ctx, again.data(), static_cast<int64_t>(x.size()));
    EXPECT_EQ(y, again);
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i], u = std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v);
      // 1 + tanh(u) = 2 / (1 + e^-2u), without its cancellation.
      const double expected = u < -300 ? 0 : v / (1 + std::exp(-2 * u));
      // Rounding 2 u log2(e) to f32 costs |u| * 2^-23 of e^-2u.
      ASSERT_NEAR(y[i], expected, (1e-6 + 3e-7 * std::min(std::fabs(u), 90.0)) * std::fabs(expected) + 1e-35) << v;
    }
    float odd[] = {NAN, INFINITY};
    gelu_tanh(e.ctx, odd, 2);
    EXPECT_TRUE(std::isnan(odd[0]));
    EXPECT_EQ(odd[1], INFINITY);
  }
}

TEST(Silu, IsSiluMulByOne) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    Engine e;
    for (const int64_t n : {1, 7, 16, 33, 40000}) {
      auto x = normals(static_cast<size_t>(n), 5);
      std::vector<float> ones(x.size(), 1.0f), expected(x.size());
      silu_mul(e.ctx, x.data(), ones.data(), 1, n, expected.data());
      silu(e.ctx, x.data(), n);
      EXPECT_EQ(x, expected);
    }
  }
}

TEST(RopePairs, TurnsNeighboursOfTheFirstElements) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    for (const int64_t d : {2, 8, 31, 64, 128})
      for (const int64_t rotated : {int64_t{0}, int64_t{2}, d / 4 * 2, d / 2 * 2}) {
        const int64_t m = 37, heads = 3, stride = heads * d + 4, half = rotated / 2;
        auto x = normals(static_cast<size_t>(m * stride), 1), again = x;
        const auto before = x;
        const auto c = normals(static_cast<size_t>(m * half + 1), 2), s = normals(static_cast<size_t>(m * half + 1), 3);
        Engine e, one(1);
        rope_pairs(e.ctx, x.data(), m, heads, d, rotated, c.data(), s.data(), stride);
        rope_pairs(one.ctx, again.data(), m, heads, d, rotated, c.data(), s.data(), stride);
        ASSERT_EQ(x, again);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < stride; ++j) {
            const auto at = static_cast<size_t>(i * stride + j);
            const int64_t in_head = j % d;
            if (j >= heads * d || in_head >= rotated) {
              ASSERT_EQ(x[at], before[at]);
              continue;
            }
            const auto angle = static_cast<size_t>(i * half + in_head / 2);
            const double cc = c[angle], ss = s[angle];
            if (in_head % 2 == 0)
              ASSERT_NEAR(x[at], before[at] * cc - before[at + 1] * ss, 3e-6);
            else
              ASSERT_NEAR(x[at], before[at] * cc + before[at - 1] * ss, 3e-6);
          }
      }
  }
}

TEST(LayerNorm, RefusesBadRequests) {
  Engine e;
  float x[64] = {};
  const int32_t zero[8] = {};
  const LayerNorm norm{x, x, 1e-6f};
  EXPECT_THROW(layer_norm(e.ctx, norm, x, 2, 0, x), BadInput);
  EXPECT_THROW(layer_norm(e.ctx, norm, x, -1, 8, x), BadInput);
  EXPECT_THROW(layer_norm(e.ctx, norm, x, 2, 8, x, LinearMode::kStore, 0), BadInput);
  EXPECT_THROW(layer_norm(e.ctx, norm, x, 2, 8, x, LinearMode::kStore, 2, 15), BadInput);
  EXPECT_THROW(layer_norm(e.ctx, norm, nullptr, 2, 8, x), BadInput);
  EXPECT_THROW(layer_norm(e.ctx, {x, x, 0}, x, 2, 8, x), BadInput);
  EXPECT_THROW(layer_norm(e.ctx, {x, x, NAN}, x, 2, 8, x), BadInput);
  EXPECT_THROW(adaptive_norm(e.ctx, norm, x, 2, 8, {x, 16, nullptr}, x), BadInput);
  EXPECT_THROW(adaptive_norm(e.ctx, norm, x, 2, 8, {nullptr, 16, zero}, x), BadInput);
  EXPECT_THROW(add_gated(e.ctx, x, 2, 8, {x, 16, nullptr}, x), BadInput);
  EXPECT_THROW(add_gated(e.ctx, x, 2, -8, {x, 16, zero}, x), BadInput);
  EXPECT_THROW(gelu_tanh(e.ctx, nullptr, 2), BadInput);
  EXPECT_THROW(silu(e.ctx, x, -2), BadInput);
  EXPECT_THROW(rope_pairs(e.ctx, x, 2, 2, 8, 7, x, x), BadInput);
  EXPECT_THROW(rope_pairs(e.ctx, x, 2, 2, 8, 10, x, x), BadInput);
  EXPECT_THROW(rope_pairs(e.ctx, x, 2, 0, 8, 4, x, x), BadInput);
  layer_norm(e.ctx, norm, nullptr, 0, 8, nullptr);
}

}  // namespace
}  // namespace lacuna

#include "kernels/elementwise.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::isa_levels;
using testing::normals;

TEST(RmsNorm, MatchesDouble) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    EXPECT_TRUE(rc::check([] {
      const auto m = *rc::gen::inRange<int64_t>(1, 40), d = *rc::gen::inRange<int64_t>(1, 700);
      const int64_t stride = d + *rc::gen::element(0, 9);
      auto x = normals(static_cast<size_t>(m * stride), 1);
      const auto weight = normals(static_cast<size_t>(d), 2);
      auto y = x;
      Engine e, one(1);
      rms_norm(e.ctx, x.data(), m, d, weight.data(), 1e-6f, y.data(), stride);
      for (int64_t i = 0; i < m; ++i) {
        double squares = 0;
        for (int64_t c = 0; c < d; ++c) squares += std::pow(x[static_cast<size_t>(i * stride + c)], 2.0);
        const double f = 1 / std::sqrt(squares / static_cast<double>(d) + 1e-6);
        for (int64_t c = 0; c < d; ++c) {
          const auto at = static_cast<size_t>(i * stride + c);
          const double expected = x[at] * f * weight[static_cast<size_t>(c)];
          RC_ASSERT(std::fabs(y[at] - expected) <= 2e-6 * (std::fabs(expected) + 1e-6));
        }
      }
      rms_norm(one.ctx, x.data(), m, d, weight.data(), 1e-6f, x.data(), stride);  // in place
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < d; ++c)
          RC_ASSERT(x[static_cast<size_t>(i * stride + c)] == y[static_cast<size_t>(i * stride + c)]);
    }));
  }
}

TEST(SiluMul, MatchesDoubleOverTheWholeRange) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    std::vector<float> gate, up;
    for (float x = -200; x < 200; x += 0.037f) gate.push_back(x);
    for (const float x : {0.0f, -0.0f, 1e-30f, -1e-30f, 2e38f, -3e38f}) gate.push_back(x);
    up.assign(gate.size(), 1.5f);
    std::vector<float> out(gate.size());
    Engine e;
    silu_mul(e.ctx, gate.data(), up.data(), 1, static_cast<int64_t>(gate.size()), out.data());
    for (size_t i = 0; i < gate.size(); ++i) {
      const double x = gate[i], expected = 1.5 * x / (1 + std::exp(-x));
      // Rounding -x log2(e) to f32 costs |x| * 2^-24 of e^-x.
      EXPECT_NEAR(out[i], expected, (1e-6 + 1e-7 * std::min(std::fabs(x), 90.0)) * std::fabs(expected) + 3e-36) << x;
    }
    silu_mul(e.ctx, gate.data(), up.data(), 1, static_cast<int64_t>(gate.size()), gate.data());
    EXPECT_EQ(gate, out);
  }
}

TEST(SiluMul, TakesHalvesOfOneProduct) {
  const int64_t m = 50, f = 700;
  const auto both = normals(static_cast<size_t>(m * 2 * f), 3);
  std::vector<float> out(static_cast<size_t>(m * f)), again = out;
  Engine e, one(1);
  silu_mul(e.ctx, both.data(), both.data() + f, m, f, out.data(), 2 * f);
  silu_mul(one.ctx, both.data(), both.data() + f, m, f, again.data(), 2 * f);
  EXPECT_EQ(out, again);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < f; ++c) {
      const double g = both[static_cast<size_t>(i * 2 * f + c)], u = both[static_cast<size_t>(i * 2 * f + f + c)];
      const double expected = g / (1 + std::exp(-g)) * u;
      ASSERT_NEAR(out[static_cast<size_t>(i * f + c)], expected, 2e-6 * std::fabs(expected) + 1e-12);
    }
}

TEST(Relu, KeepsWhatIsAboveZeroAndWhatIsNoNumber) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    Engine e;
    for (const int64_t n : {1, 7, 16, 33, 40000}) {
      auto x = normals(static_cast<size_t>(n), 5);
      x[0] = NAN;
      const auto before = x;
      relu(e.ctx, x.data(), n);
      EXPECT_TRUE(std::isnan(x[0]));
      for (size_t i = 1; i < x.size(); ++i) ASSERT_EQ(x[i], std::max(before[i], 0.0f));
    }
  }
}

TEST(LogSigmoid, MatchesDoubleRelativelyOnBothSides) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    Engine e, one(1);
    std::vector<float> x;
    for (float v = -300; v < 80; v += 0.0137f) x.push_back(v);
    for (const float v : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e6f, -1e6f, 3e38f, -3e38f}) x.push_back(v);
    std::vector<float> out(x.size()), again(x);
    log_sigmoid(e.ctx, x.data(), static_cast<int64_t>(x.size()), 0.0625f, out.data());
    log_sigmoid(one.ctx, again.data(), static_cast<int64_t>(x.size()), 0.0625f, again.data());
    EXPECT_EQ(out, again);
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i], expected = (std::min(v, 0.0) - std::log1p(std::exp(-std::fabs(v)))) / 16;
      // Rounding -|x| log2(e) to f32 costs |x| * 2^-24 of e^-|x|, which is all there is above 0.
      const double relative = v > 0 ? 4e-7 + 1e-7 * v : 4e-7;
      ASSERT_NEAR(out[i], expected, relative * std::fabs(expected) + 1e-38) << v;
      ASSERT_LE(out[i], 0) << v;
    }
    const float odd[] = {NAN, INFINITY, -INFINITY};
    float result[3];
    log_sigmoid(e.ctx, odd, 3, 0.0625f, result);
    EXPECT_TRUE(std::isnan(result[0]));
    EXPECT_NEAR(result[1], 0, 1e-38);
    EXPECT_EQ(result[2], -INFINITY);
  }
}

TEST(Rope, MatchesDouble) {
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    for (const int64_t d : {2, 8, 30, 64, 96, 128, 256}) {
      const int64_t m = 37, heads = 3, stride = heads * d + 4;
      auto x = normals(static_cast<size_t>(m * stride), 1);
      const auto before = x;
      const auto c = normals(static_cast<size_t>(m * d / 2), 2), s = normals(static_cast<size_t>(m * d / 2), 3);
      Engine e;
      rope(e.ctx, x.data(), m, heads, d, c.data(), s.data(), stride);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t j = 0; j < d / 2; ++j) {
            const auto at = static_cast<size_t>(i * stride + h * d + j), other = at + static_cast<size_t>(d / 2);
            const double a = before[at], b = before[other];
            const double cc = c[static_cast<size_t>(i * d / 2 + j)], ss = s[static_cast<size_t>(i * d / 2 + j)];
            ASSERT_NEAR(x[at], a * cc - b * ss, 3e-6);
            ASSERT_NEAR(x[other], b * cc + a * ss, 3e-6);
          }
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = heads * d; j < stride; ++j)
          ASSERT_EQ(x[static_cast<size_t>(i * stride + j)], before[static_cast<size_t>(i * stride + j)]);
    }
  }
}

TEST(Elementwise, RefusesBadRequests) {
  Engine e;
  float x[64] = {};
  EXPECT_THROW(rms_norm(e.ctx, x, 2, 0, x, 1e-6f, x), BadInput);
  EXPECT_THROW(rms_norm(e.ctx, x, 2, 8, x, 1e-6f, x, 7), BadInput);
  EXPECT_THROW(rms_norm(e.ctx, nullptr, 2, 8, x, 1e-6f, x), BadInput);
  EXPECT_THROW(silu_mul(e.ctx, x, x, 2, 8, x, 16), BadInput);
  EXPECT_THROW(silu_mul(e.ctx, x, x, -1, 8, x), BadInput);
  EXPECT_THROW(relu(e.ctx, x, -1), BadInput);
  EXPECT_THROW(relu(e.ctx, nullptr, 4), BadInput);
  EXPECT_THROW(log_sigmoid(e.ctx, x, 4, 1, nullptr), BadInput);
  EXPECT_THROW(rope(e.ctx, x, 2, 2, 7, x, x), BadInput);
  EXPECT_THROW(rope(e.ctx, x, 2, 0, 8, x, x), BadInput);
  rms_norm(e.ctx, nullptr, 0, 8, nullptr, 1e-6f, nullptr);
}

}  // namespace
}  // namespace lacuna

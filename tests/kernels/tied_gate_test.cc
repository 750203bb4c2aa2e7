#include "kernels/tied_gate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"

namespace lacuna {
namespace {

std::vector<float> range() {
  std::vector<float> z;
  for (float x = -120; x < 120; x += 0.0173f) z.push_back(x);
  for (const float x : {0.0f, -0.0f, 1e-30f, -1e-30f, 3e38f, -3e38f}) z.push_back(x);
  return z;
}

TEST(TiedGate, MatchesLongDoubleOverTheWholeRange) {
  const auto z = range();
  const auto n = static_cast<int64_t>(z.size());
  std::vector<float> k(z.size()), g(z.size()), q = z, again = z, g_again(z.size());
  MemoryAccount memory;
  Context one(memory, 1), three(memory, 3);
  tied_gate(one, z.data(), n, k.data(), g.data());
  sigmoid(one, q.data(), n);
  tied_gate(three, again.data(), n, again.data(), g_again.data());  // in place
  EXPECT_EQ(again, k);
  EXPECT_EQ(g_again, g);
  for (size_t i = 0; i < z.size(); ++i) {
    const long double x = z[i], s = 1 / (1 + std::exp(-x));
    const long double decay = x > 0 ? -(x + std::log1p(std::exp(-x))) : -std::log1p(std::exp(x));
    EXPECT_NEAR(k[i], static_cast<double>(s), 3e-7 * static_cast<double>(s) + 1e-37) << z[i];
    EXPECT_NEAR(q[i], static_cast<double>(s), 3e-7 * static_cast<double>(s) + 1e-37) << z[i];
    EXPECT_NEAR(g[i], static_cast<double>(decay), 3e-7 * std::fabs(static_cast<double>(decay)) + 1e-37) << z[i];
    EXPECT_LE(g[i], 0.0f);
  }
}

TEST(TiedGate, SaturatedKeysStillDecay) {
  // 1 - sigmoid(30) is 0 in f32, and its logarithm would be lost.
  const float z[] = {30, 1000};
  float k[2], g[2];
  MemoryAccount memory;
  Context ctx(memory, 1);
  tied_gate(ctx, z, 2, k, g);
  EXPECT_EQ(k[0], 1.0f);
  EXPECT_NEAR(g[0], -30, 1e-5);
  EXPECT_EQ(g[1], -1000.0f);
}

TEST(AddScaled, AddsAndRefuses) {
  MemoryAccount memory;
  Context ctx(memory, 2);
  std::vector<float> x(10000), y(10000, 1.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  add_scaled(ctx, x.data(), 0.5f, 10000, y.data());
  for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(y[i], 1.0f + 0.5f * static_cast<float>(i));
  EXPECT_THROW(add_scaled(ctx, x.data(), 1, -1, y.data()), BadInput);
  EXPECT_THROW(add_scaled(ctx, nullptr, 1, 3, y.data()), BadInput);
  EXPECT_THROW(sigmoid(ctx, nullptr, 3), BadInput);
  EXPECT_THROW(tied_gate(ctx, x.data(), 3, y.data(), nullptr), BadInput);
}

}  // namespace
}  // namespace lacuna

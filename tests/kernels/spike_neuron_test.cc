#include "kernels/spike_neuron.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "base/error.h"
#include "kernels/cpu/isa.h"

namespace lacuna {
namespace {

struct Fired {
  std::vector<int32_t> s;
  std::vector<SpikeRow> rows;
};

Fired fire(const std::vector<float>& x, int64_t m, float k = 3, int threads = 1) {
  MemoryAccount memory;
  Context ctx(memory, threads);
  Fired f;
  f.s.resize(x.size());
  f.rows.resize(static_cast<size_t>(m));
  fire_neurons(ctx, x.data(), m, static_cast<int64_t>(x.size()) / m, k, f.s.data(), f.rows.data());
  return f;
}

std::vector<float> gaussian(int64_t count, float sigma, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = normal(random);
  return x;
}

// The neuron itself, step by step: charge once, fire while the potential is nearer to another spike
// than not, each spike takes V_th away (soft reset).
int32_t integrate_and_fire(double x, double threshold) {
  int32_t s = 0;
  double v = std::fabs(x);
  while (v > 0.5 * threshold || (v == 0.5 * threshold && s % 2 == 1)) {
    v -= threshold;
    ++s;
  }
  return x < 0 ? -s : s;
}

TEST(SpikeNeuron, CountsAreThoseOfTheSteppedNeuron) {
  for (const float sigma : {0.01f, 1.0f, 300.0f}) {
    const std::vector<float> x = gaussian(3 * 517, sigma, 1);
    const Fired f = fire(x, 3);
    int differ = 0;
    for (int64_t i = 0; i < 3 * 517; ++i) {
      const double threshold = f.rows[static_cast<size_t>(i / 517)].threshold;
      const double v = std::fabs(x[static_cast<size_t>(i)]) / threshold;
      const double from_tie = std::fabs(v - std::floor(v) - 0.5);
      if (from_tie < 1e-5) continue;  // f32 division and the stepped sum may round apart there
      differ += f.s[static_cast<size_t>(i)] != integrate_and_fire(x[static_cast<size_t>(i)], threshold);
    }
    EXPECT_EQ(differ, 0) << sigma;
  }
}

TEST(SpikeNeuron, ThresholdIsTheMeanOverK) {
  const std::vector<float> x = gaussian(4 * 1000, 2, 2);
  const Fired f = fire(x, 4, 2.5f);
  for (int64_t r = 0; r < 4; ++r) {
    double mean = 0;
    for (int64_t i = 0; i < 1000; ++i)
      mean += std::fabs(static_cast<double>(x[static_cast<size_t>(r * 1000 + i)])) / 1000;
    EXPECT_NEAR(f.rows[static_cast<size_t>(r)].threshold, mean / 2.5, 2e-7 * mean);
  }
}

TEST(SpikeNeuron, TiesGoToEvenAndNothingIsClipped) {
  // mean |x| = 3, k = 3: V_th = 1.
  const std::vector<float> x = {0.5f, 1.5f, -2.5f, -3.5f, 4.5f, -0.5f, 0.0f, 11.0f};
  const Fired f = fire(x, 1);
  EXPECT_EQ(f.rows[0].threshold, 1.0f);
  EXPECT_EQ(f.s, (std::vector<int32_t>{0, 2, -2, -4, 4, 0, 0, 11}));
  std::vector<float> spike(4096, 0.0f);
  spike[77] = -5.0f;
  EXPECT_EQ(fire(spike, 1).s[77], -3 * 4096);
}

TEST(SpikeNeuron, ThresholdIsHeldWithinItsLimits) {
  EXPECT_EQ(fire({0, 0, 0, 0}, 1).rows[0].threshold, 1e-5f);
  EXPECT_EQ(fire({1e-6f, -2e-5f, 0, 0}, 1).s, (std::vector<int32_t>{0, -2, 0, 0}));
  const Fired f = fire({6e4f, -6e4f, 1e5f, 0}, 1);
  EXPECT_EQ(f.rows[0].threshold, 1e4f);
  EXPECT_EQ(f.s, (std::vector<int32_t>{6, -6, 10, 0}));
  EXPECT_EQ(fire({2e13f, 0}, 1).s[0], 2000000000);
}

TEST(SpikeNeuron, FiguresOfARow) {
  const std::vector<float> x = gaussian(2 * 333, 1, 3);
  const Fired f = fire(x, 2);
  for (int64_t r = 0; r < 2; ++r) {
    int64_t total = 0, spikes = 0, silent = 0;
    int32_t most = 0;
    for (int64_t i = r * 333; i < (r + 1) * 333; ++i) {
      const int32_t magnitude = std::abs(f.s[static_cast<size_t>(i)]);
      total += magnitude, spikes += std::popcount(static_cast<uint32_t>(magnitude)), silent += magnitude == 0,
          most = std::max(most, magnitude);
    }
    const SpikeRow& row = f.rows[static_cast<size_t>(r)];
    EXPECT_EQ(row.total, total);
    EXPECT_EQ(row.spikes, spikes);
    EXPECT_EQ(row.silent, silent);
    EXPECT_EQ(row.most, most);
  }
}

TEST(SpikeNeuron, SameOnEveryIsaAndAnyThreads) {
  const std::vector<float> x = gaussian(9 * 1003, 1, 4);
  std::vector<Fired> all;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (isa > detected_isa()) continue;
    const ScopedIsa scoped(isa);
    for (int threads : {1, 3}) all.push_back(fire(x, 9, 3, threads));
  }
  for (const Fired& f : all) {
    EXPECT_EQ(f.s, all[0].s);
    for (size_t r = 0; r < 9; ++r) EXPECT_EQ(f.rows[r].threshold, all[0].rows[r].threshold);
  }
}

TEST(SpikeNeuron, Refusals) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_THROW(fire({1, inf, 0}, 1), BadInput);
  EXPECT_THROW(fire({1, std::numeric_limits<float>::quiet_NaN(), 0}, 1), BadInput);
  EXPECT_THROW(fire({1e20f, 0, 0}, 1), BadInput);
  EXPECT_THROW(fire({std::numeric_limits<float>::max(), std::numeric_limits<float>::max()}, 1), BadInput);
  EXPECT_THROW(fire({1, 2}, 1, 0), BadInput);
  EXPECT_THROW(fire({1, 2}, 1, inf), BadInput);
}

TEST(RoundToInt8, StepsOfTheLargestValueOfARow) {
  MemoryAccount memory;
  Context ctx(memory, 2);
  // Steps of 1 (amax 127), of 1e-5 (held there), of 1e4 (held there), and of none.
  std::vector<float> x = {127, 0.5f, -1.5f, 2.5f, 3e-5f, -1.4e-5f, 0, 1e-6f, 2e6f, -2e6f, 1e4f, 0, 0, 0, 0, 0};
  std::vector<int8_t> codes(16);
  std::vector<float> scales(4);
  round_to_int8(ctx, x.data(), 4, 4, codes.data(), scales.data());
  EXPECT_EQ(scales, (std::vector<float>{1, 1e-5f, 1e4f, 1e-5f}));
  EXPECT_EQ(codes, (std::vector<int8_t>{127, 0, -2, 2, 3, -1, 0, 0, 127, -128, 1, 0, 0, 0, 0, 0}));
  for (size_t i = 0; i < 16; ++i) EXPECT_EQ(x[i], static_cast<float>(codes[i]) * scales[i / 4]);

  std::vector<float> many = gaussian(300 * 65, 3, 5), same = many;
  round_to_int8(ctx, many.data(), 300, 65);
  Context one(memory, 1);
  round_to_int8(one, same.data(), 300, 65);
  EXPECT_EQ(many, same);
  std::vector<float> again = many;
  round_to_int8(ctx, again.data(), 300, 65);
  for (size_t i = 0; i < again.size(); ++i)
    EXPECT_NEAR(again[i], many[i], 1e-6 * std::fabs(many[i])) << "rounded values stay";
  many[65] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(round_to_int8(ctx, many.data(), 300, 65), BadInput);
}

}  // namespace
}  // namespace lacuna

#include "spike/spike_stats.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>

#include "spike/time_code.h"

namespace lacuna {
namespace {

struct Sample {
  std::vector<int32_t> counts;
  SpikeStats stats;
};

Sample gaussian(float k, int64_t rows, int64_t width, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.7f);
  std::vector<float> x(static_cast<size_t>(rows * width));
  for (float& v : x) v = normal(random);
  MemoryAccount memory;
  Context ctx(memory, 2);
  std::vector<SpikeRow> row(static_cast<size_t>(rows));
  Sample sample;
  sample.counts.resize(x.size());
  fire_neurons(ctx, x.data(), rows, width, k, sample.counts.data(), row.data());
  sample.stats.add({sample.counts.data(), row.data(), rows, width}, 10);
  return sample;
}

// What a Gaussian gives in the limit of wide rows: V_th = sigma * sqrt(2 / pi) / k, and s rounds.
double probability(int32_t s, double k) {
  const double threshold = std::sqrt(2 / 3.14159265358979323846) / k;
  const auto below = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  return below((s + 0.5) * threshold) - below((s - 0.5) * threshold);
}

// The report's figure 9 (69.15 / 19.30 / 9.69 / 1.85 %) is windows of 3 of 9 slots: Gaussian inputs give
// 69.42 / 19.07 / 10.24 / 1.27 % at k = 3.
TEST(SpikeStats, GaussianWindowsAreThoseOfTheReport) {
  const Sample s = gaussian(3, 500, 2000, 1);
  const double expected[] = {0.6942, 0.1907, 0.1024, 0.0127};
  const double n = static_cast<double>(SpikeStats::kWindows * s.stats.inputs);
  for (int i = 0; i < 4; ++i) {
    // Five standard deviations, the figures' own rounding, and rows whose mean |x| strays by 1 / sqrt(width).
    const double sampling = 5 * std::sqrt(expected[i] * (1 - expected[i]) / n);
    EXPECT_NEAR(s.stats.window_share(i), expected[i], sampling + 5e-5 + 2e-4) << i;
  }
  EXPECT_NEAR(s.stats.silent_window_share(), 0.6942, 5e-4);
  EXPECT_EQ(s.stats.beyond_slots, 0);
}

TEST(SpikeStats, GaussianSharesMatchTheirIntegrals) {
  for (const double k : {2.0, 3.0, 4.0}) {
    const Sample s = gaussian(static_cast<float>(k), 200, 4000, 2);
    double zero = probability(0, k), within = 0, popcount = 0, silent = 0;
    for (int32_t c = -200; c <= 200; ++c) {
      const double p = probability(c, k);
      const uint32_t magnitude = static_cast<uint32_t>(std::abs(c));
      if (magnitude <= 7) within += p;
      popcount += p * std::popcount(magnitude);
      for (int w = 0; w < 3; ++w) silent += p / 3 * ((magnitude >> 3 * w & 7u) == 0);
    }
    EXPECT_NEAR(s.stats.zero_count_share(), zero, 2e-3) << k;
    EXPECT_NEAR(s.stats.within_7_share(), within, 2e-3) << k;
    EXPECT_NEAR(s.stats.mean_popcount(), popcount, 5e-3) << k;
    EXPECT_NEAR(s.stats.silent_window_share(), silent, 2e-3) << k;
  }
  // Section 3.1's own figures at k = 3.
  EXPECT_NEAR(probability(0, 3), 0.106, 5e-4);
}

// Shares of slots against the codes themselves.
TEST(SpikeStats, SlotsAreThoseOfTheCodes) {
  const Sample s = gaussian(3, 4, 500, 3);
  const auto rate = [&](std::optional<int64_t> steps) {
    return firing_rate(encode_spikes(TimeCode::kBidirectional, s.counts, ZeroPoint::kNone, steps));
  };
  EXPECT_DOUBLE_EQ(s.stats.zero_slot_share_3(), 1 - rate(3));
  EXPECT_DOUBLE_EQ(s.stats.zero_slot_share_max(), 1 - rate(std::nullopt));
  EXPECT_EQ(s.stats.steps(), time_steps(TimeCode::kBidirectional, s.counts));
  // Windows of the nine-step code.
  const SpikeTrain train = encode_spikes(TimeCode::kBidirectional, s.counts, ZeroPoint::kNone, 9);
  std::array<int64_t, 4> windows{};
  for (int64_t i = 0; i < train.count; ++i)
    for (int w = 0; w < 3; ++w) {
      int fired = 0;
      for (int t = 3 * w; t < 3 * w + 3; ++t) fired += train.planes[static_cast<size_t>(t * train.count + i)] != 0;
      ++windows[static_cast<size_t>(fired)];
    }
  EXPECT_EQ(s.stats.windows, windows);
  EXPECT_EQ(s.stats.dense_macs, 4 * 500 * 10);
  EXPECT_EQ(s.stats.synaptic_ops, s.stats.spikes * 10);
}

TEST(SpikeStats, SumsAndLimits) {
  const int32_t counts[] = {0, 7, -8, 17, 512, 0};
  const SpikeRow rows[] = {{1, 8, 15, 4, 1}, {1, 512, 529, 3, 1}};
  SpikeStats s;
  EXPECT_EQ(s.zero_count_share(), 0);  // nothing seen
  s.add({counts, rows, 2, 3}, 5);
  EXPECT_EQ(s.zero, 2);
  EXPECT_EQ(s.within_7, 3);
  EXPECT_EQ(s.above_16, 2);
  EXPECT_EQ(s.beyond_slots, 1);
  EXPECT_EQ(s.low_spikes, 3 + 0 + 1 + 0);
  EXPECT_EQ(s.windows, (std::array<int64_t, 4>{13, 4, 0, 1}));
  EXPECT_EQ(s.steps(), 10);
  SpikeStats twice = s;
  twice += s;
  EXPECT_EQ(twice.inputs, 12);
  EXPECT_EQ(twice.most, 512);
  EXPECT_DOUBLE_EQ(twice.zero_count_share(), s.zero_count_share());
  // The report's arithmetic: 1.13 additions for each multiply-accumulate save 97.7 % and 85.2 %.
  SpikeStats report;
  report.dense_macs = 1000000;
  report.synaptic_ops = 1130000;
  const SpikeEnergy e = compute_energy(report);
  EXPECT_NEAR(1 - e.spike_joules / e.fp16_joules, 0.977, 5e-4);
  EXPECT_NEAR(1 - e.spike_joules / e.int8_joules, 0.852, 1e-3);
}

}  // namespace
}  // namespace lacuna

#include "spike/time_code.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <random>

#include "base/error.h"

namespace lacuna {
namespace {

std::vector<int> train_of(TimeCode code, int32_t s, std::optional<int64_t> steps = std::nullopt) {
  const SpikeTrain t = encode_spikes(code, {&s, 1}, ZeroPoint::kNone, steps);
  return {t.planes.begin(), t.planes.end()};
}

// The report's own examples.
TEST(TimeCode, Examples) {
  EXPECT_EQ(train_of(TimeCode::kBinary, 5), (std::vector<int>{1, 1, 1, 1, 1}));
  EXPECT_EQ(train_of(TimeCode::kTernary, -5), (std::vector<int>{-1, -1, -1, -1, -1}));
  EXPECT_EQ(train_of(TimeCode::kBitwise, 5), (std::vector<int>{1, 0, 1}));
  EXPECT_EQ(train_of(TimeCode::kBidirectional, -5), (std::vector<int>{-1, 0, -1}));
  EXPECT_EQ(train_of(TimeCode::kTwosComplement, -5), (std::vector<int>{1, 0, 1, 1}));
  EXPECT_EQ(train_of(TimeCode::kBinary, 0), std::vector<int>{});
  EXPECT_EQ(train_of(TimeCode::kBitwise, 0), std::vector<int>{0});
  EXPECT_EQ(train_of(TimeCode::kTwosComplement, 0), (std::vector<int>{0, 0}));
}

TEST(TimeCode, TooFewStepsTruncate) {
  EXPECT_EQ(train_of(TimeCode::kBinary, 5, 2), (std::vector<int>{1, 1}));
  EXPECT_EQ(train_of(TimeCode::kTernary, -5, 2), (std::vector<int>{-1, -1}));
  EXPECT_EQ(train_of(TimeCode::kBidirectional, -13, 3), (std::vector<int>{-1, 0, -1}));
  EXPECT_EQ(train_of(TimeCode::kTwosComplement, -5, 2), (std::vector<int>{1, 1}));
  EXPECT_EQ(train_of(TimeCode::kTwosComplement, -1, 6), (std::vector<int>{1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(train_of(TimeCode::kBitwise, 5, 0), std::vector<int>{});
}

std::vector<int32_t> random_counts(std::mt19937& random, int64_t n, int32_t low, int32_t high) {
  std::uniform_int_distribution<int32_t> value(low, high);
  std::vector<int32_t> v(static_cast<size_t>(n));
  for (int32_t& x : v) x = value(random);
  return v;
}

// Counts come back exactly, whatever their signs, with and without a zero point; spikes keep to their alphabet.
TEST(TimeCode, RoundTrip) {
  std::mt19937 random(1);
  for (const auto& [low, high] :
       std::vector<std::pair<int, int>>{{0, 0}, {0, 7}, {3, 40}, {-8, 7}, {-90, -2}, {-300, 579}}) {
    const std::vector<int32_t> s = random_counts(random, 67, low, high);
    const std::vector<int64_t> wide(s.begin(), s.end());
    for (TimeCode code : kTimeCodes)
      for (ZeroPoint zero : {ZeroPoint::kNone, ZeroPoint::kCentred}) {
        if (zero == ZeroPoint::kNone && !is_signed(code) && *std::min_element(s.begin(), s.end()) < 0) {
          EXPECT_THROW(encode_spikes(code, s, zero), BadInput);
          continue;
        }
        const SpikeTrain t = encode_spikes(code, s, zero);
        EXPECT_EQ(decoded_counts(t), wide) << time_code_name(code) << " " << low << " … " << high;
        const bool both_signs = code == TimeCode::kTernary || code == TimeCode::kBidirectional;
        for (int8_t spike : t.planes) ASSERT_TRUE(spike == 0 || spike == 1 || (both_signs && spike == -1));
        // One step more changes no count.
        EXPECT_EQ(decoded_counts(encode_spikes(code, s, zero, t.steps + 1)), wide);
      }
  }
}

TEST(TimeCode, ExtremeCounts) {
  for (int32_t s : {INT_MAX, INT_MIN, INT_MIN + 1}) {
    for (TimeCode code : {TimeCode::kBidirectional, TimeCode::kTwosComplement})
      EXPECT_EQ(decoded_counts(encode_spikes(code, {&s, 1})), std::vector<int64_t>{s});
  }
  const std::vector<int32_t> far = {INT_MIN, 5};
  EXPECT_THROW(encode_spikes(TimeCode::kBinary, far, ZeroPoint::kCentred), BadInput);
  const std::vector<int32_t> large = {INT_MAX, 1};
  EXPECT_THROW(encode_spikes(TimeCode::kTernary, large), BadInput);
  EXPECT_THROW(encode_spikes(TimeCode::kBitwise, large, ZeroPoint::kNone, 34), BadInput);
  EXPECT_THROW(encode_spikes(TimeCode::kBinary, large, ZeroPoint::kNone, -1), BadInput);
  EXPECT_THROW(parse_time_code("unary"), BadInput);
}

TEST(TimeCode, NoCounts) {
  for (TimeCode code : kTimeCodes) {
    const SpikeTrain t = encode_spikes(code, {}, ZeroPoint::kCentred);
    EXPECT_EQ(decoded_counts(t), std::vector<int64_t>{});
    EXPECT_EQ(firing_rate(t), 0);
  }
  EXPECT_EQ(slice_weights({}).bits, 0);
}

TEST(TimeCode, FiringRateCountsSpikesOfBothSigns) {
  const std::vector<int32_t> s = {-3, 0, 2};
  EXPECT_DOUBLE_EQ(firing_rate(encode_spikes(TimeCode::kBidirectional, s)), 3.0 / 6);
  EXPECT_DOUBLE_EQ(firing_rate(encode_spikes(TimeCode::kTernary, s)), 5.0 / 9);
}

TEST(TimeCode, ProductsAreExact) {
  std::mt19937 random(2);
  const int64_t m = 4, k = 33, n = 7;
  const std::vector<int32_t> w = random_counts(random, k * n, -194, 200);
  for (const auto& [low, high] : std::vector<std::pair<int, int>>{{0, 9}, {-8, 7}, {-300, -1}, {-40, 579}}) {
    const std::vector<int32_t> s = random_counts(random, m * k, low, high);
    std::vector<int64_t> expected(static_cast<size_t>(m * n), 0);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < k; ++c)
        for (int64_t j = 0; j < n; ++j) expected[i * n + j] += static_cast<int64_t>(s[i * k + c]) * w[c * n + j];
    for (TimeCode code : kTimeCodes)
      EXPECT_EQ(spike_matmul(encode_spikes(code, s, ZeroPoint::kCentred), m, k, w.data(), n), expected)
          << time_code_name(code);
  }
  EXPECT_THROW(spike_matmul(encode_spikes(TimeCode::kBitwise, {}), 1, 1, w.data(), n), BadInput);
}

TEST(TimeCode, BitSlicedWeights) {
  std::mt19937 random(3);
  for (const auto& [low, high] : std::vector<std::pair<int, int>>{{-194, 173}, {5, 5}, {2, 9}, {INT_MIN, INT_MAX}}) {
    const std::vector<int32_t> w = random_counts(random, 40, low, high);
    const BitSlicedWeights sliced = slice_weights(w);
    EXPECT_EQ(joined_weights(sliced), w);
    const auto [least, most] = std::minmax_element(w.begin(), w.end());
    EXPECT_EQ(sliced.bits,
              std::max(1, static_cast<int>(std::bit_width(static_cast<uint32_t>(int64_t{*most} - *least)))));
  }
}

}  // namespace
}  // namespace lacuna

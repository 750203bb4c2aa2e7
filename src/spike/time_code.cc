#include "spike/time_code.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "base/error.h"

namespace lacuna {
namespace {

// -2^31 and its sign take 33 bits; 2^31 spikes are 2 GiB of planes.
constexpr int64_t kMaxBits = 33, kMaxSpikes = std::numeric_limits<int32_t>::max();

uint64_t magnitude(int32_t s) { return static_cast<uint64_t>(s < 0 ? -static_cast<int64_t>(s) : s); }

uint64_t largest_magnitude(std::span<const int32_t> counts) {
  uint64_t most = 0;
  for (int32_t s : counts) most = std::max(most, magnitude(s));
  return most;
}

// Counts after the zero point is added, and the zero point itself.
std::vector<int32_t> shifted(TimeCode code, std::span<const int32_t> counts, ZeroPoint rule,
                             std::vector<int64_t>& zero) {
  std::vector<int32_t> out(counts.begin(), counts.end());
  zero.assign(counts.size(), 0);
  const int32_t least = counts.empty() ? 0 : *std::min_element(counts.begin(), counts.end());
  if (rule == ZeroPoint::kNone) return out;
  if (is_signed(code) && least >= 0) {
    for (size_t i = 0; i < out.size(); ++i) {
      zero[i] = -(static_cast<int64_t>(out[i]) / 2 + out[i] % 2);
      out[i] += static_cast<int32_t>(zero[i]);
    }
  } else if (!is_signed(code) && least < 0) {
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t sum = static_cast<int64_t>(out[i]) - least;
      if (sum > std::numeric_limits<int32_t>::max())
        throw BadInput("{} code: count {} less the least count {} passes 31 bits", time_code_name(code), out[i], least);
      zero[i] = -static_cast<int64_t>(least);
      out[i] = static_cast<int32_t>(sum);
    }
  }
  return out;
}

int8_t spike_at(TimeCode code, int32_t s, int64_t step, int64_t steps) {
  const int sign = s > 0 ? 1 : s < 0 ? -1 : 0;
  const int64_t shift = steps - 1 - step;
  switch (code) {
    case TimeCode::kBinary:
    case TimeCode::kTernary:
      return static_cast<int8_t>(step < static_cast<int64_t>(magnitude(s)) ? sign : 0);
    case TimeCode::kBitwise:
    case TimeCode::kBidirectional:
      return static_cast<int8_t>((magnitude(s) >> shift & 1) ? sign : 0);
    // An arithmetic shift: bits past 31 repeat the sign.
    case TimeCode::kTwosComplement:
      return static_cast<int8_t>(static_cast<int64_t>(s) >> shift & 1);
  }
  return 0;
}

int64_t step_weight(const SpikeTrain& t, int64_t step) {
  return is_bitwise(t.code) ? int64_t{1} << (t.steps - 1 - step) : 1;
}

}  // namespace

std::string_view time_code_name(TimeCode code) {
  switch (code) {
    case TimeCode::kBinary:
      return "binary";
    case TimeCode::kTernary:
      return "ternary";
    case TimeCode::kBitwise:
      return "bitwise";
    case TimeCode::kBidirectional:
      return "bidir";
    case TimeCode::kTwosComplement:
      return "twos";
  }
  return "?";
}

TimeCode parse_time_code(std::string_view name) {
  for (TimeCode code : kTimeCodes)
    if (time_code_name(code) == name) return code;
  throw BadInput("time code: found \"{}\", expected binary, ternary, bitwise, bidir or twos", name);
}

bool is_signed(TimeCode code) { return code != TimeCode::kBinary && code != TimeCode::kBitwise; }
bool is_bitwise(TimeCode code) { return code != TimeCode::kBinary && code != TimeCode::kTernary; }

int64_t time_steps(TimeCode code, std::span<const int32_t> counts) {
  const uint64_t most = largest_magnitude(counts);
  switch (code) {
    case TimeCode::kBinary:
    case TimeCode::kTernary:
      return static_cast<int64_t>(most);
    case TimeCode::kBitwise:
    case TimeCode::kBidirectional:
      return std::max<int64_t>(1, std::bit_width(most));  // ceil(log2(most + 1))
    case TimeCode::kTwosComplement:
      return std::max<int64_t>(2, std::bit_width(most) + 1);
  }
  return 0;
}

SpikeTrain encode_spikes(TimeCode code, std::span<const int32_t> counts, ZeroPoint zero, std::optional<int64_t> steps) {
  SpikeTrain train;
  train.code = code;
  train.count = static_cast<int64_t>(counts.size());
  const std::vector<int32_t> s = shifted(code, counts, zero, train.zero);
  if (!is_signed(code))
    for (size_t i = 0; i < s.size(); ++i)
      if (s[i] < 0)
        throw BadInput("{} code: count {} at index {} is negative; expected counts of 0 or more, or a zero point",
                       time_code_name(code), s[i], i);
  train.steps = steps ? *steps : time_steps(code, s);
  if (train.steps < 0 || (is_bitwise(code) && train.steps > kMaxBits))
    throw BadInput("{} code: found {} time steps, expected 0 to {}", time_code_name(code), train.steps,
                   is_bitwise(code) ? kMaxBits : kMaxSpikes);
  if (train.count > 0 && train.steps > kMaxSpikes / train.count)
    throw BadInput("{} code: {} time steps of {} neurons are more than {} spikes", time_code_name(code), train.steps,
                   train.count, kMaxSpikes);
  train.planes.resize(static_cast<size_t>(train.steps * train.count));
  int8_t* plane = train.planes.data();
  for (int64_t t = 0; t < train.steps; ++t, plane += train.count)
    for (int64_t i = 0; i < train.count; ++i) plane[i] = spike_at(code, s[static_cast<size_t>(i)], t, train.steps);
  if (code == TimeCode::kTwosComplement && train.steps > 0)
    for (size_t i = 0; i < s.size(); ++i)
      if (train.planes[i]) train.zero[i] += int64_t{1} << train.steps;
  return train;
}

std::vector<int64_t> decode_spikes(const SpikeTrain& train) {
  std::vector<int64_t> out(static_cast<size_t>(train.count), 0);
  const int8_t* plane = train.planes.data();
  for (int64_t t = 0; t < train.steps; ++t, plane += train.count) {
    const int64_t weight = step_weight(train, t);
    for (int64_t i = 0; i < train.count; ++i) out[static_cast<size_t>(i)] += weight * plane[i];
  }
  return out;
}

std::vector<int64_t> decoded_counts(const SpikeTrain& train) {
  std::vector<int64_t> out = decode_spikes(train);
  for (size_t i = 0; i < train.zero.size(); ++i) out[i] -= train.zero[i];
  return out;
}

double firing_rate(const SpikeTrain& train) {
  if (train.planes.empty()) return 0;
  int64_t spikes = 0;
  for (int8_t s : train.planes) spikes += s != 0;
  return static_cast<double>(spikes) / static_cast<double>(train.planes.size());
}

std::vector<int64_t> spike_matmul(const SpikeTrain& train, int64_t m, int64_t k, const int32_t* w, int64_t n) {
  if (m < 0 || k < 0 || n < 0 || m * k != train.count)
    throw BadInput("spike_matmul: a train of {} neurons is not [{}, {}]", train.count, m, k);
  std::vector<int64_t> y(static_cast<size_t>(m * n), 0);
  const int8_t* plane = train.planes.data();
  for (int64_t t = 0; t < train.steps; ++t, plane += train.count) {
    if (is_bitwise(train.code))
      for (int64_t& v : y) v *= 2;
    for (int64_t i = 0; i < m; ++i) {
      int64_t* row = y.data() + i * n;
      for (int64_t c = 0; c < k; ++c) {
        const int8_t spike = plane[i * k + c];
        if (spike == 0) continue;
        const int32_t* weights = w + c * n;
        for (int64_t j = 0; j < n; ++j) row[j] += spike > 0 ? weights[j] : -static_cast<int64_t>(weights[j]);
      }
    }
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < k; ++c) {
      const int64_t zero = train.zero.empty() ? 0 : train.zero[static_cast<size_t>(i * k + c)];
      if (zero == 0) continue;
      for (int64_t j = 0; j < n; ++j) y[static_cast<size_t>(i * n + j)] -= zero * w[c * n + j];
    }
  return y;
}

BitSlicedWeights slice_weights(std::span<const int32_t> weights) {
  BitSlicedWeights out;
  out.count = static_cast<int64_t>(weights.size());
  if (weights.empty()) return out;
  const auto [least, most] = std::minmax_element(weights.begin(), weights.end());
  out.zero = -static_cast<int64_t>(*least);
  const uint32_t range = static_cast<uint32_t>(static_cast<int64_t>(*most) - *least);
  out.bits = std::max(1, static_cast<int>(std::bit_width(range)));
  if (out.count > kMaxSpikes / out.bits)
    throw BadInput("slice_weights: {} weights in {} planes are too many", out.count, out.bits);
  out.planes.resize(static_cast<size_t>(out.bits * out.count));
  int8_t* plane = out.planes.data();
  for (int t = 0; t < out.bits; ++t, plane += out.count)
    for (int64_t i = 0; i < out.count; ++i)
      plane[i] = static_cast<int8_t>(
          static_cast<uint32_t>(weights[static_cast<size_t>(i)] + out.zero) >> (out.bits - 1 - t) & 1u);
  return out;
}

std::vector<int32_t> joined_weights(const BitSlicedWeights& sliced) {
  std::vector<int64_t> sum(static_cast<size_t>(sliced.count), 0);
  const int8_t* plane = sliced.planes.data();
  for (int t = 0; t < sliced.bits; ++t, plane += sliced.count)
    for (int64_t i = 0; i < sliced.count; ++i) sum[static_cast<size_t>(i)] = 2 * sum[static_cast<size_t>(i)] + plane[i];
  std::vector<int32_t> out(sum.size());
  for (size_t i = 0; i < sum.size(); ++i) out[i] = static_cast<int32_t>(sum[i] - sliced.zero);
  return out;
}

}  // namespace lacuna

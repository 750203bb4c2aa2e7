// spike: integer spike counts spread over time steps and back, and statistics of counts. The neuron and
// the spike-coded products are ops (kernels/spike_neuron.h, kernels/spike_linear.h).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace lacuna {

// How a count s becomes T spikes, one a time step (SpikingBrain report, section on time expansion).
enum class TimeCode : uint8_t {
  kBinary,          // {0, 1}, s ones and then zeros; s >= 0
  kTernary,         // {-1, 0, 1}, |s| times sign(s) and then zeros
  kBitwise,         // {0, 1}, bits of s, most significant first; s >= 0
  kBidirectional,   // {-1, 0, 1}, bits of |s| times sign(s), most significant first
  kTwosComplement,  // {0, 1}, bits of s mod 2^T, most significant first
};
inline constexpr TimeCode kTimeCodes[] = {TimeCode::kBinary, TimeCode::kTernary, TimeCode::kBitwise,
                                          TimeCode::kBidirectional, TimeCode::kTwosComplement};

// "binary", "ternary", "bitwise", "bidir", "twos".
std::string_view time_code_name(TimeCode code);
TimeCode parse_time_code(std::string_view name);
bool is_signed(TimeCode code);
// Spikes of one step weigh twice those of the next; else all weigh 1.
bool is_bitwise(TimeCode code);

// What may be added to counts before they are encoded.
enum class ZeroPoint : uint8_t {
  kNone,     // nothing: an unsigned code refuses negative counts
  kCentred,  // signed codes halve counts that are all >= 0 (s - ceil(s/2), each by its own zero point);
             // unsigned codes subtract the least count if any is negative
};

// Counts over T time steps.
struct SpikeTrain {
  TimeCode code = TimeCode::kBinary;
  int64_t steps = 0;           // T
  int64_t count = 0;           // neurons
  std::vector<int8_t> planes;  // [T, count]
  std::vector<int64_t> zero;   // [count]: what decode() yields beyond the count itself
};

// Time steps that hold all of `counts`: the largest count (binary, ternary), its bits (bitwise,
// bidirectional; at least 1), or those and a sign (two's complement; at least 2).
int64_t time_steps(TimeCode code, std::span<const int32_t> counts);

// Throws BadInput for a negative count in an unsigned code without a zero point, for steps that a bitwise
// code cannot have (above 33), and for trains of more than 2^31 - 1 spikes. With fewer steps than the counts
// need, unary codes stop early and bitwise ones drop the high bits. Two's complement adds 2^T to the zero
// point of every train whose first spike, the sign, is 1.
SpikeTrain encode_spikes(TimeCode code, std::span<const int32_t> counts, ZeroPoint zero = ZeroPoint::kNone,
                         std::optional<int64_t> steps = std::nullopt);

// Sum over t of weight(t) * spike: the count plus its zero point.
std::vector<int64_t> decode_spikes(const SpikeTrain& train);
// decode_spikes less the zero point: the counts that were encoded, if the steps sufficed.
std::vector<int64_t> decoded_counts(const SpikeTrain& train);

// Spikes of either sign a neuron and step; 0 for a train without steps.
double firing_rate(const SpikeTrain& train);

// y[m, n] = counts[m, k] · w[k, n], by additions and subtractions of rows of w at every spike, a shift
// between bitwise steps, and the zero points' share taken off at the end. train.count = m * k. Exact while
// sums stay within 63 bits.
std::vector<int64_t> spike_matmul(const SpikeTrain& train, int64_t m, int64_t k, const int32_t* w, int64_t n);

// Weights as bit planes: w + zero = sum over t of 2^(bits-1-t) * plane_t.
struct BitSlicedWeights {
  int bits = 0;
  int64_t count = 0;
  int64_t zero = 0;            // minus the least weight
  std::vector<int8_t> planes;  // [bits, count], most significant first
};
BitSlicedWeights slice_weights(std::span<const int32_t> weights);
std::vector<int32_t> joined_weights(const BitSlicedWeights& sliced);

}  // namespace lacuna

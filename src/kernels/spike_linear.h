#pragma once

#include "kernels/linear.h"
#include "kernels/spike_neuron.h"

namespace lacuna {

// Three ways to compute the same spike-coded linear layer
//   y[m, o] = V_th[m] * sum over groups g of scale[o, g] * (sum over i in g of s[m, i] * code[o, i]) + bias[o]
enum class SpikeArithmetic : uint8_t {
  kFake,     // floats: (s * V_th) · (code * scale), as the published W8ASpike code does
  kInteger,  // dense integer product of counts and codes
  kEvent,    // additions and subtractions of a column of codes at every spike, most significant time step
             // first, doubling the sum between steps; an input that is silent in all rows is never touched
};
std::string_view spike_arithmetic_name(SpikeArithmetic a);

// A code beyond +-127: what it has over that.
struct SpikeOverflow {
  int32_t input;
  int16_t output;  // within its tile
  int16_t value;
};

// Weights [out, in] as integer codes with a scale for every `group` inputs of an output. Codes are held in
// tiles of outputs, zero-padded, in the order in which the arithmetic reads them:
//   kInteger  [tile of 64][in / 4][64 outputs][4 inputs], code + 128 as u8
//   kEvent    [tile of 128][in][128 outputs], i8
struct SpikeWeight {
  SpikeArithmetic arithmetic = SpikeArithmetic::kInteger;
  int64_t out = 0, in = 0;
  int64_t group = 0;            // inputs that share a scale; `in`: one scale an output
  const float* bias = nullptr;  // [out] or null
  LinearWeight fake;            // kFake: all that there is
  const void* codes = nullptr;
  const float* scales = nullptr;            // [tiles][groups][tile]
  const SpikeOverflow* overflow = nullptr;  // by tile, then input
  // First entry of each (tile, group) (kInteger) or (tile, input) (kEvent), and the end; null: no overflow.
  const int64_t* overflow_start = nullptr;
  int64_t overflow_count = 0;
  int32_t most = 0;  // largest |code|
  int64_t groups() const { return (in + group - 1) / group; }
  // Bytes that one product with no silent inputs reads.
  size_t bytes() const;
};

// A SpikeWeight with its memory (MemoryTag::kWeights).
struct PackedSpikeWeight {
  SpikeWeight view;
  Buffer codes, scales, overflow, overflow_start;
};

// Packs codes [out, in] (int8 or int16, none is clipped) with scales [out, ceil(in / group)]. group must be a
// multiple of 4, or `in` or more. bias [out] (or null) must outlive the result; so must int8 codes with one
// scale an output in kFake, which are used where they are.
PackedSpikeWeight pack_spike_weight(Context& ctx, const Tensor& codes, const float* scales, int64_t group,
                                    const float* bias, SpikeArithmetic arithmetic);

// code = round_half_even(w / scale) for a weight [out, in] in f32, f16 or bf16 with scales [out, ceil(in / group)]:
// the group quantiser of W8ASpike, which does not clip. Throws BadInput for a scale that is not a positive
// finite number and for a code beyond 16 bits.
void quantize_groups(Context& ctx, const Tensor& weight, const float* scales, int64_t group, int16_t* codes);

// y[m, out] (=|+=) the layer above; rows of y are y_stride floats apart (0 = dense). kInteger and kEvent give
// the same bits on any one ISA: integer sums are exact (64 bits where 31 may not do) and scaled in one order.
// Neither the number of threads nor other rows change a row. Records OpKind::kSpike: macs are the dense
// products executed (kEvent: those of overflowing codes), synaptic_ops the additions executed for spikes,
// weight_bytes what was read.
void spike_linear(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float* y,
                  LinearMode mode = LinearMode::kStore, int64_t y_stride = 0);

}  // namespace lacuna

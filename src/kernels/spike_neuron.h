#pragma once

#include "kernels/context.h"

namespace lacuna {

// What one row of inputs fired, in figures.
struct SpikeRow {
  float threshold = 0;  // V_th: the value that one spike stands for
  int32_t most = 0;     // max |s|
  int64_t total = 0;    // sum of |s|
  int64_t spikes = 0;   // ones in the binary digits of all |s|
  int64_t silent = 0;   // inputs with s = 0
};

// Spike counts of m rows of k inputs, dense.
struct SpikeBatch {
  const int32_t* counts = nullptr;  // s [m, k]
  const SpikeRow* rows = nullptr;   // [m]
  int64_t m = 0, k = 0;
};

// The integrate-and-fire neuron without leak, run to the end of its time window at once (SpikingBrain
// report, "adaptive-threshold spiking"): for every row
//   V_th = mean(|x|) / k, held within [1e-5, 1e4];   s = round_half_even(x / V_th), signed, not clipped;
// s * V_th stands for x. The mean is summed in double in an order that is the same on every ISA, so counts
// are too. x [m, width], rows x_stride floats apart (0 = dense); counts [m, width]; rows [m].
// Throws BadInput for k that is not a positive number, for a value that is not finite, and for a count
// beyond 31 bits.
void fire_neurons(Context& ctx, const float* x, int64_t m, int64_t width, float k, int32_t* counts, SpikeRow* rows,
                  int64_t x_stride = 0);

// Every row x [m, d] to the nearest of 255 steps, in place: scale = max|x| / 127 held within [1e-5, 1e4],
// code = round_half_even(x / scale) held within [-128, 127], x = code * scale. codes [m, d] and scales [m] may
// be null. Throws BadInput for a value that is not finite.
void round_to_int8(Context& ctx, float* x, int64_t m, int64_t d, int8_t* codes = nullptr, float* scales = nullptr);

}  // namespace lacuna

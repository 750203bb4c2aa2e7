#pragma once

#include <initializer_list>

#include "kernels/spike_linear.h"
#include "models/spike_coding.h"

namespace lacuna {

struct LayerCall;

// A linear layer of a model: a dense weight, or one that takes spike counts.
struct Projection {
  LinearWeight dense;                  // without spikes: the weight
  const SpikeWeight* spike = nullptr;  // with spikes: the weight; a WeightBinder owns it
  Projection() = default;
  Projection(const LinearWeight& w) : dense(w) {}  // NOLINT: a dense weight is a projection
  explicit operator bool() const { return spike || dense.weight; }
  int64_t out() const { return spike ? spike->out : dense.out(); }
  int64_t in() const { return spike ? spike->in : dense.in(); }
  // Of the weights as held.
  DType dtype() const;
};
size_t projection_bytes(const Projection& p);

struct ProjectionOutput {
  const Projection* to;
  float* y;  // [rows, out]
};

// Each y (=|+=) its projection of x [call.row_count, in], all of one input. With k > 0 the input is spike-coded
// once for all of them, and observers that want to are shown its counts. Uses the activation slots
// kSpikeCounts, kSpikeRows and kSpikeValues. Throws CorruptData for activations that are not finite.
void project(Context& ctx, const LayerCall& call, SpikeSite site, float k, const float* x,
             std::initializer_list<ProjectionOutput> outputs, LinearMode mode = LinearMode::kStore);

// What W8ASpike does to a window layer's attention operands, all after RoPE: queries q [rows, heads, d] become
// s * V_th with a threshold a head, keys and values [rows, kv_heads, d] the nearest of 255 steps of amax / 127
// a head. The published code rounds keys and values each time they are read from a cache that holds them
// unrounded; a row's codes depend on nothing but the row, so that rounding them once, on their way into the
// cache, gives the same numbers (in an f32 cache; in an int8 one, whose scale is the same, to rounding of that).
void code_attention(Context& ctx, const LayerCall& call, float k, float* q, int heads, float* keys, float* values,
                    int kv_heads, int64_t d);

}  // namespace lacuna

#pragma once

#include <string>

#include "models/attention_block.h"
#include "models/weights.h"

namespace lacuna {

// SwiGLU: down(silu(gate x) * up x).
struct FeedForward {
  Projection gate, up, down;      // [F, D], [F, D], [D, F]
  float input_k = 0, down_k = 0;  // > 0: x, and what down reads, are spike-coded
};

// `at`.gate_proj, .up_proj and .down_proj, with biases if `bias`.
FeedForward bind_feed_forward(WeightBinder& weights, const std::string& at, int64_t hidden, int64_t intermediate,
                              const SpikeCoding& coding = {}, const LayerSpikes& spikes = {}, bool bias = false);

// out [M, D] (=|+=) the feed-forward of x [M, D], M = call.row_count. Uses the activation slots kGate and kUp.
void feed_forward(Context& ctx, const LayerCall& call, const FeedForward& w, const float* x, float* out,
                  LinearMode mode);

// Bytes that it reads for one token or many.
size_t feed_forward_bytes(const FeedForward& w);

}  // namespace lacuna

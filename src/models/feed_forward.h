#pragma once

#include <string>

#include "models/weights.h"

namespace lacuna {

// SwiGLU: down(silu(gate x) * up x).
struct FeedForward {
  LinearWeight gate, up, down;  // [F, D], [F, D], [D, F]
};

// `at`.gate_proj, .up_proj and .down_proj, without biases.
FeedForward bind_feed_forward(WeightBinder& weights, const std::string& at, int64_t hidden, int64_t intermediate);

// out [M, D] (=|+=) the feed-forward of x [M, D]. Uses the activation slots kGate and kUp.
void feed_forward(Context& ctx, const FeedForward& w, const float* x, int64_t m, float* out, LinearMode mode);

}  // namespace lacuna

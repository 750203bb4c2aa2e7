#include "models/feed_forward.h"

#include "kernels/elementwise.h"

namespace lacuna {

FeedForward bind_feed_forward(WeightBinder& weights, const std::string& at, int64_t hidden, int64_t intermediate) {
  return {weights.linear(at + ".gate_proj", intermediate, hidden, false),
          weights.linear(at + ".up_proj", intermediate, hidden, false),
          weights.linear(at + ".down_proj", hidden, intermediate, false)};
}

void feed_forward(Context& ctx, const FeedForward& w, const float* x, int64_t m, float* out, LinearMode mode) {
  const int64_t f = w.gate.out();
  float* gate = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(m * f));  // [M, F]
  float* up = ctx.activation(ActivationSlot::kUp, static_cast<size_t>(m * f));
  linear(ctx, w.gate, x, m, gate);
  linear(ctx, w.up, x, m, up);
  silu_mul(ctx, gate, up, m, f, gate);
  linear(ctx, w.down, gate, m, out, mode);
}

}  // namespace lacuna

#include "models/feed_forward.h"

#include "kernels/elementwise.h"

namespace lacuna {

FeedForward bind_feed_forward(WeightBinder& weights, const std::string& at, int64_t hidden, int64_t intermediate,
                              const SpikeCoding& coding, const LayerSpikes& spikes, bool bias) {
  FeedForward w;
  w.input_k = spikes.of(SpikeSite::kMlpIn);
  w.down_k = spikes.of(SpikeSite::kDownIn);
  w.gate = weights.projection(at + ".gate_proj", intermediate, hidden, bias, w.input_k, coding);
  w.up = weights.projection(at + ".up_proj", intermediate, hidden, bias, w.input_k, coding);
  w.down = weights.projection(at + ".down_proj", hidden, intermediate, bias, w.down_k, coding);
  return w;
}

void feed_forward(Context& ctx, const LayerCall& call, const FeedForward& w, const float* x, float* out,
                  LinearMode mode) {
  const int64_t m = call.row_count, f = w.gate.out();
  float* gate = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(m * f));  // [M, F]
  float* up = ctx.activation(ActivationSlot::kUp, static_cast<size_t>(m * f));
  project(ctx, call, SpikeSite::kMlpIn, w.input_k, x, {{&w.gate, gate}, {&w.up, up}});
  silu_mul(ctx, gate, up, m, f, gate);
  project(ctx, call, SpikeSite::kDownIn, w.down_k, gate, {{&w.down, out}}, mode);
}

size_t feed_forward_bytes(const FeedForward& w) {
  return projection_bytes(w.gate) + projection_bytes(w.up) + projection_bytes(w.down);
}

}  // namespace lacuna

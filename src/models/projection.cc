#include "models/projection.h"

#include "kernels/elementwise.h"
#include "models/attention_block.h"
#include "models/weights.h"

namespace lacuna {
namespace {

// The counts of `rows` rows of `width` values, in activation memory.
SpikeBatch fire(Context& ctx, const LayerCall& call, SpikeSite site, float k, const float* x, int64_t rows,
                int64_t width) {
  auto* counts =
      reinterpret_cast<int32_t*>(ctx.activation(ActivationSlot::kSpikeCounts, static_cast<size_t>(rows * width)));
  auto* row = reinterpret_cast<SpikeRow*>(
      ctx.activation(ActivationSlot::kSpikeRows, static_cast<size_t>(rows) * sizeof(SpikeRow) / sizeof(float)));
  try {
    fire_neurons(ctx, x, rows, width, k, counts, row);
  } catch (const BadInput& error) {
    // k was checked when the model was loaded: only the activations can be at fault, and only through weights.
    throw CorruptData("layer {}, {}: the activations cannot be spike-coded with these weights ({})", call.layer,
                      spike_site_name(site), error.what());
  }
  return {counts, row, rows, width};
}

// To every observer the rows of its sequence; `heads` rows a token.
void show_spikes(const LayerCall& call, SpikeSite site, const SpikeBatch& x, int64_t heads, int64_t fan_out) {
  for (size_t i = 0; i < call.rows.size(); ++i) {
    if (!call.observers[i] || !call.observers[i]->wants_spikes()) continue;
    const BatchRows& r = call.rows[i];
    const SpikeBatch part{x.counts + r.first_row * heads * x.k, x.rows + r.first_row * heads, r.tokens * heads, x.k};
    call.observers[i]->on_spikes({call.layer, site, call.first_token, r.tokens, part, fan_out});
  }
}

}  // namespace

DType Projection::dtype() const {
  if (!spike) return dense.weight.dtype;
  return spike->arithmetic == SpikeArithmetic::kFake ? spike->fake.weight.dtype : DType::kI8;
}

size_t projection_bytes(const Projection& p) {
  return p.spike ? p.spike->bytes() : p.dense.weight ? linear_bytes(p.dense) : 0;
}

void project(Context& ctx, const LayerCall& call, SpikeSite site, float k, const float* x,
             std::initializer_list<ProjectionOutput> outputs, LinearMode mode) {
  SpikeBatch batch;
  int64_t fan_out = 0;
  for (const ProjectionOutput& o : outputs) {
    if (!o.to->spike) {
      linear(ctx, o.to->dense, x, call.row_count, o.y, mode);
      continue;
    }
    if (!batch.counts) batch = fire(ctx, call, site, k, x, call.row_count, o.to->in());
    spike_linear(ctx, *o.to->spike, batch, o.y, mode);
    fan_out += o.to->out();
  }
  if (batch.counts) show_spikes(call, site, batch, 1, fan_out);
}

void code_attention(Context& ctx, const LayerCall& call, float k, float* q, int heads, float* keys, float* values,
                    int kv_heads, int64_t d) {
  const SpikeBatch s = fire(ctx, call, SpikeSite::kQuery, k, q, call.row_count * heads, d);
  for (int64_t r = 0; r < s.m; ++r)
    for (int64_t i = r * d; i < (r + 1) * d; ++i) q[i] = static_cast<float>(s.counts[i]) * s.rows[r].threshold;
  // Queries meet keys in the attention op, not in a product whose outputs could be counted here.
  show_spikes(call, SpikeSite::kQuery, s, heads, 0);
  try {
    round_to_int8(ctx, keys, call.row_count * kv_heads, d);
    round_to_int8(ctx, values, call.row_count * kv_heads, d);
  } catch (const BadInput& error) {
    throw CorruptData("layer {}: keys or values are not finite with these weights ({})", call.layer, error.what());
  }
}

}  // namespace lacuna

#include "models/attention_block.h"

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "kernels/elementwise.h"

namespace lacuna {
namespace {

// Keys that queries of this call see, themselves included; 0 = all. A call starts its sequence if its first
// token stands at position 0; `first_token` is the chunk's offset in the call.
int64_t visible_keys(const AttentionWeights& w, const LayerCall& call, const BatchRows& r) {
  const bool starts = r.first_position == call.first_token;
  return starts && w.start_window > 0 ? w.start_window : w.layer.window;
}

}  // namespace

void LayerCall::show(const char* name, const float* data, int64_t width) const {
  for (size_t i = 0; i < rows.size(); ++i)
    if (observers[i] && observers[i]->wants_tensors())
      observers[i]->on_tensor({name, layer, first_token, rows[i].tokens, width, data + rows[i].first_row * width});
}

AttentionBlock::Projected AttentionBlock::project_inputs(Context& ctx, const LayerCall& call, const AttentionWeights& w,
                                                         const float* normed) {
  const AttentionLayer& l = w.layer;
  const int64_t m = call.row_count, d = l.head_dim, qs = l.query_heads * d, ks = l.kv_heads * d;
  float* q = ctx.activation(ActivationSlot::kQuery, static_cast<size_t>(m * qs));
  float* k = ctx.activation(ActivationSlot::kKey, static_cast<size_t>(m * ks));
  float* v = ctx.activation(ActivationSlot::kValue, static_cast<size_t>(m * ks));
  float* mixed = ctx.activation(ActivationSlot::kMixed, static_cast<size_t>(m * qs));

  project(ctx, call, SpikeSite::kAttnIn, w.spikes.of(SpikeSite::kAttnIn), normed, {{&w.q, q}, {&w.k, k}, {&w.v, v}});
  if (w.q_norm) {
    rms_norm(ctx, q, m * l.query_heads, d, w.q_norm, w.norm_eps, q);
    rms_norm(ctx, k, m * l.kv_heads, d, w.k_norm, w.norm_eps, k);
  }
  return {q, k, v, mixed};
}

void AttentionBlock::project_output(Context& ctx, const LayerCall& call, const AttentionWeights& w, float* mixed,
                                    float* out, LinearMode mode) {
  if (w.mixed_norm)
    rms_norm(ctx, mixed, call.row_count * w.layer.query_heads, w.layer.head_dim, w.mixed_norm, w.norm_eps, mixed);
  const Projection output = w.output ? w.output : Projection(w.layer.output);
  project(ctx, call, SpikeSite::kOIn, w.spikes.of(SpikeSite::kOIn), mixed, {{&output, out}}, mode);
}

void AttentionBlock::forward(Context& ctx, const LayerCall& call, const AttentionWeights& w, const float* normed,
                             float* out, LinearMode mode) {
  const AttentionLayer& l = w.layer;
  const int64_t m = call.row_count, d = l.head_dim, qs = l.query_heads * d, ks = l.kv_heads * d;
  const auto [q, k, v, mixed] = project_inputs(ctx, call, w, normed);
  bool raw = false;
  for (const LayerObserver* o : call.observers) raw = raw || (o && o->wants_raw_queries());
  float* q_raw = nullptr;
  if (raw) {
    q_raw = ctx.activation(ActivationSlot::kRawQuery, static_cast<size_t>(m * qs));
    std::memcpy(q_raw, q, static_cast<size_t>(m * qs) * sizeof(float));
  }
  if (w.rotary) rotate(ctx, call, l, q, k);
  if (w.spikes.query_k > 0) code_attention(ctx, call, w.spikes.query_k, q, l.query_heads, k, v, l.kv_heads, d);

  float* lse = w.sinks ? ctx.activation(ActivationSlot::kLse, static_cast<size_t>(3 * m * l.query_heads)) : nullptr;
  sequences_.resize(call.rows.size());
  for (size_t i = 0; i < call.rows.size(); ++i) {
    const BatchRows& r = call.rows[i];
    r.state->kv.append(ctx, call.layer, k + r.first_row * ks, v + r.first_row * ks, r.tokens, r.first_position);
    sequences_[i] = {q + r.first_row * qs, mixed + r.first_row * qs, r.tokens, r.first_position,
                     r.state->kv.views(call.layer), lse ? lse + r.first_row * l.query_heads : nullptr};
  }
  attend(ctx, call, w);
  const float* share = w.sinks ? add_sinks(ctx, call, w, {q, k, v, mixed}) : nullptr;  // [M, H]
  call.show("q", q, qs);
  call.show("k", k, ks);
  call.show("v", v, ks);
  call.show("o", mixed, qs);
  for (size_t i = 0; i < call.rows.size(); ++i) {
    const BatchRows& r = call.rows[i];
    if (call.observers[i])
      call.observers[i]->on_chunk(
          {call.layer, call.first_token, r.tokens, call.call_tokens, r.first_position,
           raw ? q_raw + r.first_row * qs : nullptr, q + r.first_row * qs, mixed + r.first_row * qs,
           share ? share + r.first_row * l.query_heads : nullptr},
          *r.state);
    // The next query of this call sees positions > next - window; whole pages before that are dead.
    const int64_t window = visible_keys(w, call, r);
    if (window > 0) r.state->kv.drop_before(call.layer, r.first_position + r.tokens - window + 1);
  }
  project_output(ctx, call, w, mixed, out, mode);
}

// Returns the cache's share of each row's probability [M, H].
const float* AttentionBlock::add_sinks(Context& ctx, const LayerCall& call, const AttentionWeights& w, const Projected& p) {
  const AttentionLayer& l = w.layer;
  const int64_t qs = int64_t{l.query_heads} * l.head_dim, rows = call.row_count * l.query_heads;
  float* lse = ctx.activation(ActivationSlot::kLse, static_cast<size_t>(3 * rows));  // the cache's, the sinks', shares
  float* mixed = ctx.activation(ActivationSlot::kSinkMixed, static_cast<size_t>(call.row_count * qs));
  // A sequence of its own for each, so that a result does not depend on who else is in the batch.
  for (size_t i = 0; i < call.rows.size(); ++i) {
    const BatchRows& r = call.rows[i];
    sequences_[i] = {p.q + r.first_row * qs, mixed + r.first_row * qs, r.tokens, 0, w.sinks->heads.data(),
                     lse + rows + r.first_row * l.query_heads};
  }
  const AttentionShape shape{l.query_heads, l.kv_heads, l.scale, 0, 0, 0, false};
  attention(ctx, w.sinks->layout, shape, sequences_);
  merge_attention(ctx, rows, l.head_dim, p.mixed, lse, mixed, lse + rows, lse + 2 * rows);
  return lse + 2 * rows;
}

void AttentionBlock::forward_sinks(Context& ctx, const AttentionWeights& w, SinkKeys& sinks,
                                   std::span<const float> positions, const float* normed, float* out) {
  const AttentionLayer& l = w.layer;
  const int64_t m = sinks.layout.page_slots, half = l.head_dim / 2;
  const LayerCall call{.row_count = m, .call_tokens = m};
  const Projected p = project_inputs(ctx, call, w, normed);
  if (w.rotary) {
    LACUNA_CHECK(static_cast<int64_t>(positions.size()) == m);
    float* cos = ctx.activation(ActivationSlot::kCos, static_cast<size_t>(m * half));
    float* sin = ctx.activation(ActivationSlot::kSin, static_cast<size_t>(m * half));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < half; ++j) {
        const double angle = positions[static_cast<size_t>(i)] * l.inv_freq[static_cast<size_t>(j)];
        cos[i * half + j] = static_cast<float>(std::cos(angle)) * l.rope_factor;
        sin[i * half + j] = static_cast<float>(std::sin(angle)) * l.rope_factor;
      }
    rope(ctx, p.q, m, l.query_heads, l.head_dim, cos, sin);
    rope(ctx, p.k, m, l.kv_heads, l.head_dim, cos, sin);
  }
  kv_append(ctx, sinks.layout, sinks.heads.data(), l.kv_heads, p.k, p.v, m, 0);
  for (KvHeadView& head : sinks.heads) head.length = m;
  const AttentionSequence sequence{p.q, p.mixed, m, 0, sinks.heads.data()};
  attention(ctx, sinks.layout, {l.query_heads, l.kv_heads, l.scale, 0, 0, 0, false}, {&sequence, 1});
  project_output(ctx, call, w, p.mixed, out, LinearMode::kStore);
}

void AttentionBlock::attend(Context& ctx, const LayerCall& call, const AttentionWeights& w) {
  const KvLayout& layout = call.rows[0].state->kv.layout(call.layer);
  AttentionShape shape{w.layer.query_heads, w.layer.kv_heads, w.layer.scale, 0, 0, 0};
  // One op for neighbours of the same window: all of a decode batch, whose one-token calls never start
  // with more tokens than any window shows.
  for (size_t begin = 0, end; begin < call.rows.size(); begin = end) {
    shape.window = visible_keys(w, call, call.rows[begin]);
    for (end = begin + 1; end < call.rows.size(); ++end)
      if (visible_keys(w, call, call.rows[end]) != shape.window) break;
    attention(ctx, layout, shape, std::span(sequences_).subspan(begin, end - begin));
  }
}

void AttentionBlock::rotate(Context& ctx, const LayerCall& call, const AttentionLayer& l, float* q, float* k) {
  const int64_t half = l.head_dim / 2;
  RopeTable::Rows table;
  if (call.rows.size() == 1) {
    const BatchRows& r = call.rows[0];
    table = rope_.rows(ctx, r.first_position, r.tokens, r.sequence_length);
  } else {
    // Sequences of a batch stand at unrelated positions: gather their rows.
    float* cos = ctx.activation(ActivationSlot::kCos, static_cast<size_t>(call.row_count * half));
    float* sin = ctx.activation(ActivationSlot::kSin, static_cast<size_t>(call.row_count * half));
    for (const BatchRows& r : call.rows) {
      const RopeTable::Rows part = rope_.rows(ctx, r.first_position, r.tokens, r.sequence_length);
      const size_t bytes = static_cast<size_t>(r.tokens * half) * sizeof(float);
      std::memcpy(cos + r.first_row * half, part.cos, bytes);
      std::memcpy(sin + r.first_row * half, part.sin, bytes);
    }
    table = {cos, sin};
  }
  rope(ctx, q, call.row_count, l.query_heads, l.head_dim, table.cos, table.sin);
  rope(ctx, k, call.row_count, l.kv_heads, l.head_dim, table.cos, table.sin);
}

}  // namespace lacuna

#pragma once

#include <span>
#include <vector>

#include "models/model.h"
#include "models/projection.h"
#include "models/rope_table.h"

namespace lacuna {

// Keys and values that every query of a layer sees beside the cache's: no causality, no window, no eviction.
// The model owns them, one page a KV head; sequences share them.
struct SinkKeys {
  KvLayout layout;
  std::vector<std::byte*> pages;  // [G]
  std::vector<KvHeadView> heads;  // [G]
};

// One softmax-attention layer's parameters.
struct AttentionWeights {
  Projection q, k, v;             // [H*d, D], [G*d, D], [G*d, D]
  const float* q_norm = nullptr;  // [d], over each head; both or neither
  const float* k_norm = nullptr;
  float norm_eps = 0;
  AttentionLayer layer;  // heads, window, scale, o_proj
  Projection output;     // o_proj of spike counts; none: layer.output
  LayerSpikes spikes;
  int64_t start_window = 0;  // window in a call that starts a sequence; 0 = layer.window
  bool rotary = true;              // rotary embedding of q and k
  const SinkKeys* sinks = nullptr;
  const float* mixed_norm = nullptr;  // [d], over each head's mixed values before o_proj
};

// What a model is asked to run: one layer over `row_count` rows, some of each sequence.
// Model::forward_layer's arguments, but for hidden.
struct LayerCall {
  int layer = 0;
  int64_t row_count = 0;
  std::span<const BatchRows> rows;
  std::span<LayerObserver* const> observers;
  int64_t first_token = 0;
  int64_t call_tokens = 0;

  // `name` [row_count, width] of this layer, to every observer that wants it.
  void show(const char* name, const float* data, int64_t width) const;
};

// Softmax attention from normed rows to o_proj's output: projections, q/k norm, rotary embedding, append
// to the KV cache, attention, taps for observers, and freeing what no later query can see. Shared by every
// architecture that has such layers, whole or as one branch of a layer. One for a model: it holds the
// rotary tables and the buffers that decode reuses.
class AttentionBlock {
 public:
  AttentionBlock(const RopeConfig& rope, int head_dim, int64_t max_positions) : rope_(rope, head_dim, max_positions) {}

  // out [M, D] (=|+=) attention of normed [M, D]. Uses the activation slots kQuery, kRawQuery, kKey, kValue,
  // kMixed, kCos, kSin, kSinkMixed and kLse; `normed` and `out` may be any others.
  void forward(Context& ctx, const LayerCall& call, const AttentionWeights& w, const float* normed, float* out,
               LinearMode mode);

  // The sinks' own pass through the layer: out [M, D] = attention of the M sinks normed [M, D] to each other
  // without causality; their keys and values fill `sinks`, whose views are empty. `positions` [M] rotate them.
  void forward_sinks(Context& ctx, const AttentionWeights& w, SinkKeys& sinks, std::span<const float> positions,
                     const float* normed, float* out);

  std::span<const float> inv_freq() const { return rope_.inv_freq(); }
  float rope_factor() const { return rope_.factor(); }

 private:
  // Queries, keys and values of one call, in their activation slots.
  struct Projected {
    float *q, *k, *v, *mixed;  // [M, H, d], [M, G, d], [M, G, d], [M, H, d]
  };
  Projected project_inputs(Context& ctx, const LayerCall& call, const AttentionWeights& w, const float* normed);
  void project_output(Context& ctx, const LayerCall& call, const AttentionWeights& w, float* mixed, float* out,
                      LinearMode mode);
  const float* add_sinks(Context& ctx, const LayerCall& call, const AttentionWeights& w, const Projected& p);
  void rotate(Context& ctx, const LayerCall& call, const AttentionLayer& l, float* q, float* k);
  void attend(Context& ctx, const LayerCall& call, const AttentionWeights& w);

  RopeTable rope_;
  std::vector<AttentionSequence> sequences_;  // reused: decode allocates nothing
};

}  // namespace lacuna

#pragma once

#include "models/model.h"

namespace lacuna {

struct PrefillOptions {
  int64_t chunk = 512;                          // tokens of activations at a time
  std::function<void(int64_t done, int64_t total)> progress;  // units: layer-tokens
  std::function<bool()> cancelled;              // polled between chunks; true throws Cancelled
};

// Runs ids through the model in activation chunks. With an observer layer by layer, every token through layer l
// before layer l + 1, so that a layer is whole when on_layer_end sees it; that holds the residual stream of the
// whole call. Without one chunk by chunk, which holds a chunk of it, and gives the same bits. Appends to `state` and advances its position. last_logits [V] may be null;
// all_logits [n, V] may be null. The observer is called as model.h says. Throws BadInput for ids out of
// range or an empty list.
void prefill(Context& ctx, Model& model, SequenceState& state, std::span<const int32_t> ids, LayerObserver* observer,
             const PrefillOptions& options, float* last_logits, float* all_logits = nullptr);

// One token for each of several independent sequences, of any lengths: logits [count, V].
// observers: empty, or one (or null) a sequence.
void decode_step(Context& ctx, Model& model, std::span<SequenceState* const> states, std::span<const int32_t> ids,
                 float* logits, std::span<LayerObserver* const> observers = {});

}  // namespace lacuna

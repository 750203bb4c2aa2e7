#include "models/forward.h"

#include <algorithm>
#include <cstring>

namespace lacuna {
namespace {

void check_ids(const Model& model, std::span<const int32_t> ids) {
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= model.info().vocab)
      throw BadInput("token id {} at index {} is outside the vocabulary of {} entries", ids[i], i, model.info().vocab);
}

}  // namespace

void prefill(Context& ctx, Model& model, SequenceState& state, std::span<const int32_t> ids, LayerObserver* observer,
             const PrefillOptions& options, float* last_logits, float* all_logits) {
  if (ids.empty()) throw BadInput("the prompt has no tokens; at least 1 is needed");
  check_ids(model, ids);
  const int64_t n = static_cast<int64_t>(ids.size());
  const int64_t d = model.info().hidden;
  const int64_t vocab = model.info().vocab;
  const int64_t chunk = std::clamp<int64_t>(options.chunk, 1, n);
  const int layers = model.info().layers;
  const bool show_hidden = observer && observer->wants_hidden();
  const int64_t first_position = state.next_position;
  int64_t done = 0;  // layer-tokens

  const auto run_layer = [&](int layer, int64_t t, int64_t rows, float* h) {
    if (options.cancelled && options.cancelled())
      throw Cancelled("stopped during prefill, at layer {} of {}, token {} of {}", layer, layers, t, n);
    const BatchRows batch{&state, 0, rows, first_position + t, first_position + n};
    model.forward_layer(ctx, layer, h, rows, {&batch, 1}, {&observer, 1}, t, n);
    done += rows;
    if (options.progress) options.progress(done, layers * n);
  };
  // Final norm and heads of a chunk that is through all layers.
  const auto finish_chunk = [&](int64_t t, int64_t rows, const float* h) {
    if (all_logits || show_hidden) {
      float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(rows * d));
      model.final_norm(ctx, h, rows, normed);
      if (show_hidden) observer->on_hidden(layers - 1, t, rows, normed);
      if (all_logits) model.head(ctx, normed, rows, all_logits + t * vocab);
    }
    if (last_logits && t + rows == n) {
      float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(d));
      model.final_norm(ctx, h + (rows - 1) * d, 1, normed);
      model.head(ctx, normed, 1, last_logits);
    }
  };

  if (!observer) {
    // Nobody waits for the end of a layer: a chunk goes through all of them, and only its own rows of the residual
    // stream exist. Every product has the same rows as in the other order, and so the same bits.
    Buffer hidden(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(chunk * d) * sizeof(float));
    float* h = hidden.as<float>();
    for (int64_t t = 0; t < n; t += chunk) {
      const int64_t rows = std::min(chunk, n - t);
      model.embed(ctx, ids.subspan(static_cast<size_t>(t), static_cast<size_t>(rows)), h);
      for (int layer = 0; layer < layers; ++layer) run_layer(layer, t, rows, h);
      finish_chunk(t, rows, h);
    }
    state.next_position += n;
    return;
  }

  // The residual stream of the whole prompt: what layer-major order costs, n * D floats.
  Buffer hidden(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(n * d) * sizeof(float));
  float* h = hidden.as<float>();
  for (int64_t t = 0; t < n; t += chunk) {
    const int64_t rows = std::min(chunk, n - t);
    model.embed(ctx, ids.subspan(static_cast<size_t>(t), static_cast<size_t>(rows)), h + t * d);
    if (show_hidden) observer->on_hidden(-1, t, rows, h + t * d);
  }
  for (int layer = 0; layer < layers; ++layer) {
    for (int64_t t = 0; t < n; t += chunk) {
      const int64_t rows = std::min(chunk, n - t);
      run_layer(layer, t, rows, h + t * d);
      if (show_hidden && layer + 1 < layers) observer->on_hidden(layer, t, rows, h + t * d);
    }
    observer->on_layer_end(layer, state);
  }
  state.next_position += n;
  for (int64_t t = 0; t < n; t += chunk) finish_chunk(t, std::min(chunk, n - t), h + t * d);
}

void decode_step(Context& ctx, Model& model, std::span<SequenceState* const> states, std::span<const int32_t> ids,
                 float* logits, std::span<LayerObserver* const> observers) {
  LACUNA_CHECK(states.size() == ids.size());
  LACUNA_CHECK(observers.empty() || observers.size() == ids.size());
  if (ids.empty()) return;
  check_ids(model, ids);
  const int64_t count = static_cast<int64_t>(ids.size());
  const int64_t d = model.info().hidden;

  std::vector<BatchRows> rows(ids.size());
  for (size_t i = 0; i < rows.size(); ++i)
    rows[i] = {states[i], static_cast<int64_t>(i), 1, states[i]->next_position, states[i]->next_position + 1};
  std::vector<LayerObserver*> none;
  if (observers.empty()) {
    none.assign(ids.size(), nullptr);
    observers = none;
  }
  float* hidden = ctx.activation(ActivationSlot::kHidden, static_cast<size_t>(count * d));
  model.embed(ctx, ids, hidden);
  for (int layer = 0; layer < model.info().layers; ++layer) {
    model.forward_layer(ctx, layer, hidden, count, rows, observers, 0, 1);
    for (size_t i = 0; i < rows.size(); ++i)
      if (observers[i]) observers[i]->on_layer_end(layer, *states[i]);
  }
  for (SequenceState* s : states) ++s->next_position;
  model.final_norm(ctx, hidden, count, hidden);
  model.head(ctx, hidden, count, logits);
}

}  // namespace lacuna

#include "evict/replay.h"

#include <algorithm>

namespace lacuna {
namespace {

constexpr int64_t kReplayChunk = 2048;  // context tokens replayed at a time
constexpr int64_t kPrefix = 8;          // tokens before the chunk that tell the model where to go on
constexpr int64_t kSinks = 4;
constexpr int64_t kQueryBlock = 32;     // queries whose attention rows exist at once

// f32 slots of one KV head in pages of their own, so that the attention op can read a part of a cache.
class HeadCopy {
 public:
  HeadCopy(Context& ctx, int head_dim, int64_t slots)
      : layout_{DType::kF32, head_dim, 64},
        memory_(ctx.memory, MemoryTag::kScratch, layout_.page_bytes() * static_cast<size_t>((slots + 63) / 64)) {
    for (int64_t page = 0; page * 64 < slots; ++page) pages_.push_back(memory_.as<std::byte>() + static_cast<size_t>(page) * layout_.page_bytes());
    view_.pages = pages_.data();
  }
  void append(Context& ctx, const KvLayout& layout, const KvHeadView& from, int64_t begin, int64_t end) {
    if (begin >= end) return;
    keys_.resize(static_cast<size_t>((end - begin) * layout.head_dim));
    values_.resize(keys_.size());
    kv_read(ctx, layout, from, begin, end, keys_.data(), values_.data());
    kv_append(ctx, layout_, &view_, 1, keys_.data(), values_.data(), end - begin, view_.length);
    view_.length += end - begin;
  }
  const KvLayout& layout() const { return layout_; }
  KvHeadView first(int64_t slots) const { return {view_.pages, slots}; }

 private:
  KvLayout layout_;
  Buffer memory_;
  std::vector<std::byte*> pages_;
  KvHeadView view_;
  std::vector<float> keys_, values_;
};

class ReplayObserver : public LayerObserver {
 public:
  ReplayObserver(Context& ctx, const Model& model, const SequenceState& state)
      : ctx_(ctx), model_(model), length_(static_cast<size_t>(state.kv.layers())), best(static_cast<size_t>(state.kv.layers())) {
    for (int l = 0; l < state.kv.layers(); ++l)
      for (int h = 0; h < state.kv.kv_heads(l); ++h) {
        length_[static_cast<size_t>(l)].push_back(state.kv.length(l, h));
        best[static_cast<size_t>(l)].emplace_back(static_cast<size_t>(state.kv.length(l, h)), 0.0f);
      }
  }

  void on_chunk(const LayerTap& tap, SequenceState& state) override {
    const AttentionLayer& a = *model_.attention(tap.layer);
    const int group = a.query_heads / a.kv_heads;
    const int64_t stride = int64_t{a.query_heads} * a.head_dim;
    for (int g = 0; g < a.kv_heads; ++g) {
      const KvHeadView& view = state.kv.view(tap.layer, g);
      const int64_t context = length_[static_cast<size_t>(tap.layer)][static_cast<size_t>(g)];
      const int64_t base = context - tokens;  // slots of an earlier call before the context
      const int64_t from = base + begin, to = base + end, sinks = std::min(kSinks, from);
      const int64_t before = sinks + (to - from);
      HeadCopy copy(ctx_, a.head_dim, before + view.length - context);
      copy.append(ctx_, state.kv.layout(tap.layer), view, 0, sinks);
      copy.append(ctx_, state.kv.layout(tap.layer), view, from, to);
      copy.append(ctx_, state.kv.layout(tap.layer), view, context, view.length);
      float* best_head = best[static_cast<size_t>(tap.layer)][static_cast<size_t>(g)].data() + from;
      for (int64_t t = 0; t < tap.tokens; t += kQueryBlock) {
        const int64_t rows = std::min(kQueryBlock, tap.tokens - t);
        const int64_t seen = before + tap.first_token + t + rows;
        probs_.ensure(ctx_.memory, MemoryTag::kScratch, static_cast<size_t>(group * rows * seen) * sizeof(float));
        window_attention(ctx_, copy.layout(), copy.first(seen), tap.q + t * stride + int64_t{g} * group * a.head_dim, rows, group,
                         stride, seen - rows, a.scale, 0, probs_.as<float>());
        for (int64_t row = 0; row < group * rows; ++row) {
          const float* p = probs_.as<float>() + row * seen + sinks;
          for (int64_t i = 0; i < to - from; ++i) best_head[i] = std::max(best_head[i], p[i]);
        }
      }
    }
  }

  void on_layer_end(int layer, SequenceState& state) override {
    for (int h = 0; h < state.kv.kv_heads(layer); ++h)
      state.kv.truncate(layer, h, length_[static_cast<size_t>(layer)][static_cast<size_t>(h)]);
  }

  int64_t tokens = 0, begin = 0, end = 0;  // of the context: its length, and the chunk being replayed

 private:
  Context& ctx_;
  const Model& model_;
  std::vector<std::vector<int64_t>> length_;
  Buffer probs_;

 public:
  std::vector<std::vector<std::vector<float>>> best;
};

}  // namespace

std::vector<std::vector<std::vector<float>>> replay_attention(Context& ctx, Model& model, SequenceState& state,
                                                              std::span<const int32_t> context,
                                                              std::span<const int32_t> replay_prompt,
                                                              const PrefillOptions& options) {
  for (int l = 0; l < model.info().layers; ++l)
    if (model.attention(l) && model.attention(l)->window > 0)
      throw Unsupported("policy kvzip replays the prompt over the whole cache, but layer {} of this {} model has a sliding "
                        "window of {} tokens and forgets it", l, model.info().architecture, model.attention(l)->window);
  ReplayObserver observer(ctx, model, state);
  observer.tokens = static_cast<int64_t>(context.size());
  const int64_t next_position = state.next_position;
  const RecurrentState before = state.recurrent.copy(ctx.memory);
  for (int64_t begin = 0; begin < observer.tokens; begin += kReplayChunk) {
    observer.begin = begin;
    observer.end = std::min(observer.tokens, begin + kReplayChunk);
    std::vector<int32_t> ids(replay_prompt.begin(), replay_prompt.end());
    const int64_t prefix = std::min(kPrefix, begin);
    ids.insert(ids.end(), context.begin() + begin - prefix, context.begin() + observer.end);
    prefill(ctx, model, state, ids, &observer, options, nullptr);
    // What was replayed leaves no trace: entries are cut off layer by layer, recurrent states put back.
    state.next_position = next_position;
    state.recurrent = before.copy(ctx.memory);
  }
  return std::move(observer.best);
}

}  // namespace lacuna

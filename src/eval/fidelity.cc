#include "eval/fidelity.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace lacuna {
std::vector<std::vector<int32_t>> spread_windows(const Model& model, const TextCodec& codec, const std::vector<std::string>& texts, int64_t size,
                                                 int64_t most) {
  if (size > model.info().max_positions) throw BadInput("windows of {} tokens; the model has {} positions", size, model.info().max_positions);
  return spread_windows(codec, texts, size, most);
}

std::vector<std::vector<int32_t>> spread_windows(const TextCodec& codec, const std::vector<std::string>& texts, int64_t size, int64_t most) {
  std::vector<std::vector<int32_t>> all;
  const int64_t own = size - static_cast<int64_t>(codec.before.size());
  if (own < 2) throw BadInput("windows of {} tokens are too short to score", size);
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = codec.encode(text);
    for (int64_t at = 0; at + own <= static_cast<int64_t>(ids.size()); at += own) {
      auto& window = all.emplace_back(codec.before);
      window.insert(window.end(), ids.begin() + at, ids.begin() + at + own);
    }
  }
  if (all.empty()) throw BadInput("no text is as long as a window of {} tokens; give longer text or a smaller window", size);
  const int64_t count = static_cast<int64_t>(all.size());
  if (most <= 0 || count <= most) return all;
  std::vector<std::vector<int32_t>> out;
  for (int64_t i = 0; i < most; ++i) out.push_back(std::move(all[static_cast<size_t>(i * count / most)]));
  return out;
}

namespace {

// The residual stream and the logits of a continuation.
class ContinuationView : public LayerObserver {
 public:
  ContinuationView(int layers, int64_t tokens, int64_t width) : width_(width) {
    for (int l = 0; l < layers; ++l) hidden.emplace_back(static_cast<size_t>(tokens * width));
  }
  bool wants_hidden() const override { return true; }
  void on_hidden(int layer, int64_t first, int64_t tokens, const float* rows) override {
    if (layer < 0 || layer >= static_cast<int>(hidden.size())) return;
    std::copy_n(rows, tokens * width_, hidden[static_cast<size_t>(layer)].begin() + first * width_);
  }
  std::vector<std::vector<float>> hidden;  // [layer][token, D]

 private:
  int64_t width_;
};

double relative_error(const std::vector<float>& full, const std::vector<float>& other) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < full.size(); ++i) {
    const double d = static_cast<double>(other[i]) - full[i];
    difference += d * d;
    norm += static_cast<double>(full[i]) * full[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : 0;
}

// Scores every token of a window from the final hidden states, a chunk at a time, so that the logits of
// a long window never stand in memory at once.
class LikelihoodObserver : public LayerObserver {
 public:
  LikelihoodObserver(Context& ctx, const Model& model, std::span<const int32_t> ids) : ctx_(ctx), model_(model), ids_(ids) {}
  bool wants_hidden() const override { return true; }
  void on_hidden(int layer, int64_t first, int64_t tokens, const float* normed) override {
    if (layer != model_.info().layers - 1) return;
    const int64_t vocab = model_.info().vocab, width = model_.info().hidden;
    constexpr int64_t kRows = 128;
    logits_.resize(static_cast<size_t>(kRows * vocab));
    for (int64_t t = 0; t < tokens; t += kRows) {
      const int64_t rows = std::min(kRows, tokens - t);
      model_.head(ctx_, normed + t * width, rows, logits_.data());
      for (int64_t r = 0; r < rows; ++r) {
        const size_t target = static_cast<size_t>(first + t + r + 1);
        if (target < ids_.size()) nats += negative_log_likelihood(logits_.data() + r * vocab, vocab, ids_[target]);
      }
    }
  }
  double nats = 0;

 private:
  Context& ctx_;
  const Model& model_;
  std::span<const int32_t> ids_;
  std::vector<float> logits_;
};

}  // namespace

FidelityResult measure_fidelity(Context& ctx, Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                const std::vector<Variant>& variants, const TextOptions& options,
                                const std::function<void(int64_t, int64_t)>& progress) {
  if (options.context < 1 || options.continuation < 2)
    throw BadInput("a context of {} and a continuation of {} tokens; at least 1 and 2 are needed", options.context, options.continuation);
  LACUNA_CHECK(!variants.empty() && variants[0].full() && variants[0].format == KvFormat::kNative);
  const ModelInfo& info = model.info();
  const auto windows = spread_windows(model, codec, texts, options.context + options.continuation, options.windows);
  std::vector<size_t> policy_of;
  const auto policies = collect_policies(variants, policy_of);
  const auto projections = std::make_shared<OutputProjections>(model);
  const size_t context = static_cast<size_t>(options.context), tokens = static_cast<size_t>(options.continuation);

  FidelityResult out;
  out.variants = variants;
  out.layer_error.assign(variants.size(), std::vector<double>(static_cast<size_t>(info.layers)));
  size_t bytes = 0;
  std::vector<float> full_logits(tokens * static_cast<size_t>(info.vocab)), logits(full_logits.size());
  ContinuationView full(info.layers, options.continuation, info.hidden), view(info.layers, options.continuation, info.hidden);
  for (size_t w = 0; w < windows.size(); ++w) {
    const std::span<const int32_t> ids(windows[w]);
    SequenceState dense = model.new_state(ctx.memory, options.kv);
    ScoreBoard board(ctx, model, policies, projections);
    LayerObserver* observer = policies.empty() ? nullptr : &board;
    prefill(ctx, model, dense, ids.first(context), observer, options.prefill, nullptr);
    if (observer) board.finish(dense, ids.first(context), codec.encode(options.replay_prompt), options.prefill);

    auto& row = out.windows.emplace_back(variants.size());
    for (size_t v = 0; v < variants.size(); ++v) {
      KvCache cache = variant_cache(ctx, variants[v], policy_of[v], dense, board);
      row[v].kv_bytes = format_bytes(cache, variants[v].format);
      SequenceState state{std::move(cache), dense.recurrent.copy(ctx.memory), dense.next_position};
      float* all = v == 0 ? full_logits.data() : logits.data();
      prefill(ctx, model, state, ids.subspan(context, tokens), v == 0 ? &full : &view, options.prefill, nullptr, all);
      // The last position's prediction has no true next token.
      for (size_t t = 0; t + 1 < tokens; ++t)
        row[v].nats += negative_log_likelihood(all + t * static_cast<size_t>(info.vocab), info.vocab, ids[context + t + 1]) /
                       static_cast<double>(tokens - 1);
      if (v == 0) {
        row[v].same_top = 1;
        continue;
      }
      for (size_t t = 0; t < tokens; ++t) {
        const size_t at = t * static_cast<size_t>(info.vocab);
        const LogitComparison c = compare_logits(full_logits.data() + at, logits.data() + at, info.vocab);
        row[v].kl += c.kl / static_cast<double>(tokens);
        row[v].same_top += c.same_top / static_cast<double>(tokens);
      }
      for (size_t l = 0; l < full.hidden.size(); ++l) {
        const double error = relative_error(full.hidden[l], view.hidden[l]);
        row[v].layer_error += error / static_cast<double>(info.layers);
        out.layer_error[v][l] += error / static_cast<double>(windows.size());
      }
    }
    bytes += codec.decode(ids.subspan(context + 1, tokens - 1)).size();
    out.tokens += static_cast<int64_t>(tokens) - 1;
    if (progress) progress(static_cast<int64_t>(w) + 1, static_cast<int64_t>(windows.size()));
  }
  out.bytes_per_token = static_cast<double>(bytes) / static_cast<double>(out.tokens);
  return out;
}

PerplexityResult measure_perplexity(Context& ctx, Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                    int64_t window, int64_t max_windows, const KvOptions& kv, const PrefillOptions& options,
                                    const std::function<void(int64_t, int64_t)>& progress) {
  const auto windows = spread_windows(model, codec, texts, window, max_windows);
  PerplexityResult out;
  std::vector<double> nats, bits;
  for (const auto& ids : windows) {
    SequenceState state = model.new_state(ctx.memory, kv);
    LikelihoodObserver observer(ctx, model, ids);
    prefill(ctx, model, state, ids, &observer, options, nullptr);
    const int64_t scored = static_cast<int64_t>(ids.size()) - 1;
    const size_t bytes = codec.decode(std::span(ids).subspan(1)).size();
    nats.push_back(observer.nats / static_cast<double>(scored));
    bits.push_back(observer.nats / std::numbers::ln2 / static_cast<double>(std::max<size_t>(1, bytes)));
    out.tokens += scored;
    out.bytes += bytes;
    if (progress) progress(++out.windows, static_cast<int64_t>(windows.size()));
    else ++out.windows;
  }
  out.nats = bootstrap_interval(nats);
  out.bits_per_byte = bootstrap_interval(bits);
  return out;
}

}  // namespace lacuna

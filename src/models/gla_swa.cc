// SpikingBrain-7B (BICLab/SpikingBrain-7B, model_type gla_swa): even layers are gated linear attention with a
// state of fixed size, odd layers softmax attention over a sliding window; RMSNorm before each half, SwiGLU
// after. The published code adds residuals and normalises in f32 and rounds what goes on to bf16; here the
// residual stream is f32 throughout.
#include <cmath>

#include "formats/spikingbrain_config.h"
#include "kernels/elementwise.h"
#include "kernels/gla.h"
#include "models/feed_forward.h"
#include "models/registry.h"
#include "models/weights.h"

namespace lacuna {
namespace {

struct LinearAttentionWeights {
  Projection q, k, v;           // [H*d, D], [G*d, D], [G*d, D]
  Projection gate_in;           // [rank, D], or [G*d, D] when the gate is one matrix
  LinearWeight gate_out;        // [G*d, rank]; none when the gate is one matrix
  const float* norm = nullptr;  // [d], over each query head
  Projection output;            // [D, H*d]
};

struct Layer {
  const float* attn_norm = nullptr;  // [D]
  LinearAttentionWeights linear;     // of even layers
  AttentionWeights softmax;          // of odd layers
  const float* mlp_norm = nullptr;   // [D]
  FeedForward mlp;
  LayerSpikes spikes;
};

WindowRule resolve(WindowRule wish, SpikingBrainConfig::Window config) {
  if (wish != WindowRule::kConfig) return wish;
  switch (config) {
    case SpikingBrainConfig::Window::kExact:
      return WindowRule::kExact;
    case SpikingBrainConfig::Window::kPlusOne:
      return WindowRule::kPlusOne;
    case SpikingBrainConfig::Window::kOfficial:
      break;
  }
  return WindowRule::kOfficial;
}

class GlaSwa : public Model {
 public:
  GlaSwa(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options)
      : config_(load_spikingbrain_config(dir)),
        dir_(dir.string()),
        weights_(ctx, ModelFiles::open(dir), options),
        attention_(config_.rope, config_.head_dim, config_.max_positions),
        spikes_(resolve_spikes(dir, options.spikes, config_.layers,
                               weights_.has("model.layers.0.attn.q_proj.weight_quantizer.scales"))) {
    const int64_t d = config_.hidden;
    const WindowRule rule = resolve(options.window, config_.window);
    weights_.place(spikes_);
    embedding_ = weights_.linear("model.embeddings", config_.vocab, d, false);
    for (int i = 0; i < config_.layers; ++i) {
      const std::string at = "model.layers." + std::to_string(i) + ".";
      Layer layer;
      layer.spikes = spikes_.of(i);
      layer.attn_norm = weights_.vector(at + "attn_norm.weight", d);
      if (SpikingBrainConfig::is_linear(i))
        bind_linear(at + "attn.", layer.spikes, layer.linear);
      else
        bind_softmax(at + "attn.", config_.full_attention[static_cast<size_t>(i)] ? 0 : config_.sliding_window, rule,
                     layer.spikes, layer.softmax);
      layer.mlp_norm = weights_.vector(at + "mlp_norm.weight", d);
      layer.mlp = bind_feed_forward(weights_, at + "mlp", d, config_.intermediate, spikes_, layer.spikes);
      layers_.push_back(layer);
    }
    final_norm_ = weights_.vector("model.norm.weight", d);
    head_ = config_.tie_word_embeddings ? embedding_ : weights_.linear("lm_head", config_.vocab, d, false);

    info_.architecture = "gla_swa";
    info_.layers = config_.layers;
    info_.hidden = d;
    info_.vocab = config_.vocab;
    info_.max_positions = config_.max_positions;
    info_.parameters = weights_.parameters();
    // Codes made of f32 weights leave everything else in f32.
    info_.weight_dtype = spikes_.group_scales ? embedding_.weight.dtype : layers_[0].mlp.gate.dtype();
    info_.weight_bytes = weights_.bytes();
    info_.token_weight_bytes = weights_.bytes() - (config_.tie_word_embeddings ? 0 : linear_bytes(embedding_));
  }

  const ModelInfo& info() const override { return info_; }
  const AttentionLayer* attention(int layer) const override {
    return SpikingBrainConfig::is_linear(layer) ? nullptr : &layers_[static_cast<size_t>(layer)].softmax.layer;
  }

  SequenceState new_state(MemoryAccount& account, const KvOptions& options) const override {
    KvCacheShape kv;
    RecurrentShape recurrent;
    for (int i = 0; i < config_.layers; ++i) {
      const bool linear = SpikingBrainConfig::is_linear(i);
      kv.layers.push_back({linear ? 0 : config_.kv_heads, linear ? 0 : config_.head_dim});
      // Query heads of a group share k, v and the gate, and so their state.
      recurrent.layers.push_back({linear ? config_.kv_heads : 0, config_.head_dim, config_.head_dim});
    }
    kv.dtype = options.dtype;
    kv.page_slots = options.page_slots;
    return SequenceState{KvCache(account, std::move(kv)), RecurrentState(account, std::move(recurrent)), 0};
  }

  void embed(Context& ctx, std::span<const int32_t> ids, float* hidden) const override {
    embed_rows(ctx, embedding_, ids.data(), static_cast<int64_t>(ids.size()), hidden);
  }

  void forward_layer(Context& ctx, int layer, float* hidden, int64_t row_count, std::span<const BatchRows> rows,
                     std::span<LayerObserver* const> observers, int64_t first_token, int64_t call_tokens) override {
    ctx.layer = layer;
    const Layer& l = layers_[static_cast<size_t>(layer)];
    const LayerCall call{layer, row_count, rows, observers, first_token, call_tokens};
    const int64_t d = config_.hidden;
    float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(row_count * d));  // [M, D]
    rms_norm(ctx, hidden, row_count, d, l.attn_norm, config_.norm_eps, normed);
    call.show("normed", normed, d);
    if (SpikingBrainConfig::is_linear(layer))
      attend_linearly(ctx, call, l, normed, hidden);
    else
      attention_.forward(ctx, call, l.softmax, normed, hidden, LinearMode::kAccumulate);
    call.show("resid_mid", hidden, d);

    rms_norm(ctx, hidden, row_count, d, l.mlp_norm, config_.norm_eps, normed);
    feed_forward(ctx, call, l.mlp, normed, hidden, LinearMode::kAccumulate);
    call.show("resid_out", hidden, d);
    ctx.layer = -1;
  }

  void final_norm(Context& ctx, const float* hidden, int64_t m, float* out) const override {
    rms_norm(ctx, hidden, m, config_.hidden, final_norm_, config_.norm_eps, out);
  }

  void head(Context& ctx, const float* normed, int64_t m, float* logits) const override {
    linear(ctx, head_, normed, m, logits);
  }

 private:
  int64_t query_width() const { return int64_t{config_.heads} * config_.head_dim; }
  int64_t key_width() const { return int64_t{config_.kv_heads} * config_.head_dim; }

  // q, k and v of either kind of attention.
  template <class Weights>
  void bind_inputs(const std::string& at, const LayerSpikes& spikes, Weights& w) {
    const int64_t d = config_.hidden;
    const float k = spikes.of(SpikeSite::kAttnIn);
    w.q = weights_.projection(at + "q_proj", query_width(), d, true, k, spikes_);
    w.k = weights_.projection(at + "k_proj", key_width(), d, true, k, spikes_);
    w.v = weights_.projection(at + "v_proj", key_width(), d, true, k, spikes_);
  }

  void bind_linear(const std::string& at, const LayerSpikes& spikes, LinearAttentionWeights& w) {
    const int64_t d = config_.hidden;
    const float k = spikes.of(SpikeSite::kAttnIn);
    bind_inputs(at, spikes, w);
    // The W8ASpike checkpoint holds the two low-rank matrices multiplied out.
    const bool one = weights_.has(at + "gk_proj.weight");
    if (one && weights_.has(at + "gk_proj.0.weight"))
      throw CorruptData("{}: found both '{}gk_proj.weight' and '{}gk_proj.0.weight', expected one of them", dir_, at,
                        at);
    if (one) {
      w.gate_in = weights_.projection(at + "gk_proj", key_width(), d, true, k, spikes_, nullptr, true);
    } else {
      // int8 checkpoints keep the two small matrices in floats.
      w.gate_in = weights_.projection(at + "gk_proj.0", config_.gate_low_rank_dim, d, false, k, spikes_, nullptr, true);
      w.gate_out = weights_.linear(at + "gk_proj.1", key_width(), config_.gate_low_rank_dim, true);
    }
    w.norm = weights_.vector(at + "g_norm.weight", config_.head_dim);
    w.output = weights_.projection(at + "o_proj", d, query_width(), false, spikes.of(SpikeSite::kOIn), spikes_);
  }

  void bind_softmax(const std::string& at, int64_t window, WindowRule rule, const LayerSpikes& spikes,
                    AttentionWeights& w) {
    bind_inputs(at, spikes, w);
    w.spikes = spikes;
    LinearWeight output;
    w.output = weights_.projection(at + "o_proj", config_.hidden, query_width(), false, spikes.of(SpikeSite::kOIn),
                                   spikes_, &output);
    w.layer = {
        config_.heads, config_.kv_heads, config_.head_dim,      1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
        window,        output,           attention_.inv_freq(), attention_.rope_factor()};
    if (window == 0) return;
    if (rule == WindowRule::kPlusOne) ++w.layer.window;
    if (rule == WindowRule::kOfficial) w.start_window = window + 1;
  }

  void attend_linearly(Context& ctx, const LayerCall& call, const Layer& l, const float* normed, float* hidden) {
    const LinearAttentionWeights& w = l.linear;
    const int64_t m = call.row_count, d = config_.head_dim, qs = query_width(), ks = key_width();
    float* q = ctx.activation(ActivationSlot::kQuery, static_cast<size_t>(m * qs));      // [M, H, d]
    float* k = ctx.activation(ActivationSlot::kKey, static_cast<size_t>(m * ks));        // [M, G, d]
    float* v = ctx.activation(ActivationSlot::kValue, static_cast<size_t>(m * ks));      // [M, G, d]
    float* g = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(m * ks));       // [M, G, d]
    float* mixed = ctx.activation(ActivationSlot::kMixed, static_cast<size_t>(m * qs));  // [M, H, d]
    // With one matrix the gate's output is its logit, with two what the second takes.
    float* low =
        w.gate_out.weight ? ctx.activation(ActivationSlot::kUp, static_cast<size_t>(m * config_.gate_low_rank_dim)) : g;
    project(ctx, call, SpikeSite::kAttnIn, l.spikes.of(SpikeSite::kAttnIn), normed,
            {{&w.q, q}, {&w.k, k}, {&w.v, v}, {&w.gate_in, low}});
    relu(ctx, q, m * qs);
    relu(ctx, k, m * ks);
    if (w.gate_out.weight) linear(ctx, w.gate_out, low, m, g);
    log_sigmoid(ctx, g, m * ks, 1.0f / config_.gate_logit_normalizer, g);
    call.show("q", q, qs);
    call.show("k", k, ks);
    call.show("v", v, ks);
    call.show("g", g, ks);

    sequences_.resize(call.rows.size());
    for (size_t i = 0; i < call.rows.size(); ++i) {
      const BatchRows& r = call.rows[i];
      const int64_t at = r.first_row * ks;
      sequences_[i] = {q + r.first_row * qs,
                       k + at,
                       v + at,
                       g + at,
                       mixed + r.first_row * qs,
                       r.tokens,
                       r.state->recurrent.at(call.layer)};
    }
    const GlaShape shape{config_.heads, config_.kv_heads, config_.head_dim, config_.head_dim,
                         1.0f / std::sqrt(static_cast<float>(config_.head_dim))};
    try {
      gated_linear_attention(ctx, shape, sequences_);
    } catch (const BadInput& error) {
      // log_sigmoid is never above 0: only activations that are not numbers come here, from weights that are
      // finite one by one but not in a product.
      throw CorruptData("{}: layer {}: the activations are not finite with these weights ({})", dir_, call.layer,
                        error.what());
    }
    call.show("o", mixed, qs);
    rms_norm(ctx, mixed, m * config_.heads, d, w.norm, config_.norm_eps, mixed);
    call.show("o_norm", mixed, qs);
    project(ctx, call, SpikeSite::kOIn, l.spikes.of(SpikeSite::kOIn), mixed, {{&w.output, hidden}},
            LinearMode::kAccumulate);
  }

  SpikingBrainConfig config_;
  std::string dir_;
  ModelInfo info_;
  WeightBinder weights_;
  AttentionBlock attention_;
  SpikeCoding spikes_;
  LinearWeight embedding_, head_;
  const float* final_norm_ = nullptr;
  std::vector<Layer> layers_;
  std::vector<GlaSequence> sequences_;  // reused: decode allocates nothing
};

}  // namespace

std::unique_ptr<Model> load_gla_swa(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options) {
  return std::make_unique<GlaSwa>(ctx, dir, options);
}

ModelOutline outline_gla_swa(const std::filesystem::path& dir) {
  const SpikingBrainConfig c = load_spikingbrain_config(dir);
  ModelOutline o{"gla_swa",  c.layers,   c.hidden,              c.intermediate, c.vocab,   c.max_positions, c.heads,
                 c.kv_heads, c.head_dim, c.tie_word_embeddings, c.rope.theta,   c.eos_ids, c.layers / 2};
  for (int i = 1; i < c.layers; i += 2) o.window_layers += !c.full_attention[static_cast<size_t>(i)];
  o.window = c.sliding_window;
  o.recurrent_layers = c.layers - o.attention_layers;
  o.state_bytes = int64_t{o.recurrent_layers} * c.kv_heads * c.head_dim * c.head_dim * 4;
  return o;
}

}  // namespace lacuna

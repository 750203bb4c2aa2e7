// The pre-norm decoder of Llama, Mistral, Qwen2 and Qwen3: RMSNorm, grouped-query attention with
// rotary embedding, SwiGLU. The families differ in biases, q/k norms and windows, all from the config.
#include <algorithm>
#include <cmath>

#include "kernels/elementwise.h"
#include "models/feed_forward.h"
#include "models/registry.h"
#include "models/weights.h"

namespace lacuna {
namespace {

struct DecoderLayer {
  const float* attn_norm;  // [D]
  AttentionWeights attention;
  const float* mlp_norm;  // [D]
  FeedForward mlp;
};

class Decoder : public Model {
 public:
  Decoder(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options)
      : config_(load_model_config(dir)),
        weights_(ctx, ModelFiles::open(dir), options),
        attention_(config_.rope, config_.head_dim, config_.max_positions),
        spikes_(resolve_spikes(dir, options.spikes, config_.layers, false)) {
    const int64_t d = config_.hidden, q = int64_t{config_.heads} * config_.head_dim,
                  kv = int64_t{config_.kv_heads} * config_.head_dim;
    weights_.place(spikes_);
    embedding_ = weights_.linear("model.embed_tokens", config_.vocab, d, false);
    for (int i = 0; i < config_.layers; ++i) {
      const std::string at = "model.layers." + std::to_string(i) + ".";
      DecoderLayer layer;
      layer.attn_norm = weights_.vector(at + "input_layernorm.weight", d);
      AttentionWeights& a = layer.attention;
      a.spikes = spikes_.of(i);
      const float at_in = a.spikes.of(SpikeSite::kAttnIn);
      a.q = weights_.projection(at + "self_attn.q_proj", q, d, config_.qkv_bias, at_in, spikes_);
      a.k = weights_.projection(at + "self_attn.k_proj", kv, d, config_.qkv_bias, at_in, spikes_);
      a.v = weights_.projection(at + "self_attn.v_proj", kv, d, config_.qkv_bias, at_in, spikes_);
      a.norm_eps = config_.rms_norm_eps;
      if (config_.qk_norm) {  // Qwen3
        a.q_norm = weights_.vector(at + "self_attn.q_norm.weight", config_.head_dim);
        a.k_norm = weights_.vector(at + "self_attn.k_norm.weight", config_.head_dim);
      }
      LinearWeight output;
      a.output =
          weights_.projection(at + "self_attn.o_proj", d, q, config_.o_bias, a.spikes.of(SpikeSite::kOIn), spikes_, &output);
      a.layer = {config_.heads,
                 config_.kv_heads,
                 config_.head_dim,
                 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                 config_.layer_window[static_cast<size_t>(i)],
                 output,
                 attention_.inv_freq(),
                 attention_.rope_factor()};
      layer.mlp_norm = weights_.vector(at + "post_attention_layernorm.weight", d);
      layer.mlp = bind_feed_forward(weights_, at + "mlp", d, config_.intermediate, spikes_, a.spikes, config_.mlp_bias);
      layers_.push_back(layer);
    }
    final_norm_ = weights_.vector("model.norm.weight", d);
    head_ = config_.tie_word_embeddings ? embedding_ : weights_.linear("lm_head", config_.vocab, d, false);

    info_.architecture = config_.model_type;
    info_.layers = config_.layers;
    info_.hidden = d;
    info_.vocab = config_.vocab;
    info_.max_positions = config_.max_positions;
    info_.parameters = weights_.parameters();
    info_.weight_dtype = layers_[0].attention.q.dtype();
    info_.weight_bytes = weights_.bytes();
    info_.token_weight_bytes = weights_.bytes() - (config_.tie_word_embeddings ? 0 : linear_bytes(embedding_));
  }

  const ModelInfo& info() const override { return info_; }
  const AttentionLayer* attention(int layer) const override {
    return &layers_[static_cast<size_t>(layer)].attention.layer;
  }

  SequenceState new_state(MemoryAccount& account, const KvOptions& options) const override {
    KvCacheShape shape;
    shape.layers.assign(static_cast<size_t>(config_.layers), {config_.kv_heads, config_.head_dim});
    shape.dtype = options.dtype;
    shape.page_slots = options.page_slots;
    return SequenceState{KvCache(account, std::move(shape)), {}, 0};
  }

  void embed(Context& ctx, std::span<const int32_t> ids, float* hidden) const override {
    embed_rows(ctx, embedding_, ids.data(), static_cast<int64_t>(ids.size()), hidden);
  }

  void forward_layer(Context& ctx, int layer, float* hidden, int64_t row_count, std::span<const BatchRows> rows,
                     std::span<LayerObserver* const> observers, int64_t first_token, int64_t call_tokens) override {
    ctx.layer = layer;
    const DecoderLayer& l = layers_[static_cast<size_t>(layer)];
    const LayerCall call{layer, row_count, rows, observers, first_token, call_tokens};
    float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(row_count * config_.hidden));
    rms_norm(ctx, hidden, row_count, config_.hidden, l.attn_norm, config_.rms_norm_eps, normed);
    attention_.forward(ctx, call, l.attention, normed, hidden, LinearMode::kAccumulate);

    rms_norm(ctx, hidden, row_count, config_.hidden, l.mlp_norm, config_.rms_norm_eps, normed);
    feed_forward(ctx, call, l.mlp, normed, hidden, LinearMode::kAccumulate);
    ctx.layer = -1;
  }

  void final_norm(Context& ctx, const float* hidden, int64_t m, float* out) const override {
    rms_norm(ctx, hidden, m, config_.hidden, final_norm_, config_.rms_norm_eps, out);
  }

  void head(Context& ctx, const float* normed, int64_t m, float* logits) const override {
    linear(ctx, head_, normed, m, logits);
  }

 private:
  ModelConfig config_;
  ModelInfo info_;
  WeightBinder weights_;
  AttentionBlock attention_;
  SpikeCoding spikes_;
  LinearWeight embedding_, head_;
  const float* final_norm_ = nullptr;
  std::vector<DecoderLayer> layers_;
};

}  // namespace

std::unique_ptr<Model> load_decoder(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options) {
  return std::make_unique<Decoder>(ctx, dir, options);
}

ModelOutline outline_decoder(const std::filesystem::path& dir) {
  const ModelConfig c = load_model_config(dir);
  ModelOutline o{c.model_type, c.layers,  c.hidden,   c.intermediate, c.vocab, c.max_positions, c.heads,
                 c.kv_heads,   c.head_dim, c.tie_word_embeddings, c.rope.theta, c.eos_ids, c.layers};
  for (const int64_t w : c.layer_window) {
    o.window_layers += w > 0;
    o.window = std::max(o.window, w);
  }
  return o;
}

}  // namespace lacuna

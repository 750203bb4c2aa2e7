// The pre-norm decoder of Llama, Mistral, Qwen2 and Qwen3: RMSNorm, grouped-query attention with
// rotary embedding, SwiGLU. The families differ in biases, q/k norms and windows, all from the config.
#include <cmath>
#include <cstring>

#include "kernels/elementwise.h"
#include "models/registry.h"
#include "models/rope_table.h"
#include "models/weights.h"

namespace lacuna {
namespace {

struct DecoderLayer {
  const float* attn_norm;  // [D]
  LinearWeight q, k, v;    // [H*d, D], [G*d, D], [G*d, D]
  const float* q_norm = nullptr;  // [d], Qwen3
  const float* k_norm = nullptr;
  AttentionLayer attention;
  const float* mlp_norm;      // [D]
  LinearWeight gate, up, down;  // [F, D], [F, D], [D, F]
};

class Decoder : public Model {
 public:
  Decoder(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options)
      : config_(load_model_config(dir)),
        weights_(ctx, ModelFiles::open(dir), options),
        rope_(config_.rope, config_.head_dim, config_.max_positions) {
    const int64_t d = config_.hidden, q = int64_t{config_.heads} * config_.head_dim,
                  kv = int64_t{config_.kv_heads} * config_.head_dim, f = config_.intermediate;
    embedding_ = weights_.linear("model.embed_tokens", config_.vocab, d, false);
    for (int i = 0; i < config_.layers; ++i) {
      const std::string at = "model.layers." + std::to_string(i) + ".";
      DecoderLayer layer;
      layer.attn_norm = weights_.vector(at + "input_layernorm.weight", d);
      layer.q = weights_.linear(at + "self_attn.q_proj", q, d, config_.qkv_bias);
      layer.k = weights_.linear(at + "self_attn.k_proj", kv, d, config_.qkv_bias);
      layer.v = weights_.linear(at + "self_attn.v_proj", kv, d, config_.qkv_bias);
      if (config_.qk_norm) {
        layer.q_norm = weights_.vector(at + "self_attn.q_norm.weight", config_.head_dim);
        layer.k_norm = weights_.vector(at + "self_attn.k_norm.weight", config_.head_dim);
      }
      layer.attention = {config_.heads,
                         config_.kv_heads,
                         config_.head_dim,
                         1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                         config_.layer_window[static_cast<size_t>(i)],
                         weights_.linear(at + "self_attn.o_proj", d, q, config_.o_bias),
                         rope_.inv_freq(),
                         rope_.factor()};
      layer.mlp_norm = weights_.vector(at + "post_attention_layernorm.weight", d);
      layer.gate = weights_.linear(at + "mlp.gate_proj", f, d, config_.mlp_bias);
      layer.up = weights_.linear(at + "mlp.up_proj", f, d, config_.mlp_bias);
      layer.down = weights_.linear(at + "mlp.down_proj", d, f, config_.mlp_bias);
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
    info_.weight_dtype = layers_[0].q.weight.dtype;
    info_.weight_bytes = weights_.bytes();
    info_.token_weight_bytes = weights_.bytes() - (config_.tie_word_embeddings ? 0 : linear_bytes(embedding_));
  }

  const ModelInfo& info() const override { return info_; }
  const AttentionLayer* attention(int layer) const override { return &layers_[static_cast<size_t>(layer)].attention; }

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
    attend(ctx, layer, l, hidden, row_count, rows, observers, first_token, call_tokens);

    const int64_t f = config_.intermediate;
    float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(row_count * config_.hidden));
    float* gate = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(row_count * f));  // [M, F]
    float* up = ctx.activation(ActivationSlot::kUp, static_cast<size_t>(row_count * f));
    rms_norm(ctx, hidden, row_count, config_.hidden, l.mlp_norm, config_.rms_norm_eps, normed);
    linear(ctx, l.gate, normed, row_count, gate);
    linear(ctx, l.up, normed, row_count, up);
    silu_mul(ctx, gate, up, row_count, f, gate);
    linear(ctx, l.down, gate, row_count, hidden, LinearMode::kAccumulate);
    ctx.layer = -1;
  }

  void final_norm(Context& ctx, const float* hidden, int64_t m, float* out) const override {
    rms_norm(ctx, hidden, m, config_.hidden, final_norm_, config_.rms_norm_eps, out);
  }

  void head(Context& ctx, const float* normed, int64_t m, float* logits) const override {
    linear(ctx, head_, normed, m, logits);
  }

 private:
  void attend(Context& ctx, int layer, const DecoderLayer& l, float* hidden, int64_t row_count,
              std::span<const BatchRows> rows, std::span<LayerObserver* const> observers, int64_t first_token,
              int64_t call_tokens) {
    const int heads = config_.heads, kv_heads = config_.kv_heads, d = config_.head_dim;
    const int64_t qs = int64_t{heads} * d, ks = int64_t{kv_heads} * d;
    float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(row_count * config_.hidden));  // [M, D]
    float* q = ctx.activation(ActivationSlot::kQuery, static_cast<size_t>(row_count * qs));      // [M, H, d]
    float* k = ctx.activation(ActivationSlot::kKey, static_cast<size_t>(row_count * ks));        // [M, G, d]
    float* v = ctx.activation(ActivationSlot::kValue, static_cast<size_t>(row_count * ks));      // [M, G, d]
    float* mixed = ctx.activation(ActivationSlot::kMixed, static_cast<size_t>(row_count * qs));  // [M, H, d]

    rms_norm(ctx, hidden, row_count, config_.hidden, l.attn_norm, config_.rms_norm_eps, normed);
    linear(ctx, l.q, normed, row_count, q);
    linear(ctx, l.k, normed, row_count, k);
    linear(ctx, l.v, normed, row_count, v);
    if (l.q_norm) {
      rms_norm(ctx, q, row_count * heads, d, l.q_norm, config_.rms_norm_eps, q);
      rms_norm(ctx, k, row_count * kv_heads, d, l.k_norm, config_.rms_norm_eps, k);
    }
    bool raw = false;
    for (const LayerObserver* o : observers) raw = raw || (o && o->wants_raw_queries());
    float* q_raw = nullptr;
    if (raw) {
      q_raw = ctx.activation(ActivationSlot::kRawQuery, static_cast<size_t>(row_count * qs));
      std::memcpy(q_raw, q, static_cast<size_t>(row_count * qs) * sizeof(float));
    }
    rotate(ctx, q, k, row_count, rows);

    sequences_.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const BatchRows& r = rows[i];
      r.state->kv.append(ctx, layer, k + r.first_row * ks, v + r.first_row * ks, r.tokens, r.first_position);
      sequences_[i] = {q + r.first_row * qs, mixed + r.first_row * qs, r.tokens, r.first_position, r.state->kv.views(layer)};
    }
    const AttentionShape shape{heads, kv_heads, l.attention.scale, l.attention.window, 0, 0};
    lacuna::attention(ctx, rows[0].state->kv.layout(layer), shape, sequences_);
    for (size_t i = 0; i < rows.size(); ++i) {
      const BatchRows& r = rows[i];
      if (observers[i])
        observers[i]->on_chunk({layer, first_token, r.tokens, call_tokens, r.first_position,
                                raw ? q_raw + r.first_row * qs : nullptr, q + r.first_row * qs, mixed + r.first_row * qs},
                               *r.state);
      // The next query sees positions > next - window; whole pages before that are dead.
      if (l.attention.window > 0)
        r.state->kv.drop_before(layer, r.first_position + r.tokens - l.attention.window + 1);
    }
    linear(ctx, l.attention.output, mixed, row_count, hidden, LinearMode::kAccumulate);
  }

  void rotate(Context& ctx, float* q, float* k, int64_t row_count, std::span<const BatchRows> rows) {
    const int64_t half = config_.head_dim / 2;
    RopeTable::Rows table;
    if (rows.size() == 1) {
      table = rope_.rows(ctx, rows[0].first_position, rows[0].tokens, rows[0].sequence_length);
    } else {
      // Sequences of a batch stand at unrelated positions: gather their rows.
      float* cos = ctx.activation(ActivationSlot::kCos, static_cast<size_t>(row_count * half));
      float* sin = ctx.activation(ActivationSlot::kSin, static_cast<size_t>(row_count * half));
      for (const BatchRows& r : rows) {
        const RopeTable::Rows part = rope_.rows(ctx, r.first_position, r.tokens, r.sequence_length);
        const size_t bytes = static_cast<size_t>(r.tokens * half) * sizeof(float);
        std::memcpy(cos + r.first_row * half, part.cos, bytes);
        std::memcpy(sin + r.first_row * half, part.sin, bytes);
      }
      table = {cos, sin};
    }
    rope(ctx, q, row_count, config_.heads, config_.head_dim, table.cos, table.sin);
    rope(ctx, k, row_count, config_.kv_heads, config_.head_dim, table.cos, table.sin);
  }

  ModelConfig config_;
  ModelInfo info_;
  WeightBinder weights_;
  RopeTable rope_;
  LinearWeight embedding_, head_;
  const float* final_norm_ = nullptr;
  std::vector<DecoderLayer> layers_;
  std::vector<AttentionSequence> sequences_;  // reused: decode allocates nothing
};

}  // namespace

std::unique_ptr<Model> load_decoder(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options) {
  return std::make_unique<Decoder>(ctx, dir, options);
}

}  // namespace lacuna

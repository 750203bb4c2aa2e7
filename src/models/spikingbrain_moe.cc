// The parallel hybrid of SpikingBrain-76B (report of May 2026, section 3.1): in every layer a gated linear
// attention and a softmax attention read the same normed rows; their normalised outputs are added with two
// weights. Learnable sink tokens stand before the text. Most layers have a mixture of experts. What the
// report leaves open is a field of config.json: docs/spikingbrain.md.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/spikingbrain_moe_config.h"
#include "kernels/elementwise.h"
#include "kernels/gla.h"
#include "kernels/tied_gate.h"
#include "models/attention_block.h"
#include "models/moe.h"
#include "models/registry.h"

namespace lacuna {
namespace {

struct LinearBranch {
  Projection q, k, v, o;  // [H*d, D], [G*d, D], [G*d, D], [D, H*d]
};

struct HybridLayer {
  const float* attn_norm = nullptr;  // [D]
  LinearBranch linear;
  AttentionWeights softmax;
  const float* linear_norm = nullptr;  // [d] before the projection, or [D] after it
  const float* softmax_norm = nullptr;
  float linear_weight = 0, softmax_weight = 0;
  const float* mlp_norm = nullptr;  // [D]
  FeedForward mlp;                  // of a dense layer
  MoeWeights moe;                   // of all others: those have experts
};

class ParallelHybrid : public Model {
 public:
  ParallelHybrid(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options)
      : config_(load_spikingbrain_moe_config(dir)),
        dir_(dir.string()),
        weights_(ctx, ModelFiles::open(dir), options),
        attention_(config_.rope, config_.head_dim, config_.max_positions),
        spikes_(resolve_spikes(dir, options.spikes, config_.layers, false)) {
    if (!config_.softmax_rope) no_angles_.assign(static_cast<size_t>(config_.head_dim / 2), 0.0f);
    weights_.place(spikes_);
    embedding_ = weights_.linear("model.embeddings", config_.vocab, config_.hidden, false);
    for (int i = 0; i < config_.layers; ++i) layers_.push_back(bind(i));
    final_norm_ = weights_.vector("model.norm.weight", config_.hidden);
    head_ = config_.tie_word_embeddings ? embedding_ : weights_.linear("lm_head", config_.vocab, config_.hidden, false);
    if (config_.sinks > 0) run_sinks(ctx);
    describe();
  }

  const ModelInfo& info() const override { return info_; }
  const AttentionLayer* attention(int layer) const override {
    return &layers_[static_cast<size_t>(layer)].softmax.layer;
  }

  SequenceState new_state(MemoryAccount& account, const KvOptions& options) const override {
    KvCacheShape shape;
    shape.layers.assign(static_cast<size_t>(config_.layers), {config_.kv_heads, config_.head_dim});
    shape.dtype = options.dtype;
    shape.page_slots = options.page_slots;
    RecurrentShape recurrent;
    recurrent.layers.assign(static_cast<size_t>(config_.layers),
                            {config_.kv_heads, config_.head_dim, config_.head_dim});
    SequenceState state{KvCache(account, std::move(shape)), RecurrentState(account, std::move(recurrent)), 0};
    if (sink_states_)
      for (int i = 0; i < config_.layers; ++i)
        std::memcpy(state.recurrent.at(i), sink_state(i), static_cast<size_t>(state_floats()) * sizeof(float));
    return state;
  }

  void embed(Context& ctx, std::span<const int32_t> ids, float* hidden) const override {
    embed_rows(ctx, embedding_, ids.data(), static_cast<int64_t>(ids.size()), hidden);
  }

  void forward_layer(Context& ctx, int layer, float* hidden, int64_t row_count, std::span<const BatchRows> rows,
                     std::span<LayerObserver* const> observers, int64_t first_token, int64_t call_tokens) override {
    ctx.layer = layer;
    const HybridLayer& l = layers_[static_cast<size_t>(layer)];
    const LayerCall call{layer, row_count, rows, observers, first_token, call_tokens};
    const int64_t d = config_.hidden, qs = int64_t{config_.heads} * config_.head_dim,
                  ks = int64_t{config_.kv_heads} * config_.head_dim;
    const float* normed = norm_rows(ctx, l, hidden, row_count);
    float* branch = ctx.activation(ActivationSlot::kBranch, static_cast<size_t>(row_count * d));  // [M, D]
    call.show("normed", normed, d);

    attention_.forward(ctx, call, l.softmax, normed, branch, LinearMode::kStore);
    add_branch(ctx, branch, row_count, l.softmax_norm, l.softmax_weight, hidden);
    call.show("softmax_branch", branch, d);

    const LinearRows p = project_linear(ctx, call, l, normed);
    states_.clear();
    for (const BatchRows& r : rows)
      states_.push_back({p.q + r.first_row * qs, p.k + r.first_row * ks, p.v + r.first_row * ks,
                         p.decay + r.first_row * ks, p.mixed + r.first_row * qs, r.tokens,
                         r.state->recurrent.at(layer)});
    mix_linear(ctx, call, l, p, branch);
    add_branch(ctx, branch, row_count, l.linear_norm, l.linear_weight, hidden);
    call.show("linear_branch", branch, d);

    feed(ctx, call, l, hidden);
    ctx.layer = -1;
  }

  void final_norm(Context& ctx, const float* hidden, int64_t m, float* out) const override {
    rms_norm(ctx, hidden, m, config_.hidden, final_norm_, config_.norm_eps, out);
  }

  void head(Context& ctx, const float* normed, int64_t m, float* logits) const override {
    linear(ctx, head_, normed, m, logits);
  }

 private:
  // Rows of the linear branch, in their activation slots.
  struct LinearRows {
    float *q, *k, *v, *decay, *mixed;  // [M, H, d], [M, G, d] three times, [M, H, d]
  };

  bool norm_after() const { return config_.branch_norm == BranchNorm::kAfterProjection; }
  int64_t state_floats() const { return int64_t{config_.kv_heads} * config_.head_dim * config_.head_dim; }
  float* sink_state(int layer) const { return sink_states_.as<float>() + layer * state_floats(); }

  HybridLayer bind(int i) {
    const int64_t d = config_.hidden, q = int64_t{config_.heads} * config_.head_dim,
                  kv = int64_t{config_.kv_heads} * config_.head_dim, norm = norm_after() ? d : config_.head_dim;
    const std::string at = "model.layers." + std::to_string(i) + ".";
    HybridLayer l;
    AttentionWeights& a = l.softmax;
    a.spikes = spikes_.of(i);
    const float in_k = a.spikes.of(SpikeSite::kAttnIn), o_k = a.spikes.of(SpikeSite::kOIn);
    const auto input = [&](const std::string& branch, const char* name, int64_t out) {
      return weights_.projection(at + "attn." + branch + "." + name, out, d, config_.qkv_bias, in_k, spikes_);
    };
    l.attn_norm = weights_.vector(at + "attn_norm.weight", d);
    l.linear = {input("linear", "q_proj", q), input("linear", "k_proj", kv), input("linear", "v_proj", kv),
                weights_.projection(at + "attn.linear.o_proj", d, q, false, o_k, spikes_)};
    l.linear_norm = weights_.vector(at + "attn.linear.norm.weight", norm);
    a.q = input("softmax", "q_proj", q);
    a.k = input("softmax", "k_proj", kv);
    a.v = input("softmax", "v_proj", kv);
    LinearWeight output;
    a.output = weights_.projection(at + "attn.softmax.o_proj", d, q, false, o_k, spikes_, &output);
    a.norm_eps = config_.norm_eps;
    a.rotary = config_.softmax_rope;
    a.layer = {config_.heads,
               config_.kv_heads,
               config_.head_dim,
               1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
               config_.layer_window[static_cast<size_t>(i)],
               output,
               a.rotary ? attention_.inv_freq() : std::span<const float>(no_angles_),
               a.rotary ? attention_.rope_factor() : 1.0f};
    l.softmax_norm = weights_.vector(at + "attn.softmax.norm.weight", norm);
    if (!norm_after()) a.mixed_norm = l.softmax_norm;
    l.linear_weight = config_.linear_weight;
    l.softmax_weight = config_.softmax_weight;
    if (config_.learned_branch_weights) {
      const float* w = weights_.vector(at + "attn.branch_weights", 2);
      l.linear_weight = w[0];
      l.softmax_weight = w[1];
    }
    l.mlp_norm = weights_.vector(at + "mlp_norm.weight", d);
    bind_feed(i, at + "mlp", l);
    return l;
  }

  void bind_feed(int i, const std::string& at, HybridLayer& l) {
    const int64_t d = config_.hidden, f = config_.intermediate;
    if (config_.layer_dense[static_cast<size_t>(i)]) {
      l.mlp = bind_feed_forward(weights_, at, d, f, spikes_, spikes_.of(i));
      return;
    }
    l.moe.shape = {d, config_.experts, config_.experts_per_token,
                   config_.router == RouterFunction::kSoftmax ? RouterGate::kSoftmax : RouterGate::kSigmoid};
    l.moe.router = weights_.matrix(at + ".router.weight", config_.experts, d);
    for (int e = 0; e < config_.experts; ++e)
      l.moe.experts.push_back(
          bind_feed_forward(weights_, at + ".experts." + std::to_string(e), d, f, spikes_, spikes_.of(i)));
    for (int s = 0; s < config_.shared_experts; ++s)
      l.moe.shared.push_back(
          bind_feed_forward(weights_, at + ".shared_experts." + std::to_string(s), d, f, spikes_, spikes_.of(i)));
  }

  const float* norm_rows(Context& ctx, const HybridLayer& l, const float* hidden, int64_t m) {
    float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(m * config_.hidden));
    rms_norm(ctx, hidden, m, config_.hidden, l.attn_norm, config_.norm_eps, normed);
    return normed;
  }

  // hidden += weight * branch [M, D], normalised here or, head by head, already.
  void add_branch(Context& ctx, float* branch, int64_t m, const float* norm, float weight, float* hidden) {
    if (norm_after()) rms_norm(ctx, branch, m, config_.hidden, norm, config_.norm_eps, branch);
    add_scaled(ctx, branch, weight, m * config_.hidden, hidden);
  }

  LinearRows project_linear(Context& ctx, const LayerCall& call, const HybridLayer& l, const float* normed) {
    const LinearBranch& w = l.linear;
    const int64_t m = call.row_count, qs = int64_t{config_.heads} * config_.head_dim,
                  ks = int64_t{config_.kv_heads} * config_.head_dim;
    const LinearRows p{ctx.activation(ActivationSlot::kQuery, static_cast<size_t>(m * qs)),
                       ctx.activation(ActivationSlot::kKey, static_cast<size_t>(m * ks)),
                       ctx.activation(ActivationSlot::kValue, static_cast<size_t>(m * ks)),
                       ctx.activation(ActivationSlot::kDecay, static_cast<size_t>(m * ks)),
                       ctx.activation(ActivationSlot::kMixed, static_cast<size_t>(m * qs))};
    project(ctx, call, SpikeSite::kAttnIn, l.softmax.spikes.of(SpikeSite::kAttnIn), normed,
            {{&w.q, p.q}, {&w.k, p.k}, {&w.v, p.v}});
    sigmoid(ctx, p.q, m * qs);
    tied_gate(ctx, p.k, m * ks, p.k, p.decay);
    return p;
  }

  // out [M, D] = the linear branch of all rows, whose states are `states_`.
  void mix_linear(Context& ctx, const LayerCall& call, const HybridLayer& l, const LinearRows& p, float* out) {
    const int d = config_.head_dim;
    const int64_t m = call.row_count;
    try {
      gated_linear_attention(ctx, {config_.heads, config_.kv_heads, d, d, l.softmax.layer.scale}, states_);
    } catch (const BadInput& error) {
      // tied_gate is never above 0: only activations that are not numbers come here, from weights that are
      // finite one by one but not in a product.
      throw CorruptData("{}: layer {}: the activations are not finite with these weights ({})", dir_, ctx.layer,
                        error.what());
    }
    if (!norm_after()) rms_norm(ctx, p.mixed, m * config_.heads, d, l.linear_norm, config_.norm_eps, p.mixed);
    project(ctx, call, SpikeSite::kOIn, l.softmax.spikes.of(SpikeSite::kOIn), p.mixed, {{&l.linear.o, out}});
  }

  void feed(Context& ctx, const LayerCall& call, const HybridLayer& l, float* hidden) {
    const int64_t m = call.row_count;
    float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(m * config_.hidden));
    rms_norm(ctx, hidden, m, config_.hidden, l.mlp_norm, config_.norm_eps, normed);
    if (l.moe.experts.empty())
      feed_forward(ctx, call, l.mlp, normed, hidden, LinearMode::kAccumulate);
    else
      moe_.forward(ctx, call, l.moe, normed, hidden);
  }

  // The sinks see each other and nothing else, so what they leave in each layer is a constant of the model:
  // keys and values for the softmax branch, a state for the linear one. In f32, whatever sequences will use.
  void run_sinks(Context& ctx) {
    const int64_t m = config_.sinks, d = config_.hidden;
    const KvLayout layout{DType::kF32, config_.head_dim, config_.sinks};
    const auto layers = static_cast<size_t>(config_.layers), heads = static_cast<size_t>(config_.kv_heads);
    sink_pages_ = Buffer(ctx.memory, MemoryTag::kWeights, layers * heads * layout.page_bytes());
    sink_states_ =
        Buffer(ctx.memory, MemoryTag::kWeights, layers * static_cast<size_t>(state_floats()) * sizeof(float));
    std::memset(sink_states_.as<float>(), 0, sink_states_.bytes());
    std::vector<float> positions;  // before the text's first token; or all at 0, where the rotation is none
    for (int64_t i = 0; i < m; ++i) positions.push_back(config_.sink_rope ? static_cast<float>(i - m) : 0.0f);

    struct Exact {
      explicit Exact(Context& c) : ctx(c), before(c.activations) { ctx.activations = ActivationType::kF32; }
      ~Exact() { ctx.activations = before; }
      Context& ctx;
      ActivationType before;
    } exact(ctx);
    Buffer rows(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(m * d) * sizeof(float));
    float* hidden = rows.as<float>();
    std::memcpy(hidden, weights_.matrix("model.sink_embeddings", m, d), rows.bytes());
    sinks_.resize(layers);
    for (int i = 0; i < config_.layers; ++i) {
      ctx.layer = i;
      HybridLayer& l = layers_[static_cast<size_t>(i)];
      SinkKeys& sinks = sinks_[static_cast<size_t>(i)];
      sinks.layout = layout;
      for (size_t g = 0; g < heads; ++g)
        sinks.pages.push_back(sink_pages_.as<std::byte>() + (static_cast<size_t>(i) * heads + g) * layout.page_bytes());
      for (size_t g = 0; g < heads; ++g) sinks.heads.push_back({&sinks.pages[g], 0});

      const float* normed = norm_rows(ctx, l, hidden, m);
      float* branch = ctx.activation(ActivationSlot::kBranch, static_cast<size_t>(m * d));
      attention_.forward_sinks(ctx, l.softmax, sinks, positions, normed, branch);
      add_branch(ctx, branch, m, l.softmax_norm, l.softmax_weight, hidden);
      const LayerCall call{.layer = i, .row_count = m, .call_tokens = m};  // of no sequence, watched by nobody
      const LinearRows p = project_linear(ctx, call, l, normed);
      states_.assign(1, {p.q, p.k, p.v, p.decay, p.mixed, m, sink_state(i)});
      mix_linear(ctx, call, l, p, branch);
      add_branch(ctx, branch, m, l.linear_norm, l.linear_weight, hidden);
      feed(ctx, call, l, hidden);
      l.softmax.sinks = &sinks;
    }
    ctx.layer = -1;
    if (!config_.linear_sees_sinks) sink_states_.reset();
  }

  void describe() {
    info_.architecture = "spikingbrain_moe";
    info_.layers = config_.layers;
    info_.hidden = config_.hidden;
    info_.vocab = config_.vocab;
    info_.max_positions = config_.max_positions;
    info_.parameters = weights_.parameters();
    info_.weight_dtype = layers_[0].softmax.q.dtype();
    info_.weight_bytes = weights_.bytes() + sink_pages_.bytes() + sink_states_.bytes();
    info_.token_weight_bytes = weights_.bytes() + sink_pages_.bytes();
    if (!config_.tie_word_embeddings) info_.token_weight_bytes -= linear_bytes(embedding_);
    // A token reads k experts of each layer.
    for (const HybridLayer& l : layers_)
      for (size_t e = static_cast<size_t>(config_.experts_per_token); e < l.moe.experts.size(); ++e)
        info_.token_weight_bytes -= feed_forward_bytes(l.moe.experts[e]);
  }

  SpikingBrainMoeConfig config_;
  std::string dir_;
  ModelInfo info_;
  WeightBinder weights_;
  AttentionBlock attention_;
  SpikeCoding spikes_;
  MoeBlock moe_;
  std::vector<float> no_angles_;  // [d/2] zeros: rotation of a model without
  LinearWeight embedding_, head_;
  const float* final_norm_ = nullptr;
  std::vector<HybridLayer> layers_;
  std::vector<SinkKeys> sinks_;      // [layers]
  Buffer sink_pages_, sink_states_;  // keys and values; S [layers, G, d, d]
  std::vector<GlaSequence> states_;  // reused: decode allocates nothing
};

}  // namespace

std::unique_ptr<Model> load_spikingbrain_moe(Context& ctx, const std::filesystem::path& dir,
                                             const LoadOptions& options) {
  return std::make_unique<ParallelHybrid>(ctx, dir, options);
}

ModelOutline outline_spikingbrain_moe(const std::filesystem::path& dir) {
  const SpikingBrainMoeConfig c = load_spikingbrain_moe_config(dir);
  ModelOutline o{"spikingbrain_moe", c.layers,  c.hidden,   c.intermediate, c.vocab,
                 c.max_positions,    c.heads,   c.kv_heads, c.head_dim,     c.tie_word_embeddings,
                 c.rope.theta,       c.eos_ids, c.layers};
  for (int i = 0; i < c.layers; ++i) {
    const int64_t window = c.layer_window[static_cast<size_t>(i)];
    o.window_layers += window > 0;
    o.window = std::max(o.window, window);
    o.expert_layers += !c.layer_dense[static_cast<size_t>(i)];
  }
  o.recurrent_layers = c.layers;  // beside attention, in the same layers
  o.state_bytes = int64_t{c.layers} * c.kv_heads * c.head_dim * c.head_dim * 4;
  o.experts = c.experts;
  o.experts_per_token = c.experts_per_token;
  o.shared_experts = c.shared_experts;
  o.sinks = c.sinks;
  return o;
}

}  // namespace lacuna

#include "models/dit.h"

#include <algorithm>
#include <cmath>

#include "kernels/elementwise.h"

namespace lacuna {
namespace {

constexpr int64_t kSinusoid = 256;  // of a timestep

RopeConfig rope_of(double theta) {
  RopeConfig rope;
  rope.theta = theta;
  return rope;
}

// [sin | cos] of t * 10000^(-i / 128), every step in f32 as the published code forms it: in doubles it would differ
// by up to 6e-5 at t = 1000.
void sinusoid(float t, float* out) {
  constexpr int64_t half = kSinusoid / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(-std::log(10000.0)) * static_cast<float>(i) / static_cast<float>(half);
    const float angle = t * std::exp(exponent);
    out[i] = std::sin(angle);
    out[half + i] = std::cos(angle);
  }
}

}  // namespace

Dit::Dit(const ColaDitConfig& config, WeightBinder& weights)
    : config_(config),
      attention_(rope_of(10000), LatentAttention::Pairs::kNeighbours, config.rope_dim, config.layers, config.heads,
                 config.head_dim, config.block,
                 config.dim * (4 * int64_t{config.heads} * config.head_dim + 2 * config.mlp_dim)) {
  const int64_t d = config.dim, inner = attention_.width();
  in_ = weights.linear("txt_in.proj", d, config.channels, true);
  time_in_ = weights.linear("emb_in.proj_in", d, kSinusoid, true);
  time_hidden_ = weights.linear("emb_in.proj_hid", d, d, true);
  time_out_ = weights.linear("emb_in.proj_out", d, d, true);
  const auto norm = [&](const std::string& name, int64_t size) -> LayerNorm {
    return {weights.vector(name + ".weight", size), weights.vector(name + ".bias", size), config.norm_eps};
  };
  for (int i = 0; i < config.layers; ++i) {
    const std::string at = "blocks." + std::to_string(i) + ".";
    Layer l;
    l.qkv = weights.linear(at + "msa.proj_qkv", 3 * inner, d, config.qk_bias);
    l.out = weights.linear(at + "msa.proj_out", d, inner, config.qk_bias);
    l.q_norm = norm(at + "msa.norm_q", config.head_dim);
    l.k_norm = norm(at + "msa.norm_k", config.head_dim);
    l.mlp_in = weights.linear(at + "mlp.proj_in", config.mlp_dim, d, true);
    l.mlp_out = weights.linear(at + "mlp.proj_out", d, config.mlp_dim, true);
    l.attn_shift_scale = weights.linear(at + "ada.msa_in.1", 2 * d, d, true);
    l.attn_gate = weights.linear(at + "ada.msa_out.1", d, d, true);
    l.mlp_shift_scale = weights.linear(at + "ada.mlp_in.1", 2 * d, d, true);
    l.mlp_gate = weights.linear(at + "ada.mlp_out.1", d, d, true);
    layers_.push_back(l);
  }
  final_norm_ = norm("txt_out_norm", d);
  final_shift_scale_ = weights.linear("txt_out_ada.out_in.1", 2 * d, d, true);
  out_ = weights.linear("txt_out.proj", config.channels, d, true);
}

void Dit::modulate(Context& ctx, std::span<const float> t, float* values, float* embedding) const {
  const auto n = static_cast<int64_t>(t.size());
  const int64_t d = config_.dim;
  float* waves = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(n * kSinusoid));
  for (int64_t i = 0; i < n; ++i) sinusoid(t[static_cast<size_t>(i)], waves + i * kSinusoid);
  float* hidden = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(n * d));
  float* act = ctx.activation(ActivationSlot::kBranch, static_cast<size_t>(n * d));
  linear(ctx, time_in_, waves, n, hidden);
  silu(ctx, hidden, n * d);
  linear(ctx, time_hidden_, hidden, n, act);
  silu(ctx, act, n * d);
  linear(ctx, time_out_, act, n, embedding);
  // Every adaptive norm reads SiLU of the embedding.
  std::copy_n(embedding, n * d, act);
  silu(ctx, act, n * d);
  for (size_t i = 0; i < layers_.size(); ++i, values += n * 6 * d) {
    const Layer& l = layers_[i];
    ctx.layer = static_cast<int32_t>(i);
    linear(ctx, l.attn_shift_scale, act, n, values, LinearMode::kStore, 0, 6 * d);
    linear(ctx, l.attn_gate, act, n, values + 2 * d, LinearMode::kStore, 0, 6 * d);
    linear(ctx, l.mlp_shift_scale, act, n, values + 3 * d, LinearMode::kStore, 0, 6 * d);
    linear(ctx, l.mlp_gate, act, n, values + 5 * d, LinearMode::kStore, 0, 6 * d);
  }
  ctx.layer = -1;
  linear(ctx, final_shift_scale_, act, n, values);
}

void Dit::forward(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, const TimestepTable& table,
                  const int32_t* timestep, const float* x, float* v, const ColaShow& show) {
  const int64_t d = config_.dim, inner = attention_.width();
  // Some rows' activations: the residual stream, what a norm makes of it, q | k | v, what attention and the
  // feed-forward put out.
  struct Rows {
    Rows(const LatentAttention::Place& p, int64_t d, int64_t inner)
        : hidden(p.rows(ActivationSlot::kHidden, d)),
          normed(p.rows(ActivationSlot::kNormed, d)),
          qkv(p.rows(ActivationSlot::kQuery, 3 * inner)),
          mixed(p.rows(ActivationSlot::kMixed, inner)),
          branch(p.rows(ActivationSlot::kBranch, d)) {}
    float *hidden, *normed, *qkv, *mixed, *branch;
  };
  // Memory for all of them before threads ask for it.
  const LatentAttention::Place all{ctx, chunk.rows, 0};
  Rows(all, d, inner), all.rows(ActivationSlot::kGate, config_.mlp_dim);
  const LayerNorm plain{nullptr, nullptr, config_.norm_eps};
  const auto layers = static_cast<int>(layers_.size());

  const auto at = [&](int layer, int64_t part, int64_t first) {
    return RowTable{table.layer(layer) + part * d, 6 * d, timestep + first};
  };
  // What a layer's norm of its input, or the last norm, makes of the residual stream lies in `normed` when it is
  // entered.
  const auto into = [&](int layer, int64_t first) {
    return layer < layers ? at(layer, 0, first) : RowTable{table.final(), 2 * d, timestep + first};
  };
  const auto norm_into = [&](int layer) -> const LayerNorm& { return layer < layers ? plain : final_norm_; };
  const auto add_and_norm = [&](Context& c, const RowTable& gate, const LayerNorm& norm, const RowTable& shift_scale,
                                const Rows& r, int64_t n, const char* name, int layer) {
    if (!show) return gated_norm(c, r.branch, gate, norm, r.hidden, n, d, shift_scale, r.normed);
    add_gated(c, r.branch, n, d, gate, r.hidden);
    show("dit", name, layer, r.hidden, d, d);
    adaptive_norm(c, norm, r.hidden, n, d, shift_scale, r.normed);
  };
  const auto enter = [&](Context& c, int layer, int64_t first, int64_t n, const Rows& r) {
    const Layer& l = layers_[static_cast<size_t>(layer)];
    float *q = r.qkv, *k = q + inner;
    c.layer = layer;
    if (show) show("dit", "msa_in", layer, r.normed, d, d);
    linear(c, l.qkv, r.normed, n, q);
    const bool queries = v || layer + 1 < layers;
    if (!show) return attention_.append(c, layer, first, n, q, queries, l.q_norm, l.k_norm);
    layer_norm(c, l.q_norm, q, n, config_.head_dim, q, LinearMode::kStore, config_.heads, 3 * inner);
    layer_norm(c, l.k_norm, k, n, config_.head_dim, k, LinearMode::kStore, config_.heads, 3 * inner);
    show("dit", "q_norm", layer, q, inner, 3 * inner);
    show("dit", "k_norm", layer, k, inner, 3 * inner);
    attention_.append(c, layer, first, n, q, queries);
  };
  const auto leave = [&](Context& c, int layer, int64_t first, int64_t n, const Rows& r, float* wide) {
    const Layer& l = layers_[static_cast<size_t>(layer)];
    c.layer = layer;
    linear(c, l.out, r.mixed, n, r.branch);
    if (show) show("dit", "attn", layer, r.branch, d, d);
    add_and_norm(c, at(layer, 2, first), plain, at(layer, 3, first), r, n, "after_attn", layer);
    if (show) show("dit", "mlp_in", layer, r.normed, d, d);
    gelu_mlp(c, l.mlp_in, l.mlp_out, r.normed, n, wide, r.branch);
    if (show) show("dit", "mlp", layer, r.branch, d, d);
    add_and_norm(c, at(layer, 5, first), norm_into(layer + 1), into(layer + 1, first), r, n, "hidden", layer);
  };

  const auto begin = [&](Context& c, int64_t first, int64_t n, const Rows& r) {
    linear(c, in_, x + first * config_.channels, n, r.hidden);
    if (show) show("dit", "hidden", -1, r.hidden, d, d);
    adaptive_norm(c, norm_into(0), r.hidden, n, d, into(0, first), r.normed);
  };
  const auto end = [&](Context& c, int64_t first, int64_t n, const Rows& r) {
    c.layer = -1;
    linear(c, out_, r.normed, n, v + first * config_.channels);
  };
  ctx.layer = -1;
  // Between two attentions rows go their own way. With packed weights they go it a few at a time, on one thread;
  // pack() sees to it that a product's body does not depend on how many.
  attention_.run(
      ctx, chunk, layout, v ? layers + 1 : layers,
      [&](Context& c, int step, int64_t first, int64_t n, const LatentAttention::Place& place) {
        const Rows r(place, d, inner);
        if (step == 0) begin(c, first, n, r);
        if (step > 0) leave(c, step - 1, first, n, r, place.rows(ActivationSlot::kGate, config_.mlp_dim));
        if (step < layers) enter(c, step, first, n, r);
        if (step == layers) end(c, first, n, r);
      },
      panels_ && !show ? &lanes_ : nullptr);
  ctx.layer = -1;
}

void Dit::pack(Context& ctx) {
  std::vector<LinearWeight*> all = {&in_, &out_};
  for (Layer& l : layers_) all.insert(all.end(), {&l.qkv, &l.out, &l.mlp_in, &l.mlp_out});
  panels_ = pack_panels(ctx, all, kPanelBytes);
}

size_t Dit::velocity_bytes() const {
  size_t n = linear_bytes(in_) + linear_bytes(out_);
  for (const Layer& l : layers_)
    n += linear_bytes(l.qkv) + linear_bytes(l.out) + linear_bytes(l.mlp_in) + linear_bytes(l.mlp_out);
  return n;
}

size_t Dit::timestep_bytes() const {
  size_t n =
      linear_bytes(time_in_) + linear_bytes(time_hidden_) + linear_bytes(time_out_) + linear_bytes(final_shift_scale_);
  for (const Layer& l : layers_)
    n += linear_bytes(l.attn_shift_scale) + linear_bytes(l.attn_gate) + linear_bytes(l.mlp_shift_scale) +
         linear_bytes(l.mlp_gate);
  return n;
}

}  // namespace lacuna

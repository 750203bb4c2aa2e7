#include "models/text_vae.h"

#include <algorithm>

#include "kernels/elementwise.h"

namespace lacuna {
namespace {

LayerNorm bind_norm(WeightBinder& weights, const std::string& name, int64_t size, float eps, bool affine) {
  if (!affine) return {nullptr, nullptr, eps};
  return {weights.vector(name + ".weight", size), weights.vector(name + ".bias", size), eps};
}

// to[i, p, c] = from[i, c, p], or back. The published code lays the tokens of a latent out channel by channel.
void swap_patch(const float* from, int64_t rows, int64_t outer, int64_t inner, float* to) {
  for (int64_t i = 0; i < rows; ++i, from += outer * inner, to += outer * inner)
    for (int64_t a = 0; a < outer; ++a)
      for (int64_t b = 0; b < inner; ++b) to[b * outer + a] = from[a * inner + b];
}

}  // namespace

VaeStack::VaeStack(const ColaVaeConfig& config, WeightBinder& weights, const std::string& part, int blocks)
    : config_(config),
      part_(part),
      attention_(config.rope, LatentAttention::Pairs::kHalves, config.head_dim, config.heads, config.head_dim,
                 config.block) {
  const int64_t d = config.dim;
  for (int i = 0; i < blocks; ++i) {
    const std::string at = part + ".blocks." + std::to_string(i) + ".";
    Block b;
    b.norm_attn = bind_norm(weights, at + "norm_attn", d, config.norm_eps, config.norm_affine);
    b.qkv = weights.linear(at + "qkv_proj", 3 * d, d, config.qk_bias);
    if (config.qk_norm) {
      b.q_norm = bind_norm(weights, at + "q_norm", d, config.norm_eps, config.qk_norm_affine);
      b.k_norm = bind_norm(weights, at + "k_norm", d, config.norm_eps, config.qk_norm_affine);
    }
    b.out = weights.linear(at + "attn_out_proj", d, d, config.bias);
    b.norm_ffn = bind_norm(weights, at + "norm_ffn", d, config.norm_eps, true);
    b.ffn_in = weights.linear(at + "ffn_proj", config.ffn_dim, d, config.bias);
    b.ffn_out = weights.linear(at + "ffn_out", d, config.ffn_dim / 2, config.bias);
    blocks_.push_back(b);
  }
}

void VaeStack::forward(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, float* x, bool to_caches,
                       const ColaShow& show) {
  const int64_t m = chunk.rows, d = config_.dim, f = config_.ffn_dim;
  const bool post = config_.post_norm;
  attention_.begin(ctx, chunk, layout);
  if (show) show(part_.c_str(), "hidden", -1, x, d, d);
  float* normed = ctx.activation(ActivationSlot::kNormed, static_cast<size_t>(m * d));
  float* qkv = ctx.activation(ActivationSlot::kQuery, static_cast<size_t>(m * 3 * d));
  float* mixed = ctx.activation(ActivationSlot::kMixed, static_cast<size_t>(m * d));
  float* both = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(m * f));
  float* act = ctx.activation(ActivationSlot::kUp, static_cast<size_t>(m * f / 2));
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& b = blocks_[i];
    const int layer = static_cast<int>(i);
    ctx.layer = layer;
    const bool last = to_caches && i + 1 == blocks_.size();
    if (!post) layer_norm(ctx, b.norm_attn, x, m, d, normed);
    linear(ctx, b.qkv, post ? x : normed, m, qkv);
    if (config_.qk_norm) {
      layer_norm(ctx, b.q_norm, qkv, m, d, qkv, LinearMode::kStore, 1, 3 * d);
      layer_norm(ctx, b.k_norm, qkv + d, m, d, qkv + d, LinearMode::kStore, 1, 3 * d);
    }
    attention_.rotate(ctx, 0, m, qkv, !last);
    attention_.attend(ctx, layer, chunk, qkv, last ? nullptr : mixed);
    if (last) break;
    // With post_norm the skip branch is normed, not what attention adds to it.
    if (post) layer_norm(ctx, b.norm_attn, x, m, d, x);
    linear(ctx, b.out, mixed, m, x, LinearMode::kAccumulate);

    if (!post) layer_norm(ctx, b.norm_ffn, x, m, d, normed);
    linear(ctx, b.ffn_in, post ? x : normed, m, both);
    silu_mul(ctx, both + f / 2, both, m, f / 2, act, f);  // the second half is the gate
    if (post) {
      linear(ctx, b.ffn_out, act, m, normed);
      layer_norm(ctx, b.norm_ffn, normed, m, d, x, LinearMode::kAccumulate);
    } else {
      linear(ctx, b.ffn_out, act, m, x, LinearMode::kAccumulate);
    }
    if (show) show(part_.c_str(), "hidden", layer, x, d, d);
  }
  ctx.layer = -1;
}

size_t VaeStack::bytes() const {
  size_t n = 0;
  for (const Block& b : blocks_) n += linear_bytes(b.qkv) + linear_bytes(b.out) + linear_bytes(b.ffn_in) + linear_bytes(b.ffn_out);
  return n;
}

size_t VaeStack::last_bytes() const {
  const Block& b = blocks_.back();
  return linear_bytes(b.out) + linear_bytes(b.ffn_in) + linear_bytes(b.ffn_out);
}

TextVae::TextVae(const ColaVaeConfig& config, WeightBinder& weights)
    : config_(config),
      embedding_(weights.linear("encoder.wte", config.vocab + 1, config.dim, false)),
      patch_(weights.convolution("encoder.patch_embedder", config.dim, config.dim, config.patch, true)),
      encoder_(config_, weights, "encoder", config.encoder_blocks),
      posterior_(weights.linear("encoder.final_layer", 2 * config.latent_dim, config.dim, config.bias)),
      in_(weights.linear("decoder.in_layer", config.dim, config.latent_dim, config.bias)),
      decoder_(config_, weights, "decoder", config.decoder_blocks),
      unpatch_(weights.linear("decoder.unpatch_layer", config.dim * config.patch, config.dim, true)),
      head_(weights.linear("decoder.final_layer", config.vocab, config.dim, config.bias)),
      final_norm_(bind_norm(weights, "decoder.final_norm", config.dim, config.norm_eps, true)) {}

void TextVae::encode(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, const int32_t* ids, float* mean,
                     float* logvar, const ColaShow& show) {
  const int64_t m = chunk.rows, d = config_.dim, patch = config_.patch, latent = config_.latent_dim;
  const auto wide = static_cast<size_t>(m * patch * d);
  float* tokens = ctx.activation(ActivationSlot::kBranch, wide);
  embed_rows(ctx, embedding_, ids, m * patch, tokens);
  if (patch > 1) {
    float* by_channel = ctx.activation(ActivationSlot::kGate, wide);
    swap_patch(tokens, m, patch, d, by_channel);
    tokens = by_channel;
  }
  float* x = ctx.activation(ActivationSlot::kHidden, static_cast<size_t>(m * d));
  linear(ctx, patch_, tokens, m, x);
  encoder_.forward(ctx, chunk, layout, x, false, show);

  float* both = ctx.activation(ActivationSlot::kBranch, static_cast<size_t>(m * 2 * latent));
  linear(ctx, posterior_, x, m, both);
  if (config_.encoder_last_norm)
    layer_norm(ctx, {nullptr, nullptr, config_.norm_eps}, both, m, latent, both, LinearMode::kStore, 1, 2 * latent);
  for (int64_t i = 0; i < m; ++i) {
    std::copy_n(both + i * 2 * latent, latent, mean + i * latent);
    for (int64_t c = 0; logvar && c < latent; ++c)
      logvar[i * latent + c] = std::clamp(both[i * 2 * latent + latent + c], -30.0f, 20.0f);
  }
}

void TextVae::decode(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, const float* z, float* logits,
                     const ColaShow& show) {
  const int64_t m = chunk.rows, d = config_.dim, patch = config_.patch;
  float* x = ctx.activation(ActivationSlot::kHidden, static_cast<size_t>(m * d));
  linear(ctx, in_, z, m, x);
  decoder_.forward(ctx, chunk, layout, x, !logits, show);
  if (!logits) return;

  float* tokens = ctx.activation(ActivationSlot::kBranch, static_cast<size_t>(m * patch * d));
  linear(ctx, unpatch_, x, m, tokens);
  if (patch > 1) {
    float* by_token = ctx.activation(ActivationSlot::kGate, static_cast<size_t>(m * patch * d));
    swap_patch(tokens, m, d, patch, by_token);
    tokens = by_token;
  }
  layer_norm(ctx, final_norm_, tokens, m * patch, d, tokens);
  linear(ctx, head_, tokens, m * patch, logits);
}

size_t TextVae::encode_bytes() const { return linear_bytes(patch_) + encoder_.bytes() + linear_bytes(posterior_); }

size_t TextVae::append_bytes() const { return linear_bytes(in_) + decoder_.bytes() - decoder_.last_bytes(); }

size_t TextVae::decode_bytes() const {
  return linear_bytes(in_) + decoder_.bytes() + linear_bytes(unpatch_) + linear_bytes(head_);
}

}  // namespace lacuna

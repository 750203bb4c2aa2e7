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
      attention_(config.rope, LatentAttention::Pairs::kHalves, config.head_dim, blocks, config.heads, config.head_dim,
                 config.block, config.dim * (4 * config.dim + config.ffn_dim + config.ffn_dim / 2)) {
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
  const int64_t d = config_.dim, f = config_.ffn_dim;
  const bool post = config_.post_norm;
  if (show) show(part_.c_str(), "hidden", -1, x, d, d);
  const auto blocks = static_cast<int>(blocks_.size());

  // Memory for all rows before threads ask for it.
  const LatentAttention::Place all{ctx, chunk.rows, 0};
  for (const auto& [slot, width] :
       {std::pair{ActivationSlot::kNormed, d}, {ActivationSlot::kGate, f}, {ActivationSlot::kUp, f / 2}})
    all.rows(slot, width);
  const auto enter = [&](Context& c, int layer, int64_t first, int64_t n, const LatentAttention::Place& place) {
    const Block& b = blocks_[static_cast<size_t>(layer)];
    float *h = x + first * d, *norm = place.rows(ActivationSlot::kNormed, d);
    float *q = place.rows(ActivationSlot::kQuery, 3 * d), *k = q + d;
    c.layer = layer;
    if (!post) layer_norm(c, b.norm_attn, h, n, d, norm);
    linear(c, b.qkv, post ? h : norm, n, q);
    if (config_.qk_norm) {
      layer_norm(c, b.q_norm, q, n, d, q, LinearMode::kStore, 1, 3 * d);
      layer_norm(c, b.k_norm, k, n, d, k, LinearMode::kStore, 1, 3 * d);
    }
    attention_.append(c, layer, first, n, q, !to_caches || layer + 1 < blocks);
  };
  const auto leave = [&](Context& c, int layer, int64_t first, int64_t n, const LatentAttention::Place& place) {
    const Block& b = blocks_[static_cast<size_t>(layer)];
    float *h = x + first * d, *norm = place.rows(ActivationSlot::kNormed, d);
    float *gate = place.rows(ActivationSlot::kGate, f), *a = place.rows(ActivationSlot::kUp, f / 2);
    c.layer = layer;
    // With post_norm the skip branch is normed, not what attention adds to it.
    if (post) layer_norm(c, b.norm_attn, h, n, d, h);
    linear(c, b.out, place.rows(ActivationSlot::kMixed, d), n, h, LinearMode::kAccumulate);

    if (!post) layer_norm(c, b.norm_ffn, h, n, d, norm);
    linear(c, b.ffn_in, post ? h : norm, n, gate);
    silu_mul(c, gate + f / 2, gate, n, f / 2, a, f);  // the second half is the gate
    if (post) {
      linear(c, b.ffn_out, a, n, norm);
      layer_norm(c, b.norm_ffn, norm, n, d, h, LinearMode::kAccumulate);
    } else {
      linear(c, b.ffn_out, a, n, h, LinearMode::kAccumulate);
    }
    if (show) show(part_.c_str(), "hidden", layer, h, d, d);
  };

  // Rows go their own way between two attentions, as in the DiT.
  attention_.run(
      ctx, chunk, layout, to_caches ? blocks : blocks + 1,
      [&](Context& c, int step, int64_t first, int64_t n, const LatentAttention::Place& place) {
        if (step > 0) leave(c, step - 1, first, n, place);
        if (step < blocks) enter(c, step, first, n, place);
      },
      blocks_[0].qkv.panels && !show ? &lanes_ : nullptr);
  ctx.layer = -1;
}

void VaeStack::matrices(std::vector<LinearWeight*>& all) {
  for (Block& b : blocks_) all.insert(all.end(), {&b.qkv, &b.out, &b.ffn_in, &b.ffn_out});
}

size_t VaeStack::bytes() const {
  size_t n = 0;
  for (const Block& b : blocks_)
    n += linear_bytes(b.qkv) + linear_bytes(b.out) + linear_bytes(b.ffn_in) + linear_bytes(b.ffn_out);
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

  const auto wide = static_cast<size_t>(m * patch * d);
  float* tokens = ctx.activation(ActivationSlot::kBranch, wide);
  float* swapped = patch > 1 ? ctx.activation(ActivationSlot::kGate, wide) : tokens;
  const auto name = [&](Context& c, int64_t first, int64_t n) {
    const int64_t at = first * patch * d;
    float* token = swapped + at;
    linear(c, unpatch_, x + first * d, n, tokens + at);
    if (patch > 1) swap_patch(tokens + at, n, d, patch, token);
    layer_norm(c, final_norm_, token, n * patch, d, token);
    linear(c, head_, token, n * patch, logits + first * patch * config_.vocab);
  };
  if (head_.panels)
    lanes_.rows(ctx, m, name);
  else
    name(ctx, 0, m);
}

void TextVae::pack(Context& ctx) {
  std::vector<LinearWeight*> all = {&patch_, &posterior_, &in_, &unpatch_, &head_};
  encoder_.matrices(all);
  decoder_.matrices(all);
  panels_ = pack_panels(ctx, all, kPanelBytes);
}

size_t TextVae::encode_bytes() const { return linear_bytes(patch_) + encoder_.bytes() + linear_bytes(posterior_); }

size_t TextVae::append_bytes() const { return linear_bytes(in_) + decoder_.bytes() - decoder_.last_bytes(); }

size_t TextVae::decode_bytes() const {
  return linear_bytes(in_) + decoder_.bytes() + linear_bytes(unpatch_) + linear_bytes(head_);
}

}  // namespace lacuna

#pragma once

#include <functional>
#include <span>
#include <vector>

#include "formats/cola_config.h"
#include "kernels/layer_norm.h"
#include "models/cola.h"
#include "models/latent_attention.h"
#include "models/weights.h"

namespace lacuna {

// Rows of a call that a ColaTap shows.
using ColaShow = std::function<void(const char* part, const char* name, int layer, const float* data, int64_t width,
                                    int64_t stride)>;

// One half of Cola DLM's text VAE: blocks of softmax attention and SwiGLU, the same for encoder and decoder.
class VaeStack {
 public:
  VaeStack(const ColaVaeConfig& config, WeightBinder& weights, const std::string& part, int blocks);

  // x [chunk.rows, dim] in place. to_caches: x is not read any more, and what reaches no cache is not computed.
  void forward(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, float* x, bool to_caches,
               const ColaShow& show);
  void matrices(std::vector<LinearWeight*>& all);  // appends
  size_t bytes() const;
  // … of what a forward to_caches does not read.
  size_t last_bytes() const;

 private:
  struct Block {
    LayerNorm norm_attn, norm_ffn, q_norm, k_norm;
    LinearWeight qkv, out, ffn_in, ffn_out;
  };
  ColaVaeConfig config_;
  std::string part_;
  std::vector<Block> blocks_;
  LatentAttention attention_;
  Lanes lanes_;
};

// Embedding and encoder to posterior, latents through the decoder to logits.
class TextVae {
 public:
  TextVae(const ColaVaeConfig& config, WeightBinder& weights);

  // Posterior of a chunk: ids [chunk.rows * patch]; mean, logvar [chunk.rows, latent_dim], logvar may be null.
  void encode(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, const int32_t* ids, float* mean,
              float* logvar, const ColaShow& show);
  // logits [chunk.rows * patch, vocab] of z [chunk.rows, latent_dim]; null: to caches only.
  void decode(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, const float* z, float* logits,
              const ColaShow& show);

  // As Dit::pack.
  void pack(Context& ctx);
  size_t packed_bytes() const { return panels_.bytes(); }

  size_t encode_bytes() const, decode_bytes() const, append_bytes() const;

 private:
  ColaVaeConfig config_;
  LinearWeight embedding_, patch_;            // [vocab + 1, dim], [dim, dim * patch]
  VaeStack encoder_;
  LinearWeight posterior_;                    // [2 * latent_dim, dim]
  LinearWeight in_;                           // [dim, latent_dim]
  VaeStack decoder_;
  LinearWeight unpatch_, head_;               // [dim * patch, dim], [vocab, dim]
  LayerNorm final_norm_;
  Buffer panels_;
  Lanes lanes_;
};

}  // namespace lacuna

#pragma once

#include <span>
#include <vector>

#include "formats/cola_config.h"
#include "kernels/layer_norm.h"
#include "models/cola.h"
#include "models/latent_attention.h"
#include "models/text_vae.h"
#include "models/weights.h"

namespace lacuna {

// Cola DLM's prior: Transformer layers with adaptive layer norms over latents and a time for each of them.
class Dit {
 public:
  Dit(const ColaDitConfig& config, WeightBinder& weights);

  // values [6 * dim * n a layer, layer by layer, then 2 * dim * n], embedding [n, dim]: TimestepTable's.
  void modulate(Context& ctx, std::span<const float> t, float* values, float* embedding) const;
  // v [chunk.rows, channels] of x, row i at timestep[i] of the table; null: to caches only.
  void forward(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, const TimestepTable& table,
               const int32_t* timestep, const float* x, float* v, const ColaShow& show);

  // Packs the weights of the layers once more if they are few enough to stay in a cache (LinearWeight::panels).
  void pack(Context& ctx);
  size_t packed_bytes() const { return panels_.bytes(); }

  DType weight_dtype() const { return layers_[0].qkv.weight.dtype; }
  size_t velocity_bytes() const, timestep_bytes() const;

 private:
  struct Layer {
    LayerNorm q_norm, k_norm;  // [head_dim], shared by the heads
    LinearWeight qkv, out, mlp_in, mlp_out;
    LinearWeight attn_shift_scale, attn_gate, mlp_shift_scale, mlp_gate;  // of the time embedding
  };
  ColaDitConfig config_;
  LinearWeight in_, out_;
  LinearWeight time_in_, time_hidden_, time_out_;
  std::vector<Layer> layers_;
  LayerNorm final_norm_;
  LinearWeight final_shift_scale_;
  LatentAttention attention_;
  Buffer panels_;
  Lanes lanes_;
};

}  // namespace lacuna

#pragma once

#include <cstdint>
#include <filesystem>

#include "formats/config.h"

namespace lacuna {

// config.json of Cola DLM's text VAE (model_type cola_text_vae; ColaTextVAEConfig of ByteDance-Seed/Cola-DLM).
// Fields that only training reads (dropout, init_*) and those that the published code stores and never reads
// (causal, use_emb) are not here. What no published checkpoint uses and this build does not run is Unsupported:
// block_causal = false (which the published code takes for "no mask at all"), use_variation = false,
// shared_heads_kv other than 1, clip_qkv, activations other than swiglu, norms other than layer_norm.
struct ColaVaeConfig {
  int64_t vocab = 0;  // the embedding has one row more: the mask token of training
  int encoder_blocks = 0, decoder_blocks = 0;
  int64_t dim = 0;
  int64_t ffn_dim = 0;    // both halves of SwiGLU together; even
  int64_t latent_dim = 0;
  int64_t patch = 1;      // tokens a latent
  int heads = 0, head_dim = 0;  // head_dim = dim / heads, even
  int64_t block = 4;      // latents that see each other; 1 = causal
  float norm_eps = 1e-6f;
  bool norm_affine = true;         // of norm_attn alone
  bool post_norm = true;
  bool bias = true, qk_bias = false;  // qk_bias: of the fused q, k and v product
  bool qk_norm = true, qk_norm_affine = true;
  bool encoder_last_norm = true;   // the posterior's mean is normalised over its latent_dim values
  RopeConfig rope;                 // half-split pairs over head_dim
  // What the DiT works on: (latent - shift) * scale. Never undone before decoding.
  float scaling_factor = 1, shifting_factor = 0;
  StoredWeights stored = StoredWeights::kFloat;
};

// config.json of Cola DLM's prior (model_type cola_dit; ColaDiTConfig). patch_size other than 1 is Unsupported: the
// published code does not run it either (query lengths stay unpatched).
struct ColaDitConfig {
  int64_t channels = 0;   // txt_in_channels = txt_out_channels
  int64_t dim = 0;        // txt_dim = emb_dim
  int heads = 0, head_dim = 0;  // heads * head_dim need not be dim
  int64_t mlp_dim = 0;    // dim * expand_ratio
  int layers = 0;
  float norm_eps = 1e-5f;
  bool qk_bias = false;   // of q, k, v and of the attention's output
  int rope_dim = 0;       // even, at most head_dim; pairs (2i, 2i + 1), theta 10000
  int64_t block = 4;      // latents that are denoised together and see each other
  StoredWeights stored = StoredWeights::kFloat;
};

struct ColaConfig {
  ColaVaeConfig vae;
  ColaDitConfig dit;
  std::filesystem::path vae_dir, dit_dir;
  std::filesystem::path tokenizer_dir;  // has tokenizer.json; empty: neither the folder nor its cola_dlm has one

  int64_t latent_dim() const { return vae.latent_dim; }
  // Tokens of one block of the DiT.
  int64_t block_tokens() const { return dit.block * vae.patch; }
};

// Whether dir, or its folder cola_dlm, has a folder cola_dit or cola_vae. Reads nothing.
bool is_cola_checkpoint(const std::filesystem::path& dir);

// The published layout DIR/cola_dlm/{cola_vae,cola_dit} or the flat one DIR/{cola_vae,cola_dit}; fields have the
// published classes' defaults, block_size 4 among them, though released checkpoints write 1 and 16. Faults are
// CorruptData (BadInput where dir has no such folders), variants that this build does not run Unsupported; each names
// file and field. Checks as well that the halves fit: channels = latent_dim.
ColaConfig load_cola_config(const std::filesystem::path& dir);
ColaVaeConfig parse_cola_vae_config(const ConfigFile& config);
ColaDitConfig parse_cola_dit_config(const ConfigFile& config);
// The check that the two halves fit; `vae` and `dit` name the files in its message.
void check_cola_halves(const ColaVaeConfig& vae, const ColaDitConfig& dit, const std::string& vae_file,
                       const std::string& dit_file);

}  // namespace lacuna

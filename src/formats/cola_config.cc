#include "formats/cola_config.h"

#include <system_error>

namespace lacuna {
namespace {

namespace fs = std::filesystem;

// Far above any model, far below where products of three sizes leave int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kMaxBlock = 1 << 20;
constexpr int64_t kMaxPatch = 1 << 10;

int size(const ConfigFile& config, std::string_view field, int64_t max, int64_t fallback) {
  return static_cast<int>(config.integer(field, 1, max, fallback));
}

float epsilon(const ConfigFile& config, std::string_view field, double fallback) {
  return static_cast<float>(config.number(field, 1e-30, 1, fallback));
}

// A boolean with one value that this build runs.
void require(const ConfigFile& config, std::string_view field, bool needed, bool fallback, std::string_view expected) {
  if (config.boolean(field, fallback) != needed) config.unsupported(field, expected);
}

void check_type(const ConfigFile& config, std::string_view type) {
  if (config.text("model_type") != type) config.wrong("model_type", fmt::format("\"{}\" here", type));
}

bool is_folder(const fs::path& path) {
  std::error_code error;
  return fs::is_directory(path, error);
}

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

// The folder that holds both halves, or at least one of them.
fs::path halves_of(const fs::path& dir) {
  for (const fs::path& at : {dir / "cola_dlm", dir})
    if (is_folder(at / "cola_vae") || is_folder(at / "cola_dit")) return at;
  return {};
}

}  // namespace

bool is_cola_checkpoint(const fs::path& dir) { return !halves_of(dir).empty(); }

ColaVaeConfig parse_cola_vae_config(const ConfigFile& config) {
  check_type(config, "cola_text_vae");
  ColaVaeConfig m;
  m.vocab = config.integer("vocab_size", 1, kMaxVocab, 100278);
  m.encoder_blocks = size(config, "encoder_num_blocks", kMaxLayers, 4);
  m.decoder_blocks = size(config, "decoder_num_blocks", kMaxLayers, 4);
  m.dim = config.integer("dim", 1, kMaxWidth, 1536);
  m.ffn_dim = config.integer("ffn_dim", 2, kMaxWidth, 6144);
  if (m.ffn_dim % 2 != 0) config.wrong("ffn_dim", "an even number: the two halves of SwiGLU");
  m.latent_dim = config.integer("latent_dim", 1, kMaxWidth, 16);
  m.patch = config.integer("patch_size", 1, kMaxPatch, 1);
  m.heads = size(config, "num_heads", kMaxWidth, 12);
  if (m.dim % m.heads != 0) config.wrong("num_heads", fmt::format("a divisor of dim = {}", m.dim));
  m.head_dim = static_cast<int>(m.dim / m.heads);
  if (m.head_dim % 2 != 0)
    config.wrong("num_heads", fmt::format("an even size of a head (it is {}): rotary embedding turns pairs", m.head_dim));
  if (config.integer("shared_heads_kv", 1, kMaxWidth, 1) != 1) config.unsupported("shared_heads_kv", "1");
  m.block = config.integer("block_size", 1, kMaxBlock, 4);
  if (config.text("layer_norm_type", "layer_norm") != "layer_norm")
    config.unsupported("layer_norm_type", "\"layer_norm\"");
  m.norm_eps = epsilon(config, "layer_norm_eps", 1e-6);
  m.norm_affine = config.boolean("layer_norm_affine", true);
  m.post_norm = config.boolean("post_norm", true);
  m.bias = config.boolean("bias", true);
  m.qk_bias = config.boolean("qk_bias", false);
  m.qk_norm = config.boolean("qk_norm", true);
  m.qk_norm_affine = config.boolean("qk_norm_affine", true);
  m.encoder_last_norm = config.boolean("encoder_last_ln", true);
  if (config.has("clip_qkv")) config.unsupported("clip_qkv", "null");
  if (config.text("act", "swiglu") != "swiglu") config.unsupported("act", "\"swiglu\"");
  require(config, "block_causal", true, true, "true: false means no mask at all in the published code");
  require(config, "use_variation", true, true, "true: a posterior with mean and variance");
  m.rope.theta = config.number("rope_theta", 1, 1e12, 500000);
  m.scaling_factor = static_cast<float>(config.number("scaling_factor", -1e6, 1e6, 1));
  m.shifting_factor = static_cast<float>(config.number("shifting_factor", -1e6, 1e6, 0));
  m.stored = parse_stored_weights(config);
  return m;
}

ColaDitConfig parse_cola_dit_config(const ConfigFile& config) {
  check_type(config, "cola_dit");
  ColaDitConfig m;
  m.channels = config.integer("txt_in_channels", 1, kMaxWidth, 16);
  if (config.integer("txt_out_channels", 1, kMaxWidth, 16) != m.channels)
    config.wrong("txt_out_channels", fmt::format("txt_in_channels = {}: velocities of latents", m.channels));
  m.dim = config.integer("txt_dim", 1, kMaxWidth, 2048);
  if (config.integer("emb_dim", 1, kMaxWidth, 2048) != m.dim)
    config.wrong("emb_dim", fmt::format("txt_dim = {}: adaptive norms read both", m.dim));
  m.heads = size(config, "heads", kMaxWidth, 16);
  m.head_dim = size(config, "head_dim", 65536, 128);
  if (int64_t{m.heads} * m.head_dim > kMaxWidth)
    config.wrong("heads", fmt::format("heads * head_dim of at most {} (head_dim is {})", kMaxWidth, m.head_dim));
  m.mlp_dim = m.dim * config.integer("expand_ratio", 1, 1024, 4);
  m.layers = size(config, "num_layers", kMaxLayers, 24);
  m.norm_eps = epsilon(config, "norm_eps", 1e-5);
  m.qk_bias = config.boolean("qk_bias", false);
  if (config.integer("patch_size", 1, kMaxPatch, 1) != 1) config.unsupported("patch_size", "1");
  m.rope_dim = size(config, "rope_dim", 65536, 96);
  if (m.rope_dim % 2 != 0 || m.rope_dim > m.head_dim)
    config.wrong("rope_dim", fmt::format("an even number of at most head_dim = {}", m.head_dim));
  m.block = config.integer("block_size", 1, kMaxBlock, 4);
  m.stored = parse_stored_weights(config);
  return m;
}

void check_cola_halves(const ColaVaeConfig& vae, const ColaDitConfig& dit, const std::string& vae_file,
                       const std::string& dit_file) {
  if (vae.latent_dim != dit.channels)
    throw CorruptData("{}: field 'txt_in_channels': found {}, expected latent_dim = {} of {}", dit_file, dit.channels,
                      vae.latent_dim, vae_file);
}

ColaConfig load_cola_config(const fs::path& dir) {
  const fs::path at = halves_of(dir);
  if (at.empty())
    throw BadInput("{}: found no Cola DLM checkpoint, expected folders cola_vae and cola_dit, here or in cola_dlm",
                   dir.string());
  ColaConfig config;
  config.vae_dir = at / "cola_vae";
  config.dit_dir = at / "cola_dit";
  const ConfigFile vae = ConfigFile::load(config.vae_dir / "config.json");
  const ConfigFile dit = ConfigFile::load(config.dit_dir / "config.json");
  config.vae = parse_cola_vae_config(vae);
  config.dit = parse_cola_dit_config(dit);
  check_cola_halves(config.vae, config.dit, vae.file(), dit.file());
  for (const fs::path& place : {dir, dir / "cola_dlm"})
    if (config.tokenizer_dir.empty() && is_file(place / "tokenizer.json")) config.tokenizer_dir = place;
  return config;
}

}  // namespace lacuna

#include "formats/cola_config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "refusals.h"

namespace lacuna {
namespace {

using refusals::expect_says;
using refusals::refusal;

using Json = nlohmann::json;
namespace fs = std::filesystem;

// The released checkpoint's two configurations, without the fields that every checkpoint carries.
Json vae() {
  return {{"model_type", "cola_text_vae"}, {"vocab_size", 100278}, {"encoder_num_blocks", 4}, {"decoder_num_blocks", 4},
          {"dim", 1536}, {"ffn_dim", 6144}, {"latent_dim", 16}, {"patch_size", 1}, {"num_heads", 12},
          {"shared_heads_kv", 1}, {"encoder_last_ln", true}, {"layer_norm_type", "layer_norm"},
          {"layer_norm_eps", 1e-6}, {"layer_norm_affine", true}, {"post_norm", true}, {"qk_bias", false},
          {"qk_norm", true}, {"qk_norm_affine", true}, {"clip_qkv", nullptr}, {"rope_theta", 500000},
          {"rope_full_precision", true}, {"bias", true}, {"dropout", 0.0}, {"attn_dropout", 0.0}, {"act", "swiglu"},
          {"causal", false}, {"block_causal", true}, {"block_size", 1}, {"init_fn", "normal"}, {"init_std", 0.02},
          {"init_cutoff_factor", 3}, {"use_variation", true}, {"use_emb", true}, {"scaling_factor", 1.0},
          {"shifting_factor", 0.0}};
}
Json dit() {
  return {{"model_type", "cola_dit"}, {"txt_in_channels", 16}, {"txt_out_channels", 16}, {"txt_dim", 2048},
          {"emb_dim", 2048}, {"heads", 16}, {"head_dim", 128}, {"expand_ratio", 4}, {"num_layers", 24},
          {"norm_eps", 1e-5}, {"qk_bias", false}, {"patch_size", 1}, {"rope_dim", 96}, {"block_size", 16}};
}

ColaVaeConfig parse_vae(const Json& json) {
  return parse_cola_vae_config(ConfigFile::parse(json.dump(), "dir/cola_vae/config.json"));
}
ColaDitConfig parse_dit(const Json& json) {
  return parse_cola_dit_config(ConfigFile::parse(json.dump(), "dir/cola_dit/config.json"));
}

TEST(ColaConfig, ReadsTheReleasedOne) {
  const ColaVaeConfig v = parse_vae(vae());
  EXPECT_EQ(v.vocab, 100278);
  EXPECT_EQ(v.dim, 1536);
  EXPECT_EQ(v.ffn_dim, 6144);
  EXPECT_EQ(v.heads, 12);
  EXPECT_EQ(v.head_dim, 128);
  EXPECT_EQ(v.block, 1);
  EXPECT_EQ(v.rope.theta, 500000);
  EXPECT_TRUE(v.post_norm && v.bias && v.qk_norm && v.qk_norm_affine && v.norm_affine && v.encoder_last_norm);
  EXPECT_FALSE(v.qk_bias);
  EXPECT_EQ(v.scaling_factor, 1);
  EXPECT_EQ(v.shifting_factor, 0);
  const ColaDitConfig d = parse_dit(dit());
  EXPECT_EQ(d.channels, 16);
  EXPECT_EQ(d.dim, 2048);
  EXPECT_EQ(d.heads, 16);
  EXPECT_EQ(d.head_dim, 128);
  EXPECT_EQ(d.mlp_dim, 8192);
  EXPECT_EQ(d.layers, 24);
  EXPECT_EQ(d.rope_dim, 96);
  EXPECT_EQ(d.block, 16);
  EXPECT_EQ(d.norm_eps, 1e-5f);
}

// But for block_size the released values are the published classes' defaults.
TEST(ColaConfig, DefaultsAreThePublishedClasses) {
  const ColaVaeConfig v = parse_vae({{"model_type", "cola_text_vae"}}), released = parse_vae(vae());
  EXPECT_EQ(v.block, 4);
  EXPECT_EQ(v.vocab, released.vocab);
  EXPECT_EQ(v.dim, released.dim);
  EXPECT_EQ(v.ffn_dim, released.ffn_dim);
  EXPECT_EQ(v.heads, released.heads);
  EXPECT_EQ(v.latent_dim, released.latent_dim);
  EXPECT_EQ(v.encoder_blocks, released.encoder_blocks);
  EXPECT_EQ(v.decoder_blocks, released.decoder_blocks);
  EXPECT_EQ(v.norm_eps, released.norm_eps);
  EXPECT_EQ(v.rope, released.rope);
  EXPECT_TRUE(v.post_norm && v.bias && v.qk_norm && v.qk_norm_affine && v.norm_affine && v.encoder_last_norm);
  EXPECT_FALSE(v.qk_bias);
  const ColaDitConfig d = parse_dit({{"model_type", "cola_dit"}}), whole = parse_dit(dit());
  EXPECT_EQ(d.block, 4);
  EXPECT_EQ(d.channels, whole.channels);
  EXPECT_EQ(d.dim, whole.dim);
  EXPECT_EQ(d.heads, whole.heads);
  EXPECT_EQ(d.head_dim, whole.head_dim);
  EXPECT_EQ(d.mlp_dim, whole.mlp_dim);
  EXPECT_EQ(d.layers, whole.layers);
  EXPECT_EQ(d.rope_dim, whole.rope_dim);
  EXPECT_EQ(d.norm_eps, whole.norm_eps);
}

TEST(ColaConfig, RefusesWhatDoesNotFit) {
  const auto wrong_vae = [](const char* field, const Json& value, std::initializer_list<const char*> parts) {
    Json j = vae();
    j[field] = value;
    const std::string message = refusal<CorruptData>([&] { parse_vae(j); });
    expect_says(message, {"dir/cola_vae/config.json", field});
    expect_says(message, parts);
  };
  wrong_vae("model_type", "cola_dit", {"cola_text_vae"});
  wrong_vae("num_heads", 7, {"divisor", "1536"});
  wrong_vae("num_heads", 512, {"even", "3"});
  wrong_vae("num_heads", 0, {"found 0"});
  wrong_vae("ffn_dim", 6143, {"even"});
  wrong_vae("block_size", 0, {"found 0"});
  wrong_vae("block_size", -4, {});
  wrong_vae("patch_size", 0, {});
  wrong_vae("dim", int64_t{1} << 40, {});
  wrong_vae("vocab_size", "many", {"many"});
  wrong_vae("layer_norm_eps", 0, {});
  wrong_vae("rope_theta", -1, {});
  wrong_vae("scaling_factor", "1", {});
  wrong_vae("post_norm", 1, {"true or false"});
  const auto wrong_dit = [](const char* field, const Json& value, std::initializer_list<const char*> parts) {
    Json j = dit();
    j[field] = value;
    const std::string message = refusal<CorruptData>([&] { parse_dit(j); });
    expect_says(message, {"dir/cola_dit/config.json", field});
    expect_says(message, parts);
  };
  wrong_dit("model_type", "cola_text_vae", {"cola_dit"});
  wrong_dit("txt_out_channels", 8, {"txt_in_channels = 16"});
  wrong_dit("emb_dim", 1024, {"txt_dim = 2048"});
  wrong_dit("rope_dim", 130, {"head_dim = 128"});
  wrong_dit("rope_dim", 95, {"even"});
  wrong_dit("rope_dim", 0, {});
  wrong_dit("block_size", 0, {});
  wrong_dit("heads", 1 << 20, {"head_dim is 128"});
  wrong_dit("expand_ratio", 1.5, {"1.5"});
  wrong_dit("num_layers", -1, {});
}

TEST(ColaConfig, SaysWhatItDoesNotRun) {
  const auto unsupported_vae = [](const char* field, const Json& value) {
    Json j = vae();
    j[field] = value;
    expect_says(refusal<Unsupported>([&] { parse_vae(j); }), {"dir/cola_vae/config.json", field, "supports"});
  };
  unsupported_vae("block_causal", false);
  unsupported_vae("use_variation", false);
  unsupported_vae("act", "gelu");
  unsupported_vae("act", "strange");
  unsupported_vae("layer_norm_type", "rms");
  unsupported_vae("shared_heads_kv", 12);
  unsupported_vae("clip_qkv", 5.0);
  Json j = dit();
  j["patch_size"] = 2;
  expect_says(refusal<Unsupported>([&] { parse_dit(j); }), {"patch_size"});
}

class Folder {
 public:
  Folder() : path(fs::temp_directory_path() / ("lacuna_cola_config_" + std::to_string(getpid()))) { fs::create_directories(path); }
  ~Folder() {
    std::error_code error;
    fs::remove_all(path, error);
  }
  void write(const fs::path& at, const Json& json) const {
    fs::create_directories((path / at).parent_path());
    std::ofstream(path / at) << json.dump();
  }
  const fs::path path;
};

TEST(ColaConfig, FindsNestedAndFlatFolders) {
  Folder f;
  EXPECT_FALSE(is_cola_checkpoint(f.path));
  EXPECT_FALSE(is_cola_checkpoint(f.path / "nowhere"));
  expect_says(refusal<BadInput>([&] { load_cola_config(f.path); }), {f.path.c_str(), "cola_vae", "cola_dit"});
  f.write("cola_vae/config.json", vae());
  EXPECT_TRUE(is_cola_checkpoint(f.path));
  expect_says(refusal<IoError>([&] { load_cola_config(f.path); }), {"cola_dit"});
  f.write("cola_dit/config.json", dit());
  const ColaConfig flat = load_cola_config(f.path);
  EXPECT_EQ(flat.vae_dir, f.path / "cola_vae");
  EXPECT_EQ(flat.dit_dir, f.path / "cola_dit");
  EXPECT_TRUE(flat.tokenizer_dir.empty());
  EXPECT_EQ(flat.block_tokens(), 16);
  f.write("cola_dlm/tokenizer.json", {});
  f.write("cola_dlm/cola_vae/config.json", vae());
  Json narrow = dit();
  narrow["txt_in_channels"] = narrow["txt_out_channels"] = 8;
  f.write("cola_dlm/cola_dit/config.json", narrow);
  expect_says(refusal<CorruptData>([&] { load_cola_config(f.path); }), {"txt_in_channels", "8", "latent_dim = 16"});
  f.write("cola_dlm/cola_dit/config.json", dit());
  const ColaConfig nested = load_cola_config(f.path);
  EXPECT_EQ(nested.vae_dir, f.path / "cola_dlm" / "cola_vae");
  EXPECT_EQ(nested.tokenizer_dir, f.path / "cola_dlm");
  EXPECT_EQ(load_cola_config(f.path / "cola_dlm").vae_dir, nested.vae_dir);
}

}  // namespace
}  // namespace lacuna

// formats: safetensors, config.json, sampling parameters: code that parses untrusted bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "formats/config_file.h"
#include "formats/rope.h"

namespace lacuna {

// How matrices are stored in the checkpoint. kInt8PerRow: `X.weight` is I8 [out, in] with a
// companion `X.weight_scale` F32 [out], w = code · scale; written by `lacuna convert`.
enum class StoredWeights : uint8_t { kFloat, kInt8PerRow };

// config.json of the Transformer families llama, mistral, qwen2 and qwen3, with each family's own
// defaults and rules already applied (transformers 5, models/<family>/configuration_*.py).
struct ModelConfig {
  std::string model_type;
  int64_t vocab = 0;
  int64_t hidden = 0;        // D
  int64_t intermediate = 0;  // F
  int layers = 0;
  int heads = 0;     // query heads H
  int kv_heads = 0;  // divides heads
  int head_dim = 0;  // even; need not be hidden / heads
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;  // RMSNorm over head_dim on q and k, before RoPE
  int64_t max_positions = 0;
  // [layers]: keys a query sees, itself included (key > query − window); 0 = all before it.
  std::vector<int64_t> layer_window;
  RopeConfig rope;
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;  // any of them ends the text
  StoredWeights stored = StoredWeights::kFloat;
};

// generation_config.json: what the checkpoint's makers suggest. Absent fields stay empty.
struct GenerationConfig {
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;
  std::optional<bool> do_sample;
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int> top_k;
  std::optional<int64_t> max_new_tokens;
};

// config.json's model_type, the key of the registry.
std::string load_model_type(const std::filesystem::path& dir);

// Faults are CorruptData, other families and variants Unsupported; each names file and field.
ModelConfig load_model_config(const std::filesystem::path& dir);
ModelConfig parse_model_config(const ConfigFile& config);

// rope_parameters, or rope_theta and rope_scaling, of a config whose other fields are not needed:
// for architectures that read their own config.json. max_positions is the default of
// original_max_position_embeddings.
RopeConfig parse_rope_config(const ConfigFile& config, int64_t max_positions);

// quantization_config: lacuna-int8 or none at all.
StoredWeights parse_stored_weights(const ConfigFile& config);
// One id or a list of them; empty when absent.
std::vector<int32_t> parse_token_ids(const ConfigFile& config, std::string_view field);

// num_attention_heads, num_key_value_heads (else as many) and head_dim, likewise.
struct HeadShape {
  int heads = 0, kv_heads = 0, head_dim = 0;
  const char* source = "";  // the field that head_dim follows from
};
// Without the field, head_dim is default_head_dim, or hidden / heads if that is 0. All heads together are at most
// max_width wide.
HeadShape parse_head_shape(const ConfigFile& config, int64_t hidden, int64_t max_width, int default_head_dim = 0);

// Empty when the folder has no generation_config.json, except for the end ids, which then come from
// config.json where there is one.
GenerationConfig load_generation_config(const std::filesystem::path& dir);
GenerationConfig parse_generation_config(const ConfigFile& config);

}  // namespace lacuna

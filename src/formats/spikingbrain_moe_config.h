#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "formats/config.h"

namespace lacuna {

enum class RouterFunction : uint8_t { kSoftmax, kSigmoid };

// Where a branch of a parallel layer is normalised: each head's channels before its output projection, or
// the projection's whole output.
enum class BranchNorm : uint8_t { kBeforeProjection, kAfterProjection };

// config.json of model_type "spikingbrain_moe": the parallel hybrid of SpikingBrain-76B, whose
// weights and code were never published. Field names, layout and the defaults of what the report leaves
// open are ours: docs/spikingbrain.md. Layers are counted from 0, as tensor names count them.
struct SpikingBrainMoeConfig {
  int64_t vocab = 0;
  int64_t hidden = 0;        // D
  int64_t intermediate = 0;  // F, of the dense feed-forwards and of every expert
  int layers = 0;
  int heads = 0, kv_heads = 0, head_dim = 0;  // of both branches
  float norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  bool qkv_bias = true;
  int64_t max_positions = 0;
  RopeConfig rope;
  StoredWeights stored = StoredWeights::kFloat;
  std::vector<int32_t> eos_ids;

  std::vector<int64_t> layer_window;  // [layers]: keys that a query sees, itself included; 0 = all
  int sinks = 0;                      // learnable tokens before the text
  bool sink_rope = true;              // their keys are rotated as those of positions -sinks … -1
  bool linear_sees_sinks = true;      // the recurrent state of a sequence starts as they leave it
  bool softmax_rope = true;           // rotary embedding in the softmax branch
  BranchNorm branch_norm = BranchNorm::kAfterProjection;
  bool learned_branch_weights = false;  // a tensor a layer in place of the next two
  float linear_weight = 0.5f, softmax_weight = 0.5f;

  std::vector<bool> layer_dense;  // [layers]: a plain feed-forward in place of experts
  int experts = 0;                // 0: every layer is dense
  int experts_per_token = 0;
  int shared_experts = 0;
  RouterFunction router = RouterFunction::kSoftmax;
};

// Faults are CorruptData, what is well-formed and cannot be run Unsupported; each names file and field.
SpikingBrainMoeConfig load_spikingbrain_moe_config(const std::filesystem::path& dir);
SpikingBrainMoeConfig parse_spikingbrain_moe_config(const ConfigFile& config);

}  // namespace lacuna

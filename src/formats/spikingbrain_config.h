#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "formats/config.h"

namespace lacuna {

// config.json of SpikingBrain-7B (model_type gla_swa; GLAswaConfig of BICLab/SpikingBrain-7B). Even layers are
// gated linear attention, odd ones softmax attention over a sliding window, whatever the list attn_layers
// says: the published code does not read it. Three fields are ours: window_rule, full_attention_layers and
// tie_word_embeddings = true.
struct SpikingBrainConfig {
  // Keys that a query of a window layer sees, itself included, for sliding_window W: the published code
  // disagrees with itself.
  enum class Window : uint8_t {
    kOfficial,  // W + 1 in a call that starts a sequence, W in later calls
    kExact,     // W
    kPlusOne,   // W + 1
  };

  int64_t vocab = 0;
  int64_t hidden = 0;        // D
  int64_t intermediate = 0;  // F
  int layers = 0;
  int heads = 0;     // query heads H
  int kv_heads = 0;  // G, divides heads
  int head_dim = 0;  // even; hidden / heads unless the field head_dim says otherwise
  float norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  int64_t max_positions = 0;
  int64_t sliding_window = 0;  // W
  Window window = Window::kOfficial;
  std::vector<bool> full_attention;  // [layers]: an odd layer that sees everything before it
  // Log decay = log(sigmoid(z)) / gate_logit_normalizer, z from a product of this rank if the checkpoint has
  // two matrices.
  float gate_logit_normalizer = 16;
  int64_t gate_low_rank_dim = 16;
  RopeConfig rope;
  std::vector<int32_t> eos_ids;
  StoredWeights stored = StoredWeights::kFloat;

  static bool is_linear(int layer) { return layer % 2 == 0; }
};

// Faults are CorruptData, variants that this build does not run Unsupported; each names file and field.
SpikingBrainConfig load_spikingbrain_config(const std::filesystem::path& dir);
SpikingBrainConfig parse_spikingbrain_config(const ConfigFile& config);

}  // namespace lacuna

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace lacuna {

enum class RopeType : uint8_t { kDefault, kLinear, kDynamic, kLlama3, kYarn };

// Rotary embedding as config.json's rope_parameters (or rope_theta + rope_scaling) describe it.
struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000;
  double factor = 1;                   // linear, dynamic, llama3, yarn
  double original_max_position = 0;    // llama3, yarn: positions of the pretraining
  double low_freq_factor = 1;          // llama3
  double high_freq_factor = 4;         // llama3
  double beta_fast = 32, beta_slow = 1;  // yarn: rotations within the original context
  std::optional<double> attention_factor;        // yarn
  std::optional<double> mscale, mscale_all_dim;  // yarn; only together, and only without attention_factor
  bool truncate = true;                // yarn: ramp ends on whole dimensions

  friend bool operator==(const RopeConfig&, const RopeConfig&) = default;
};

struct RopeFrequencies {
  std::vector<float> inv_freq;  // [head_dim / 2]: radians a position, f32
  float attention_factor = 1;   // multiplies cos and sin
};

// As Hugging Face transformers 5 computes them (modeling_rope_utils.py), f32 where it uses f32.
// max_position: max_position_embeddings of the model. sequence_length: positions of the sequence
// so far; only dynamic scaling looks at it (0 or ≤ max_position: unscaled).
RopeFrequencies rope_frequencies(const RopeConfig& config, int head_dim, int64_t max_position,
                                 int64_t sequence_length);

}  // namespace lacuna

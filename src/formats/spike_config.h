#pragma once

#include <array>
#include <filesystem>
#include <optional>
#include <vector>

#include "formats/config_file.h"

namespace lacuna {

// The coded inputs of a layer, in the order of k_by_layer: of q, k, v and the gate; of o; of gate and up; of down.
inline constexpr int kSpikeSites = 4;
using SpikeK = std::array<float, kSpikeSites>;

// config.json's spike_coding, a field of ours: {"mode": "reference" | "paper", "k": 3.0, "k_by_layer":
// [[attn_in, o_in, mlp_in, down_in], …] (optional)}. V_th = mean|x| / k; k = 0 leaves an input as it is.
struct SpikeCodingConfig {
  bool paper = false;     // down_proj's input is coded too
  std::vector<SpikeK> k;  // [layers]
};

// Nothing when the field is absent.
std::optional<SpikeCodingConfig> parse_spike_coding(const ConfigFile& config, int layers);
std::optional<SpikeCodingConfig> load_spike_coding(const std::filesystem::path& dir, int layers);

// Inputs that share a scale in the official W8ASpike quantiser: quant_weight_group_size, or 128 when absent.
int64_t parse_quantiser_group(const ConfigFile& config);

}  // namespace lacuna

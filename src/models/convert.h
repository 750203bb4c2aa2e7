#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "models/model.h"

namespace lacuna {

// How a Qwen2 checkpoint becomes a SpikingBrain one, ready to be trained on (docs/spikingbrain.md).
struct ConvertOptions {
  int64_t window = 4096;              // W of the sliding-window layers
  std::string window_rule = "exact";  // gla_swa's field: exact, official, plus_one
  // Layers, counted from 0, that attend to everything before them. Unset: none in gla_swa, every seventh in
  // the parallel hybrid.
  std::optional<std::vector<int64_t>> full_attention;
  int64_t gate_rank = 16;                    // of the forget gate's two matrices
  uint64_t seed = 0;                         // of what the source does not have: gates, routers, sinks
  WeightMode weights = WeightMode::kStored;  // kInt8: codes and a scale a row in place of float matrices

  // experts > 0: the parallel hybrid of the 76B model (spikingbrain_moe) in place of gla_swa, its experts
  // upcycled from the feed-forwards of all but the dense layers.
  int64_t experts = 0, experts_per_token = 1, shared_experts = 1;
  std::optional<std::vector<int64_t>> dense_layers;  // unset: 0, 1, 2, 4, 6, 8, 10 as far as there are
  int64_t sinks = 128;

  bool replace = false;                                         // a model folder that stands at the target
  std::function<void(uint64_t done, uint64_t total)> progress;  // bytes written
  std::function<bool()> cancelled;                              // polled; true throws Cancelled
};

struct ConvertReport {
  std::string architecture;
  int64_t tensors = 0;
  int64_t copied_parameters = 0, new_parameters = 0;  // copies of experts counted each
  uint64_t bytes = 0;                                 // of the weights written
  std::vector<std::string> files;                     // copied beside the weights: tokenizer, generation settings
};

// Reads a Qwen2 model folder and writes a new one. Tensors are streamed, so that memory holds a few rows at a
// time whatever the model's size. The new folder appears when it is complete and has been loaded once;
// after an error nothing is left of it.
ConvertReport convert_to_spikingbrain(Context& ctx, const std::filesystem::path& source,
                                      const std::filesystem::path& target, const ConvertOptions& options);

}  // namespace lacuna

#pragma once

#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

#include "formats/spike_config.h"
#include "kernels/spike_linear.h"

namespace lacuna {

// Places in a layer whose values are coded. The first four are inputs of linear layers; kQuery is each query
// head of a window layer of W8ASpike.
enum class SpikeSite : uint8_t { kAttnIn, kOIn, kMlpIn, kDownIn, kQuery, kCount };
std::string_view spike_site_name(SpikeSite site);  // "attn_in", "o_in", "mlp_in", "down_in", "query"

enum class SpikeUse : uint8_t {
  kAuto,  // kInteger where the checkpoint asks for spikes, else kOff
  kOff,
  kFake,  // the arithmetic of every coded linear layer
  kInteger,
  kEvent,
};
// Which linear layers are coded: all but down_proj, as the published code runs, or all, as the paper says.
enum class SpikeMode : uint8_t { kConfig, kReference, kPaper };

// What a caller asks of a model that can code its activations as spikes.
struct SpikeOptions {
  SpikeUse use = SpikeUse::kAuto;
  SpikeMode mode = SpikeMode::kConfig;
  std::optional<float> k;  // overrides the checkpoint's for all layers and sites
};

// k of one layer's sites; 0: not coded.
struct LayerSpikes {
  SpikeK k{};
  float query_k = 0;  // > 0: queries are coded by head, and K and V are rounded to int8 by head
  float of(SpikeSite site) const { return site == SpikeSite::kQuery ? query_k : k[static_cast<size_t>(site)]; }
};

// What a model does about spikes: options, config.json and the checkpoint's kind put together.
struct SpikeCoding {
  bool on = false;
  SpikeArithmetic arithmetic = SpikeArithmetic::kInteger;
  bool group_scales = false;  // a W8ASpike checkpoint: f32 weights with weight_quantizer.scales
  int64_t group = 0;          // inputs that share one of those scales
  std::vector<LayerSpikes> layers;
  const LayerSpikes& of(int layer) const { return layers[static_cast<size_t>(layer)]; }
};

// group_scales: whether the checkpoint holds W8ASpike's quantiser scales. Queries are coded in such
// checkpoints only, with k = 3 (the published code has no other) or options.k.
SpikeCoding resolve_spikes(const std::filesystem::path& dir, const SpikeOptions& options, int layers,
                           bool group_scales);

}  // namespace lacuna

#include "models/spike_coding.h"

#include <cmath>

namespace lacuna {

std::string_view spike_site_name(SpikeSite site) {
  switch (site) {
    case SpikeSite::kAttnIn:
      return "attn_in";
    case SpikeSite::kOIn:
      return "o_in";
    case SpikeSite::kMlpIn:
      return "mlp_in";
    case SpikeSite::kDownIn:
      return "down_in";
    case SpikeSite::kQuery:
      return "query";
    case SpikeSite::kCount:
      break;
  }
  return "?";
}

SpikeCoding resolve_spikes(const std::filesystem::path& dir, const SpikeOptions& options, int layers,
                           bool group_scales) {
  constexpr float kDefaultK = 3;
  const ConfigFile config = ConfigFile::load(dir / "config.json");
  const std::optional<SpikeCodingConfig> found = parse_spike_coding(config, layers);
  SpikeCoding out;
  out.layers.resize(static_cast<size_t>(layers));
  out.on = options.use == SpikeUse::kAuto ? found || group_scales : options.use != SpikeUse::kOff;
  if (!out.on) return out;
  if (options.k && (!(*options.k > 0) || !std::isfinite(*options.k)))
    throw BadInput("spike k: found {}, expected a number above 0", *options.k);
  switch (options.use) {
    case SpikeUse::kFake:
      out.arithmetic = SpikeArithmetic::kFake;
      break;
    case SpikeUse::kEvent:
      out.arithmetic = SpikeArithmetic::kEvent;
      break;
    default:
      out.arithmetic = SpikeArithmetic::kInteger;
  }
  out.group_scales = group_scales;
  if (group_scales) out.group = parse_quantiser_group(config);
  const bool paper = options.mode == SpikeMode::kConfig ? found && found->paper : options.mode == SpikeMode::kPaper;
  for (size_t layer = 0; layer < out.layers.size(); ++layer) {
    LayerSpikes& l = out.layers[layer];
    if (options.k)
      l.k.fill(*options.k);
    else if (found)
      l.k = found->k[layer];
    else
      l.k.fill(kDefaultK);
    if (!paper) l.k[static_cast<size_t>(SpikeSite::kDownIn)] = 0;
    if (group_scales) l.query_k = options.k.value_or(kDefaultK);
  }
  return out;
}

}  // namespace lacuna

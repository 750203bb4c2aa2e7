#include "formats/spike_config.h"

#include <nlohmann/json.hpp>

namespace lacuna {
namespace {

// Above this a spike is less than a millionth of the mean: more digits than f32 has.
constexpr double kMaxK = 1e6;

}  // namespace

std::optional<SpikeCodingConfig> parse_spike_coding(const ConfigFile& config, int layers) {
  const auto field = config.object("spike_coding");
  if (!field) return std::nullopt;
  SpikeCodingConfig out;
  const std::string mode = field->text("mode", "reference");
  if (mode != "reference" && mode != "paper") field->wrong("mode", "\"reference\" or \"paper\"");
  out.paper = mode == "paper";
  const auto k = static_cast<float>(field->number("k", 1e-3, kMaxK, 3.0));
  SpikeK same;
  same.fill(k);
  out.k.assign(static_cast<size_t>(layers), same);
  const nlohmann::json* table = field->raw("k_by_layer");
  if (!table) return out;
  const std::string shape =
      fmt::format("{} lists, one a layer, of {} numbers from 0 to {:g}", layers, kSpikeSites, kMaxK);
  if (!table->is_array() || table->size() != static_cast<size_t>(layers)) field->wrong("k_by_layer", shape);
  for (size_t layer = 0; layer < table->size(); ++layer) {
    const nlohmann::json& row = (*table)[layer];
    if (!row.is_array() || row.size() != kSpikeSites) field->wrong("k_by_layer", shape);
    for (size_t site = 0; site < row.size(); ++site) {
      if (!row[site].is_number()) field->wrong("k_by_layer", shape);
      const double value = row[site].get<double>();
      if (!(value == 0 || (value >= 1e-3 && value <= kMaxK))) field->wrong("k_by_layer", shape);
      out.k[layer][site] = static_cast<float>(value);
    }
  }
  return out;
}

std::optional<SpikeCodingConfig> load_spike_coding(const std::filesystem::path& dir, int layers) {
  return parse_spike_coding(ConfigFile::load(dir / "config.json"), layers);
}

int64_t parse_quantiser_group(const ConfigFile& config) {
  const int64_t group = config.integer("quant_weight_group_size", 4, 1 << 20, 128);
  if (group % 4 != 0) config.unsupported("quant_weight_group_size", "a multiple of 4");
  return group;
}

}  // namespace lacuna

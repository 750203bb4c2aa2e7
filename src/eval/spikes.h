#pragma once

#include <string>
#include <vector>

#include "eval/report.h"
#include "spike/spike_stats.h"

namespace lacuna {

// What spike-coded layers fired on real text.
struct SpikePlace {
  int layer = 0;
  SpikeSite site = SpikeSite::kAttnIn;
  SpikeStats stats;
};

struct SpikeResult {
  int64_t tokens = 0, windows = 0;
  std::vector<SpikePlace> places;  // by layer, then site, where anything is coded
  OpTotals::Sum executed;          // what the kernels did in coded linear layers
  // Over all layers; SpikeSite::kCount: over all inputs of linear layers, which queries are not.
  SpikeStats of(SpikeSite site) const;
};

// Reads texts in windows of `window` tokens, at most max_windows of them spread evenly, with the spike coding
// that the model was loaded with. Throws BadInput if it codes nothing.
SpikeResult measure_spikes(Context& ctx, Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                           int64_t window, int64_t max_windows, const KvOptions& kv, const PrefillOptions& prefill,
                           const std::function<void(int64_t done, int64_t total)>& progress = {});

// Every definition of docs/spikes.md, in total, by site and by layer.
std::string markdown_report(const SpikeResult& result);
Json json_report(const SpikeResult& result);

}  // namespace lacuna

#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "cache/kv_cache.h"

namespace lacuna {

// What became of one layer.
struct LayerReport {
  int layer = 0;
  double kept_share = 1;    // sum of the kept scores over the sum of all (policies with scores >= 0)
  double bound = 0;         // Z (1 - kept_share): what evicting costs at most, without renormalising; 0 = not known
  double error = -1;        // true ||O - O_kept|| over the window, attention renormalised; -1 = not measured
  double error_plain = -1;  // the same without renormalising: what `bound` bounds
  double output_norm = 0;   // ||O|| over the window, if measured
};

// What an eviction did, for --json, --kept and the log.
struct EvictionReport {
  std::string policy, budget;
  bool evicted = false;
  int64_t prompt_tokens = 0;
  int64_t rounds = 0;               // prefill, and each time decoding filled the budget again
  int64_t entries_before = 0, entries_kept = 0;  // of the last round, all layers and heads
  float threshold = 0;              // model-wide selection: the lowest score that was kept
  size_t used_bytes = 0, allocated_bytes = 0, slack_bytes = 0;
  double score_seconds = 0, select_seconds = 0, compact_seconds = 0;
  std::vector<LayerReport> layers;
  std::vector<std::vector<std::vector<int32_t>>> positions;  // [layer][KV head], ascending
};

// Fills sizes and positions from a cache.
void describe_cache(const KvCache& cache, EvictionReport& report);

// {"policy", "budget", "prompt_tokens", "entries_before", "entries_kept", "used_bytes", …,
//  "layers": [{"layer", "kept_share", "bound", …, "heads": [{"head", "count", "positions": […]}]}]}
std::string kept_json(const EvictionReport& report);
void write_kept_json(const EvictionReport& report, const std::filesystem::path& path);

// A picture: x = position, a row a KV head grouped by layer, ink = kept.
std::string kept_svg(const EvictionReport& report);
void write_kept_svg(const EvictionReport& report, const std::filesystem::path& path);

}  // namespace lacuna

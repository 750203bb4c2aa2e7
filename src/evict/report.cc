#include "evict/report.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "base/atomic_file.h"
#include "formats/json.h"

namespace lacuna {
namespace {

// JSON has no infinity; a threshold that does not exist is null.
Json number_or_null(double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); }

constexpr int kPlotWidth = 1000, kLeft = 64, kTop = 56, kBottom = 34, kMaxColumns = 1000;

}  // namespace

void describe_cache(const KvCache& cache, EvictionReport& report) {
  report.used_bytes = cache.used_bytes();
  report.allocated_bytes = cache.allocated_bytes();
  report.slack_bytes = cache.slack_bytes();
  report.positions.assign(static_cast<size_t>(cache.layers()), {});
  for (int l = 0; l < cache.layers(); ++l)
    for (int h = 0; h < cache.kv_heads(l); ++h) report.positions[static_cast<size_t>(l)].push_back(cache.positions(l, h));
}

std::string kept_json(const EvictionReport& report) {
  Json layers = Json::array();
  for (size_t l = 0; l < report.positions.size(); ++l) {
    Json entry = {{"layer", l}};
    for (const LayerReport& r : report.layers) {
      if (r.layer != static_cast<int>(l)) continue;
      entry["kept_share"] = r.kept_share;
      entry["bound"] = r.bound;
      if (r.error >= 0) {
        entry["error"] = r.error;
        entry["error_without_renormalising"] = r.error_plain;
        entry["output_norm"] = r.output_norm;
      }
    }
    Json heads = Json::array();
    for (size_t h = 0; h < report.positions[l].size(); ++h)
      heads.push_back({{"head", h}, {"count", report.positions[l][h].size()}, {"positions", report.positions[l][h]}});
    entry["heads"] = std::move(heads);
    layers.push_back(std::move(entry));
  }
  const Json out = {{"policy", report.policy},
                    {"budget", report.budget},
                    {"evicted", report.evicted},
                    {"rounds", report.rounds},
                    {"prompt_tokens", report.prompt_tokens},
                    {"entries_before", report.entries_before},
                    {"entries_kept", report.entries_kept},
                    {"threshold", number_or_null(report.threshold)},
                    {"used_bytes", report.used_bytes},
                    {"allocated_bytes", report.allocated_bytes},
                    {"slack_bytes", report.slack_bytes},
                    {"score_seconds", report.score_seconds},
                    {"select_seconds", report.select_seconds},
                    {"compact_seconds", report.compact_seconds},
                    {"layers", std::move(layers)}};
  return out.dump() + "\n";
}

void write_kept_json(const EvictionReport& report, const std::filesystem::path& path) { write_file(path, kept_json(report)); }

std::string kept_svg(const EvictionReport& report) {
  int64_t positions = 1, rows = 0;
  for (const auto& layer : report.positions)
    for (const auto& head : layer) {
      ++rows;
      if (!head.empty()) positions = std::max<int64_t>(positions, head.back() + 1);
    }
  // A row a KV head; beyond about 150 rows they get thinner so that the picture stays one screen high.
  const double row = std::clamp(900.0 / static_cast<double>(std::max<int64_t>(1, rows)), 3.0, 14.0), gap = row >= 6 ? 1 : 0, layer_gap = 4;
  const double height = kTop + static_cast<double>(rows) * row + layer_gap * static_cast<double>(report.positions.size()) + kBottom;
  const int64_t columns = std::min<int64_t>(positions, kMaxColumns);
  const double width = static_cast<double>(kPlotWidth) / static_cast<double>(columns);

  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1:.0f}\" width=\"{0}\" height=\"{1:.0f}\" "
      "font-family=\"system-ui, sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
      "<text x=\"{2}\" y=\"20\" font-size=\"14\" fill=\"#1a1a1a\">Tokens kept in the cache: {3}, budget {4}</text>\n"
      "<text x=\"{2}\" y=\"38\" fill=\"#555555\">{5} of {6} entries, {7} bytes held; a row is a KV head, dark = kept</text>\n",
      kLeft + kPlotWidth + 24, height, kLeft, report.policy, report.budget, report.entries_kept, report.entries_before,
      report.allocated_bytes);

  double y = kTop;
  for (size_t l = 0; l < report.positions.size(); ++l) {
    const auto& layer = report.positions[l];
    if (layer.empty()) continue;
    svg += fmt::format("<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\" fill=\"#1a1a1a\" font-size=\"{:.0f}\">layer {}</text>\n", kLeft - 6,
                       y + std::min(10.0, row * static_cast<double>(layer.size())), std::clamp(row * static_cast<double>(layer.size()), 5.0, 11.0), l);
    for (size_t h = 0; h < layer.size(); ++h, y += row) {
      std::vector<int64_t> kept(static_cast<size_t>(columns), 0);
      for (int32_t p : layer[h]) ++kept[static_cast<size_t>(p * columns / positions)];
      svg += fmt::format("<g><title>layer {}, KV head {}: {} of {} positions kept</title>"
                         "<rect x=\"{}\" y=\"{:.1f}\" width=\"{}\" height=\"{:.1f}\" fill=\"#eef1f4\"/>",
                         l, h, layer[h].size(), positions, kLeft, y, kPlotWidth, row - gap);
      // Neighbouring columns of one shade become one rectangle. One hue, light to dark: readable
      // without colour vision and in print.
      const auto shade = [&](int64_t c) {
        const int64_t begin = (c * positions + columns - 1) / columns, end = ((c + 1) * positions + columns - 1) / columns;
        const double part = static_cast<double>(kept[static_cast<size_t>(c)]) / static_cast<double>(std::max<int64_t>(1, end - begin));
        return part <= 0 ? 0 : 1 + static_cast<int>(std::min(3.0, part * 4));
      };
      constexpr const char* kInk[] = {"", "#9ecae1", "#6baed6", "#2171b5", "#08306b"};
      for (int64_t c = 0; c < columns;) {
        const int s = shade(c);
        int64_t end = c + 1;
        while (end < columns && shade(end) == s) ++end;
        if (s > 0)
          svg += fmt::format("<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{:.1f}\" fill=\"{}\"/>",
                             kLeft + static_cast<double>(c) * width, y, static_cast<double>(end - c) * width, row - gap, kInk[s]);
        c = end;
      }
      svg += "</g>\n";
    }
    y += layer_gap;
  }
  // Position axis: at most six marks, at 1, 2 or 5 times a power of ten.
  int64_t step = 1;
  for (int64_t power = 1; positions / step > 6;) {
    if (step == power) {
      step = 2 * power;
    } else if (step == 2 * power) {
      step = 5 * power;
    } else {
      power *= 10;
      step = power;
    }
  }
  for (int64_t p = 0; p < positions; p += step)
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\" fill=\"#555555\">{}</text>\n",
                       kLeft + static_cast<double>(p) * kPlotWidth / static_cast<double>(positions), y + 14, p);
  svg += fmt::format("<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\" fill=\"#555555\">position in the prompt</text>\n</svg>\n",
                     kLeft + kPlotWidth, y + 28);
  return svg;
}

void write_kept_svg(const EvictionReport& report, const std::filesystem::path& path) { write_file(path, kept_svg(report)); }

}  // namespace lacuna

// The HTML report: plain SVG and tables, drawn here, so that the page needs no script and prints well.
#include <algorithm>
#include <cmath>
#include <map>

#include "eval/report.h"

namespace lacuna {
std::string html_escape(std::string_view text) {
  std::string out;
  for (char c : text) {
    if (c == '&') out += "&amp;";
    else if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '"') out += "&quot;";
    else out += c;
  }
  return out;
}

namespace {

std::string escape(std::string_view text) { return html_escape(text); }

constexpr const char* kStyle = R"css(
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #d5dade; --page: #ffffff; --fill: #0072b2;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b25a90; --c4: #7a5c00; --c5: #3a9bd9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #9aa6b0; --line: #39424a; --page: #14181b; --fill: #4aa8e0;
  --c0: #4aa8e0; --c1: #f0874a; --c2: #2fc79a; --c3: #dd94c0; --c4: #d9b44a; --c5: #8fcdf5; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; } section { break-inside: avoid-page; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.chart { max-width: 44rem; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg text.soft { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); stroke-width: 1; } .full { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 3; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .5rem 0; font-size: .9rem; }
.legend li { display: flex; align-items: center; gap: .4rem; } .legend svg { width: 34px; flex: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
thead th { font-weight: 600; vertical-align: bottom; }
.heat td + td, .heat td.cell { text-align: center; padding: .22rem .45rem;
  background: color-mix(in srgb, var(--fill) calc(var(--s) * 55%), var(--page)); }
.maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } .maps figure { margin: 0; max-width: 100%; overflow-x: auto; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .25rem; }
.tilt th { font-weight: 500; } .tilt thead th + th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .5rem .1rem; }
)css";

// A line of the chart: one policy in one format, over its budgets.
struct Series {
  std::string name;
  bool full = false;
  std::vector<const VariantSummary*> points;
};

std::vector<Series> series_of(const EvalSummary& s, const LengthSummary& at) {
  std::vector<Series> out;
  std::map<std::string, size_t> index;
  for (const VariantSummary& v : at.variants) {
    const Variant& variant = s.variants[v.variant];
    if (variant.full() && variant.format == KvFormat::kNative) continue;  // the dashed line
    std::string name = variant.full() ? "full cache, quantised" : variant.policy;
    if (!variant.full() && variant.format != KvFormat::kNative) name.append(" in ").append(kv_format_name(variant.format));
    const auto [found, fresh] = index.try_emplace(name, out.size());
    if (fresh) out.push_back({name, variant.full(), {}});
    out[found->second].points.push_back(&v);
  }
  for (Series& one : out)
    std::sort(one.points.begin(), one.points.end(), [](auto* a, auto* b) { return a->bytes_share < b->bytes_share; });
  return out;
}

// Told apart three times: by colour (safe for colour-blind readers), by marker, and from the seventh on by dashes.
struct Look {
  std::string colour, dash;
  int marker;
};
Look look_of(size_t i) {
  return {fmt::format("var(--c{})", i % 6), i / 6 % 2 ? " stroke-dasharray=\"5 3\"" : "", static_cast<int>(i % 5)};
}

std::string marker(const Look& look, double x, double y) {
  const std::string style = fmt::format(" fill=\"{}\"", look.colour);
  switch (look.marker) {
    case 0: return fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.6\"{}/>", x, y, style);
    case 1: return fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"6.6\" height=\"6.6\"{}/>", x - 3.3, y - 3.3, style);
    case 2: return fmt::format("<path d=\"M{:.1f} {:.1f}l4.2 7.4h-8.4z\"{}/>", x, y - 4.6, style);
    case 3: return fmt::format("<path d=\"M{:.1f} {:.1f}l4.4 4.4l-4.4 4.4l-4.4 -4.4z\"{}/>", x, y - 4.4, style);
    default: return fmt::format("<path d=\"M{:.1f} {:.1f}l4.2 -7.4h-8.4z\"{}/>", x, y + 4.6, style);
  }
}

// Score against bytes, from the lowest score on (closeup = false), or only what comes within ten points of
// the full cache. Empty where a close-up would show nothing new.
std::string chart(const EvalSummary& s, const LengthSummary& at, bool closeup) {
  constexpr double kWidth = 560, kHeight = 330, kLeft = 44, kRight = 14, kTop = 14, kBottom = 44;
  const std::vector<Series> all = series_of(s, at);
  if (all.empty()) return "";
  double low_x = 1, high_x = 0, low_y = 1, high_y = 1;
  const VariantSummary* full = nullptr;
  for (const VariantSummary& v : at.variants) {
    if (s.header.variants[v.variant] == "full") full = &v;
    else {
      low_x = std::min(low_x, v.bytes_share);
      high_x = std::max(high_x, v.bytes_share);
    }
    low_y = std::min(low_y, v.score.low);
  }
  low_x = std::max(1e-4, low_x) / 1.25;
  high_x = std::min(1.25, high_x * 1.25);
  low_y = std::max(0.0, std::floor(low_y * 10) / 10);
  if (low_y >= 1) low_y = 0.9;
  if (closeup) {
    if (!full || full->score.value - 0.25 < low_y) return "";
    double top = full->score.high;
    for (const VariantSummary& v : at.variants) top = std::max(top, v.score.high);
    low_y = std::floor(full->score.value * 50 - 5) / 50;
    high_y = std::min(1.0, std::ceil(top * 50) / 50);
  }
  const auto px = [&](double share) {
    return kLeft + (std::log(std::max(share, low_x)) - std::log(low_x)) / (std::log(high_x) - std::log(low_x)) * (kWidth - kLeft - kRight);
  };
  const auto py = [&](double score) { return kTop + (high_y - score) / (high_y - low_y) * (kHeight - kTop - kBottom); };

  std::string out = fmt::format("<div class=\"chart\"><svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"Score against KV bytes, {}\">\n",
                                kWidth, kHeight, length_name(at.length));
  const double span = high_y - low_y, step = span <= 0.16 ? 0.02 : span <= 0.21 ? 0.05 : span <= 0.41 ? 0.1 : 0.2;
  for (double y = high_y; y >= low_y - 1e-9; y -= step)
    out += fmt::format("<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/><text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{:.0f}</text>\n",
                       kLeft, kWidth - kRight, py(y), py(y), kLeft - 7, py(y) + 4, 100 * y);
  for (double tick : {0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0}) {
    if (tick < low_x || tick > high_x) continue;
    out += fmt::format("<line class=\"grid\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2}\"/><text x=\"{0:.1f}\" y=\"{3}\" text-anchor=\"middle\">{4:g} %</text>\n",
                       px(tick), kTop, kHeight - kBottom, kHeight - kBottom + 17, 100 * tick);
  }
  out += fmt::format("<text class=\"soft\" x=\"{:.0f}\" y=\"{}\" text-anchor=\"middle\">KV bytes of the prompt, share of the full cache</text>\n",
                     (kLeft + kWidth - kRight) / 2, kHeight - 8);
  if (full)
    out += fmt::format("<line class=\"full\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"><title>full cache: {:.1f} %</title></line>\n", kLeft,
                       kWidth - kRight, py(full->score.value), py(full->score.value), 100 * full->score.value);
  const std::string clip = fmt::format("clip-{}-{}", at.length, closeup ? "near" : "all");
  out += fmt::format("<clipPath id=\"{}\"><rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/></clipPath><g clip-path=\"url(#{})\">\n", clip, kLeft,
                     kTop - 6, kWidth - kLeft - kRight, kHeight - kTop - kBottom + 6, clip);
  for (size_t i = 0; i < all.size(); ++i) {
    const Look look = look_of(i);
    // Lines at one budget stand beside each other, or their intervals would hide one another.
    const double aside = (static_cast<double>(i) - static_cast<double>(all.size() - 1) / 2) * std::min(2.5, 24.0 / static_cast<double>(all.size()));
    std::string line, marks;
    for (const VariantSummary* v : all[i].points) {
      const double x = px(v->bytes_share) + aside, y = py(v->score.value);
      line += fmt::format("{:.1f},{:.1f} ", x, y);
      marks += fmt::format("<g><title>{}: {:.1f} % [{:.1f}, {:.1f}]</title><line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\" stroke-opacity=\".45\" stroke-width=\"1.5\"/>{}</g>\n",
                           escape(s.header.variants[v->variant]), 100 * v->score.value, 100 * v->score.low, 100 * v->score.high, x, x,
                           py(v->score.low), py(v->score.high), look.colour, marker(look, x, y));
    }
    out += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\"{}/>\n{}", line, look.colour, look.dash, marks);
  }
  out += "</g></svg></div>\n";
  if (closeup) return "<h3>Close to the full cache</h3>" + out;
  out += "<ul class=\"legend\">";
  for (size_t i = 0; i < all.size(); ++i) {
    const Look look = look_of(i);
    out += fmt::format("<li><svg viewBox=\"0 0 34 12\" aria-hidden=\"true\"><line x1=\"1\" x2=\"33\" y1=\"6\" y2=\"6\" stroke=\"{}\" stroke-width=\"1.6\"{}/>{}</svg>{}</li>",
                       look.colour, look.dash, marker(look, 17, 6), escape(all[i].name));
  }
  if (full) out += "<li><svg viewBox=\"0 0 34 12\" aria-hidden=\"true\"><line class=\"full\" x1=\"1\" x2=\"33\" y1=\"6\" y2=\"6\"/></svg>full cache</li>";
  return out + "</ul>\n";
}

std::string cell(double score) { return fmt::format("<td class=\"cell\" style=\"--s:{:.2f}\">{:.0f}</td>", score, 100 * score); }

std::string result_table(const EvalSummary& s, const LengthSummary& at) {
  std::string out = "<div class=\"wide\"><table><thead><tr><th>cache</th><th>KV bytes, %</th><th>score, %</th><th>95 % interval</th>"
                    "<th>minus full, paired</th></tr></thead><tbody>\n";
  for (const VariantSummary& v : at.variants) {
    const Interval& d = v.versus_full.difference;
    const std::string minus = s.header.variants[v.variant] == "full"
                                  ? ""
                                  : fmt::format("{:+.1f} [{:+.1f}, {:+.1f}]", 100 * d.value, 100 * d.low, 100 * d.high);
    out += fmt::format("<tr><td>{}</td><td>{:.1f}</td><td>{:.1f}</td><td>{:.1f} – {:.1f}</td><td>{}</td></tr>\n",
                       escape(s.header.variants[v.variant]), 100 * v.bytes_share, 100 * v.score.value, 100 * v.score.low, 100 * v.score.high,
                       minus);
  }
  return out + "</tbody></table></div>\n";
}

std::string task_table(const EvalSummary& s, const LengthSummary& at) {
  std::string out = "<h3>By task, %</h3><div class=\"wide\"><table class=\"heat tilt\"><thead><tr><th></th>";
  for (const auto& task : at.tasks) out += "<th>" + escape(task) + "</th>";
  out += "</tr></thead><tbody>\n";
  for (size_t v = 0; v < s.variants.size(); ++v) {
    out += "<tr><td>" + escape(s.header.variants[v]) + "</td>";
    for (size_t t = 0; t < at.tasks.size(); ++t) out += cell(at.by_task[t][v].value);
    out += "</tr>\n";
  }
  return out + "</tbody></table></div>\n";
}

std::string comparison_table(const EvalSummary& s, int64_t length) {
  std::string rows;
  for (const Comparison& c : s.comparisons) {
    if (c.length != length) continue;
    const Interval& d = c.difference.difference;
    rows += fmt::format("<tr><td>{} − {}</td><td>{:+.1f}</td><td>{:+.1f} … {:+.1f}</td><td>{}</td><td>{}</td><td>{:.3f}</td></tr>\n", escape(c.a),
                        escape(c.b), 100 * d.value, 100 * d.low, 100 * d.high, c.difference.wins, c.difference.losses, c.difference.p);
  }
  if (rows.empty()) return "";
  return "<h3>Compared on the same prompts, points</h3><div class=\"wide\"><table><thead><tr><th></th><th>difference</th><th>95 % interval</th>"
         "<th>wins</th><th>losses</th><th>p, sign test</th></tr></thead><tbody>\n" + rows + "</tbody></table></div>\n";
}

std::string depth_maps(const EvalSummary& s) {
  std::vector<int64_t> lengths;
  std::vector<double> depths;
  std::map<std::pair<int64_t, double>, const DepthCell*> at;
  for (const DepthCell& d : s.depths) {
    at[{d.length, d.depth}] = &d;
    lengths.push_back(d.length);
    depths.push_back(d.depth);
  }
  const auto distinct = [](auto& list) {
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
  };
  distinct(lengths);
  distinct(depths);
  std::string out = "<section><h2>Needle by depth and length, %</h2>\n<p class=\"soft\">Rows: how deep in the context the needle lies. Columns: "
                    "tokens of the prompt.</p>\n<div class=\"maps\">";
  for (size_t v = 0; v < s.variants.size(); ++v) {
    out += "<figure><figcaption>" + escape(s.header.variants[v]) + "</figcaption><table class=\"heat\"><thead><tr><th></th>";
    for (int64_t length : lengths) out += fmt::format("<th>{}</th>", length);
    out += "</tr></thead><tbody>\n";
    for (double depth : depths) {
      out += fmt::format("<tr><td>{:.0f} %</td>", 100 * depth);
      for (int64_t length : lengths) {
        const auto found = at.find({length, depth});
        out += found == at.end() ? "<td></td>" : cell(found->second->scores[v].value);
      }
      out += "</tr>\n";
    }
    out += "</tbody></table></figure>\n";
  }
  return out + "</div></section>\n";
}

}  // namespace

std::string html_page(const std::string& title, const std::string& body) {
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>{0}</title>\n<style>{1}</style>\n</head>\n<body>\n<h1>{0}</h1>\n{2}</body>\n</html>\n",
      escape(title), kStyle, body);
}

std::string html_table(const std::vector<std::vector<std::string>>& rows, bool wrap) {
  std::string out = "<div class=\"wide\"><table>\n";
  for (size_t i = 0; i < rows.size(); ++i) {
    out += i == 0 ? "<thead><tr>" : "<tr>";
    for (const std::string& cell : rows[i])
      out += i == 0 ? "<th>" + escape(cell) + "</th>"
                    : (wrap ? "<td style=\"white-space: pre-wrap; text-align: left\">" : "<td>") + escape(cell) + "</td>";
    out += i == 0 ? "</tr></thead>\n" : "</tr>\n";
  }
  return out + "</table></div>\n";
}

std::string html_report(const EvalSummary& s, const std::string& title) {
  const EvalHeader& h = s.header;
  bool simulated = false;
  for (const Variant& v : s.variants) simulated = simulated || v.format != KvFormat::kNative;
  std::string out = fmt::format(
      "<p class=\"soft\">Model {}; text from {}; {} wordings; seed {}; activations {}, KV cache {}. {} The first token of an answer comes from {}. "
      "Scores are string match in percent; each task weighs the same; intervals are 95 %.{}</p>\n",
      escape(h.model), escape(h.haystack), escape(h.wordings), h.seed, escape(h.activations), escape(h.kv_dtype),
      h.query_agnostic ? "The context was compressed before the question was known." : "The question was in the prompt when the cache was made smaller.",
      h.first_token == FirstToken::kDense ? "the dense prefill" : "the last prompt token, run again on the smaller cache",
      simulated ? " Caches marked +int are simulated: their values are rounded to what the format can hold, their bytes are what it would need." : "");
  if (!s.depths.empty()) out += depth_maps(s);
  for (const LengthSummary& at : s.lengths) {
    out += fmt::format("<section><h2>{}</h2>\n<p class=\"soft\">{} prompts of {} task{}.</p>\n", length_name(at.length), at.prompts, at.tasks.size(),
                       at.tasks.size() == 1 ? "" : "s");
    out += chart(s, at, false) + chart(s, at, true) + result_table(s, at) + "</section>\n";
    if (at.tasks.size() > 1) out += "<section>" + task_table(s, at) + "</section>\n";
    if (const std::string compared = comparison_table(s, at.length); !compared.empty()) out += "<section>" + compared + "</section>\n";
  }
  return html_page(title, out);
}

}  // namespace lacuna

#include "eval/report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>
#include <set>

namespace lacuna {
namespace {

std::string percent(double x) { return fmt::format("{:.1f}", 100 * x); }
std::string with_interval(const Interval& i) { return fmt::format("{:.1f} [{:.1f}, {:.1f}]", 100 * i.value, 100 * i.low, 100 * i.high); }
std::string signed_interval(const Interval& i) {
  return fmt::format("{:+.1f} [{:+.1f}, {:+.1f}]", 100 * i.value, 100 * i.low, 100 * i.high);
}
std::string p_value(double p) { return p < 0.001 ? "< 0.001" : fmt::format("{:.3f}", p); }

Json interval_json(const Interval& i) {
  return {{"value", i.value}, {"low", i.low}, {"high", i.high}, {"count", i.count}, {"clusters", i.clusters}};
}

Json difference_json(const PairedDifference& d) {
  return {{"difference", interval_json(d.difference)}, {"wins", d.wins}, {"losses", d.losses}, {"p", d.p}};
}

// scores[task][variant] → list over that task's prompts, for one length.
using Scores = std::map<std::string, std::vector<std::vector<double>>>;

std::vector<std::vector<double>> groups_of(const Scores& scores, const std::vector<std::string>& tasks, size_t variant) {
  std::vector<std::vector<double>> out;
  for (const auto& task : tasks) out.push_back(scores.at(task)[variant]);
  return out;
}

void compare_policies(EvalSummary& out, const Scores& scores, const LengthSummary& at, const std::string& reference) {
  for (size_t a = 0; a < out.variants.size(); ++a) {
    if (out.variants[a].policy != reference) continue;
    for (size_t b = 0; b < out.variants.size(); ++b) {
      const Variant &va = out.variants[a], &vb = out.variants[b];
      if (vb.full() || vb.policy == reference || va.budget.text != vb.budget.text || va.format != vb.format) continue;
      out.comparisons.push_back({at.length, va.label(), vb.label(),
                                 paired_difference(groups_of(scores, at.tasks, a), groups_of(scores, at.tasks, b))});
    }
  }
}

void summarise_depths(EvalSummary& out, const EvalRun& run) {
  std::map<std::pair<int64_t, double>, std::vector<std::vector<double>>> cells;
  for (const PromptResult& r : run.results) {
    if (r.asked_depth < 0) continue;
    auto& cell = cells[{r.length, r.asked_depth}];
    cell.resize(r.variants.size());
    for (size_t v = 0; v < r.variants.size(); ++v) cell[v].push_back(r.variants[v].score);
  }
  for (const auto& [key, scores] : cells) {
    DepthCell& cell = out.depths.emplace_back(DepthCell{key.first, key.second, {}});
    for (const auto& s : scores) cell.scores.push_back(mean_interval(s));
  }
}

std::string how(const EvalHeader& h) {
  return fmt::format("{}; {} wordings, seed {}, activations {}, KV {}; {}; first answer token from {}", h.model, h.wordings, h.seed,
                     h.activations, h.kv_dtype,
                     h.query_agnostic ? "the context is compressed before the question is known" : "the question is in the prompt",
                     h.first_token == FirstToken::kDense ? "the dense prefill" : "the evicted cache");
}

}  // namespace

std::string length_name(int64_t length) { return length > 0 ? fmt::format("{} tokens", length) : "Prompts of a file, any length"; }

EvalSummary summarise(const EvalRun& run, const std::string& reference) {
  if (run.results.empty()) throw BadInput("there are no results to report");
  EvalSummary out;
  out.header = run.header;
  for (const std::string& label : run.header.variants) out.variants.push_back(parse_variant(label));
  std::string compared = reference;
  for (const Variant& v : out.variants)
    if (compared.empty() && !v.full()) compared = v.policy;
  const auto full = std::find_if(out.variants.begin(), out.variants.end(), [](const Variant& v) { return v.label() == "full"; });

  std::map<int64_t, Scores> by_length;
  std::map<int64_t, std::vector<double>> shares;
  std::map<int64_t, int64_t> prompts;
  std::vector<std::string> order;  // tasks as they came
  for (const PromptResult& r : run.results) {
    auto& scores = by_length[r.length][r.task];
    scores.resize(out.variants.size());
    auto& share = shares[r.length];
    share.resize(out.variants.size());
    for (size_t v = 0; v < r.variants.size(); ++v) {
      scores[v].push_back(r.variants[v].score);
      share[v] += static_cast<double>(r.variants[v].kv_bytes) / static_cast<double>(std::max<size_t>(1, r.full_bytes));
    }
    ++prompts[r.length];
    if (std::find(order.begin(), order.end(), r.task) == order.end()) order.push_back(r.task);
    out.seconds += r.prefill_seconds + r.decode_seconds;
  }
  for (const auto& [length, scores] : by_length) {
    LengthSummary at;
    at.length = length;
    at.prompts = prompts[length];
    for (const auto& task : order)
      if (scores.contains(task)) at.tasks.push_back(task);
    for (const auto& task : at.tasks) {
      auto& row = at.by_task.emplace_back();
      for (const auto& s : scores.at(task)) row.push_back(mean_interval(s));
    }
    for (size_t v = 0; v < out.variants.size(); ++v) {
      VariantSummary s;
      s.variant = v;
      s.bytes_share = shares[length][v] / static_cast<double>(at.prompts);
      const auto own = groups_of(scores, at.tasks, v);
      s.score = macro_interval(own);
      if (full != out.variants.end())
        s.versus_full = paired_difference(own, groups_of(scores, at.tasks, static_cast<size_t>(full - out.variants.begin())));
      at.variants.push_back(s);
    }
    compare_policies(out, scores, at, compared);
    out.lengths.push_back(std::move(at));
  }
  summarise_depths(out, run);
  return out;
}

std::string markdown_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> width;
  const auto columns = [](std::string_view s) {  // characters, not bytes
    return static_cast<size_t>(std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xc0) != 0x80; }));
  };
  for (const auto& row : rows) {
    width.resize(std::max(width.size(), row.size()), 3);
    for (size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], columns(row[c]));
  }
  std::string out;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t c = 0; c < rows[r].size(); ++c) {
      const std::string pad(width[c] - columns(rows[r][c]), ' ');
      out += c == 0 ? "| " + rows[r][c] + pad : " | " + pad + rows[r][c];
    }
    out += " |\n";
    if (r > 0) continue;
    for (size_t c = 0; c < width.size(); ++c) out += fmt::format("|{:->{}}{}", "", width[c] + 1, c == 0 ? '-' : ':');
    out += "|\n";
  }
  return out;
}

std::string markdown_report(const EvalSummary& s) {
  std::string out = how(s.header) + "\n";
  for (const LengthSummary& at : s.lengths) {
    out += fmt::format("\n### {}: mean of {} task(s), {} prompts, %, with 95 % intervals\n\n", length_name(at.length), at.tasks.size(), at.prompts);
    std::vector<std::vector<std::string>> rows = {{"cache", "KV bytes", "score", "minus full, paired", "p"}};
    for (const VariantSummary& v : at.variants) {
      const bool is_full = s.header.variants[v.variant] == "full";
      rows.push_back({s.header.variants[v.variant], percent(v.bytes_share) + " %", with_interval(v.score),
                      is_full ? "" : signed_interval(v.versus_full.difference), is_full ? "" : p_value(v.versus_full.p)});
    }
    out += markdown_table(rows);
    if (at.tasks.size() > 1) {
      out += "\n";
      rows = {{"by task"}};
      rows[0].insert(rows[0].end(), at.tasks.begin(), at.tasks.end());
      for (size_t v = 0; v < s.variants.size(); ++v) {
        rows.push_back({s.header.variants[v]});
        for (size_t t = 0; t < at.tasks.size(); ++t) rows.back().push_back(fmt::format("{:.0f}", 100 * at.by_task[t][v].value));
      }
      out += markdown_table(rows);
    }
    rows = {{"comparison", "difference, paired", "wins", "losses", "p"}};
    for (const Comparison& c : s.comparisons)
      if (c.length == at.length)
        rows.push_back({c.a + " − " + c.b, signed_interval(c.difference.difference), std::to_string(c.difference.wins),
                        std::to_string(c.difference.losses), p_value(c.difference.p)});
    if (rows.size() > 1) out += "\n" + markdown_table(rows);
  }
  if (!s.depths.empty()) {
    out += "\n### By depth, %\n\n";
    std::vector<std::vector<std::string>> rows = {{"tokens, depth"}};
    rows[0].insert(rows[0].end(), s.header.variants.begin(), s.header.variants.end());
    for (const DepthCell& d : s.depths) {
      rows.push_back({fmt::format("{}, {:.2f}", d.length, d.depth)});
      for (const Interval& i : d.scores) rows.back().push_back(fmt::format("{:.0f}", 100 * i.value));
    }
    out += markdown_table(rows);
  }
  return out;
}

Json json_report(const EvalSummary& s) {
  Json out = header_json(s.header);
  out["kind"] = "tasks";
  out["seconds"] = s.seconds;
  for (const LengthSummary& at : s.lengths) {
    Json length = {{"length", at.length}, {"prompts", at.prompts}};
    for (const VariantSummary& v : at.variants) {
      const Variant& variant = s.variants[v.variant];
      Json item = {{"variant", s.header.variants[v.variant]},
                   {"policy", variant.policy},
                   {"format", kv_format_name(variant.format)},
                   {"simulated_format", variant.format != KvFormat::kNative},
                   {"bytes_share", v.bytes_share},
                   {"score", interval_json(v.score)},
                   {"minus_full", difference_json(v.versus_full)}};
      if (!variant.full()) item["budget"] = variant.budget.text;
      for (size_t t = 0; t < at.tasks.size(); ++t) item["tasks"][at.tasks[t]] = interval_json(at.by_task[t][v.variant]);
      length["variants_at_length"].push_back(std::move(item));
    }
    out["lengths"].push_back(std::move(length));
  }
  out["comparisons"] = Json::array();
  for (const Comparison& c : s.comparisons) {
    Json item = difference_json(c.difference);
    item["length"] = c.length;
    item["a"] = c.a;
    item["b"] = c.b;
    out["comparisons"].push_back(std::move(item));
  }
  out["depths"] = Json::array();
  for (const DepthCell& d : s.depths) {
    Json scores;
    for (size_t v = 0; v < d.scores.size(); ++v) scores[s.header.variants[v]] = interval_json(d.scores[v]);
    out["depths"].push_back({{"length", d.length}, {"depth", d.depth}, {"scores", scores}});
  }
  return out;
}

namespace {

// One column of a fidelity result over its windows.
Interval column(const FidelityResult& r, size_t v, double WindowScores::* field) {
  std::vector<double> values;
  for (const auto& window : r.windows) values.push_back(window[v].*field);
  return bootstrap_interval(values);
}

double mean_bytes(const FidelityResult& r, size_t v) {
  double sum = 0;
  for (const auto& window : r.windows) sum += static_cast<double>(window[v].kv_bytes);
  return sum / static_cast<double>(r.windows.size());
}

}  // namespace

std::string markdown_report(const FidelityResult& r) {
  std::vector<std::vector<std::string>> rows = {
      {"cache", "KV bytes", "KL from full, nats", "same top token, %", "layer error", "nats a token", "bits a byte"}};
  for (size_t v = 0; v < r.variants.size(); ++v) {
    const Interval kl = column(r, v, &WindowScores::kl), top = column(r, v, &WindowScores::same_top);
    const Interval nats = column(r, v, &WindowScores::nats), error = column(r, v, &WindowScores::layer_error);
    rows.push_back({r.variants[v].label(), percent(mean_bytes(r, v) / mean_bytes(r, 0)) + " %",
                    fmt::format("{:.4f} [{:.4f}, {:.4f}]", kl.value, kl.low, kl.high), with_interval(top),
                    fmt::format("{:.4f}", error.value), fmt::format("{:.4f} [{:.4f}, {:.4f}]", nats.value, nats.low, nats.high),
                    fmt::format("{:.4f}", nats.value / std::numbers::ln2 / r.bytes_per_token)});
  }
  return fmt::format("{} stretches of text, {} tokens scored, 95 % intervals over stretches\n\n", r.windows.size(), r.tokens) +
         markdown_table(rows);
}

Json json_report(const FidelityResult& r) {
  Json out = {{"kind", "fidelity"}, {"windows", r.windows.size()}, {"tokens", r.tokens}, {"bytes_per_token", r.bytes_per_token}};
  for (size_t v = 0; v < r.variants.size(); ++v) {
    const Interval nats = column(r, v, &WindowScores::nats);
    out["variants"].push_back({{"variant", r.variants[v].label()},
                               {"bytes_share", mean_bytes(r, v) / mean_bytes(r, 0)},
                               {"kl", interval_json(column(r, v, &WindowScores::kl))},
                               {"same_top", interval_json(column(r, v, &WindowScores::same_top))},
                               {"layer_error", interval_json(column(r, v, &WindowScores::layer_error))},
                               {"layer_error_by_layer", r.layer_error[v]},
                               {"nats_per_token", interval_json(nats)},
                               {"bits_per_byte", nats.value / std::numbers::ln2 / r.bytes_per_token}});
  }
  return out;
}

}  // namespace lacuna

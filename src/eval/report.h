#pragma once

#include <string>
#include <vector>

#include "eval/fidelity.h"
#include "eval/result_log.h"

namespace lacuna {

// One variant at one length.
struct VariantSummary {
  size_t variant = 0;
  double bytes_share = 1;        // its KV bytes over the full cache's in the cache's own format, mean over prompts
  Interval score;                // mean over tasks, each weighing the same
  PairedDifference versus_full;  // variant − full cache on the same prompts
};

struct LengthSummary {
  int64_t length = 0;
  int64_t prompts = 0;
  std::vector<std::string> tasks;
  std::vector<VariantSummary> variants;
  std::vector<std::vector<Interval>> by_task;  // [task][variant]
};

// Two policies at one budget and format, on the same prompts.
struct Comparison {
  int64_t length = 0;
  std::string a, b;  // labels
  PairedDifference difference;
};

struct DepthCell {
  int64_t length = 0;
  double depth = 0;
  std::vector<Interval> scores;  // [variant]
};

struct EvalSummary {
  EvalHeader header;
  std::vector<Variant> variants;
  std::vector<LengthSummary> lengths;
  std::vector<Comparison> comparisons;  // of `reference` with every other policy
  std::vector<DepthCell> depths;        // where depths were asked for
  double seconds = 0;                   // of all prompts
};

// reference: the policy that the others are compared with; empty = the first one.
EvalSummary summarise(const EvalRun& run, const std::string& reference = "");

std::string markdown_report(const EvalSummary& summary);
Json json_report(const EvalSummary& summary);
// One page that needs nothing else: curves, heat maps, tables; light, dark and printed.
std::string html_report(const EvalSummary& summary, const std::string& title);

// Of plain-text measurements.
std::string markdown_report(const FidelityResult& result);
Json json_report(const FidelityResult& result);

// "4096 tokens"; lines of a file may not tell their length.
std::string length_name(int64_t length);

// What HTML pages are made of: text made safe; a whole page; rows as a table, the first its head, lines wrapped if asked.
std::string html_escape(std::string_view text);
std::string html_page(const std::string& title, const std::string& body);
std::string html_table(const std::vector<std::vector<std::string>>& rows, bool wrap = false);

// Rows of equal length as an aligned Markdown table, readable on a terminal; the first column is left-aligned.
std::string markdown_table(const std::vector<std::vector<std::string>>& rows);

}  // namespace lacuna

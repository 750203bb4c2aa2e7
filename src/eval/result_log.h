#pragma once

#include <cstdio>
#include <filesystem>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "eval/runner.h"
#include "formats/json.h"

namespace lacuna {

// What all results of a run share. Two runs may be joined only if these agree.
struct EvalHeader {
  std::string model;       // directory or name
  std::string activations, kv_dtype;
  std::string wordings;    // "train", "held_out", or "file"
  std::string haystack;
  uint64_t seed = 0;
  bool query_agnostic = false;
  FirstToken first_token = FirstToken::kDense;
  std::vector<std::string> variants;  // labels
};

struct EvalRun {
  EvalHeader header;
  std::vector<PromptResult> results;
};

Json header_json(const EvalHeader& header);
Json result_json(const PromptResult& result);

// Per-prompt results as JSON lines, flushed one by one, so that a long run that is stopped goes on
// where it was. Docs: docs/eval.md.
class ResultLog {
 public:
  // No path: keeps nothing. An existing file must carry the same header, else BadInput; a last line that
  // was cut off is dropped.
  ResultLog(const std::filesystem::path& path, const EvalHeader& header);
  ~ResultLog();
  ResultLog(const ResultLog&) = delete;
  ResultLog& operator=(const ResultLog&) = delete;

  bool has(const std::string& task, int64_t length, int64_t index, double asked_depth) const;
  void append(PromptResult result);
  const EvalRun& run() const { return run_; }

 private:
  using Key = std::tuple<std::string, int64_t, int64_t, int64_t>;
  static Key key(const std::string& task, int64_t length, int64_t index, double asked_depth);
  void write_line(const std::string& line);

  std::filesystem::path path_;
  EvalRun run_;
  std::set<Key> done_;
  std::FILE* file_ = nullptr;
};

// Reads a log for a report. Throws CorruptData naming the line.
EvalRun read_result_log(const std::filesystem::path& path);

}  // namespace lacuna

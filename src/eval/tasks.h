#pragma once

#include <optional>
#include <string>
#include <vector>

#include "eval/haystack.h"
#include "eval/jsonl.h"
#include "eval/metrics.h"
#include "eval/prompt_spec.h"

namespace lacuna {

// One question with its context, ready to run.
struct TaskPrompt {
  std::string task;
  int64_t length = 0;  // tokens asked for (0: the file's own)
  int64_t index = 0;   // which prompt of its cell
  std::string text;
  std::vector<int32_t> ids;
  int64_t question_at = 0;  // ids[question_at …] are the question and its cue: what query-agnostic use holds back
  std::vector<std::string> references;
  std::string answer;  // the reply as the layout writes it, leading space and newline included; empty for files
  MatchRule rule = MatchRule::kAll;
  int64_t new_tokens = 0;     // longest answer, tokens
  bool one_line = true;       // the answer ends at the first newline
  double depth = -1;          // share of the context before the needle asked for; -1 = none or several
  double asked_depth = -1;    // the depth that was requested; -1 = drawn
};

// Makes the prompts of presets/prompts/tasks.json. A prompt is a function of (seed, task, length,
// index, split, depth) alone: the same whatever was made before it, on every platform.
class TaskMaker {
 public:
  struct Request {
    std::string task;
    int64_t length = 0;  // prompt and answer together fit into it
    int64_t index = 0;
    std::string split = "train";  // wordings that training saw, or "held_out"
    std::optional<double> depth;  // 0 … 1, for tasks that ask for one needle
  };

  // Both must outlive the maker. before: ids in front of every prompt (a model's begin-of-text), or none.
  TaskMaker(const PromptSpec& spec, const Haystack& books, EncodeFn encode, uint64_t seed, std::vector<int32_t> before = {});

  // BadInput for an unknown task or split, or a length that has no room for the task.
  TaskPrompt make(const Request& request) const;

  // "all", "ruler" (the 14 that the reports' mean is over), or names with commas.
  std::vector<std::string> expand(const std::string& names) const;
  bool takes_depth(const std::string& task) const;

 private:
  struct Draft;
  struct Context;
  void draft(const PromptSpec::Task& task, const PromptSpec::Wording& wording, EvalRandom& random, const Request& request,
             Draft& out) const;
  void draft_needles(const PromptSpec::Task& task, const PromptSpec::Wording& wording, EvalRandom& random, const Request& request,
                     Draft& out) const;
  void draft_qa(const PromptSpec::Task& task, const PromptSpec::Wording& wording, EvalRandom& random, int64_t budget, Draft& out) const;
  Context write_context(const PromptSpec::Task& task, EvalRandom& random, const Request& request, const Draft& draft, int64_t budget) const;
  Context insert_needles(const std::vector<std::string>& sentences, const Draft& draft) const;
  Context json_context(EvalRandom& random, const Request& request, const Draft& draft, int64_t budget) const;
  Context needles_context(EvalRandom& random, const Request& request, const Draft& draft, int64_t budget) const;
  Context words_context(EvalRandom& random, const std::vector<std::string>& words, const std::vector<int64_t>& counts,
                        const std::string& separator) const;

  int64_t tokens(const std::string& text) const { return static_cast<int64_t>(encode_(text).size()); }
  std::vector<std::string> draw_keys(EvalRandom& random, size_t count) const;
  std::vector<std::string> draw_values(EvalRandom& random, size_t count, const std::string& kind) const;
  std::string join(const std::vector<std::string>& items) const;

  const PromptSpec& spec_;
  const Haystack& books_;
  EncodeFn encode_;
  uint64_t seed_;
  std::vector<int32_t> before_;
};

// A line of a RULER-format file as a prompt. `task` names the file in reports.
TaskPrompt from_jsonl(const JsonlPrompt& line, const std::string& task, const EncodeFn& encode,
                      const std::vector<int32_t>& before, MatchRule rule, int64_t new_tokens);

}  // namespace lacuna

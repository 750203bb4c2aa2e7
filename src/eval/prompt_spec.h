#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace lacuna {

// presets/prompts/tasks.json: every word that goes into a prompt, and the numbers that define each task.
// presets/prompts/README.md says how they are put together.
struct PromptSpec {
  struct Kind {
    std::string name, plural;
    int digits = 0;             // a number of so many digits
    std::vector<int> groups;    // or hexadecimal digits in groups joined by '-'
    std::string list;           // or a word of lists[list]
  };
  // The texts of one wording: "intro", "needle", "question", …; those below "one", "values" and "keys"
  // are called "one.question" and so on.
  using Wording = std::map<std::string, std::string>;
  struct Task {
    std::string name, wording, context, ask, kind;
    int new_tokens = 0;
    int keys = 0;  // kFill: as many as fit
    int values = 0, queries = 0;
    int chains = 0, hops = 0, letters = 0;
    int words = 0, answers = 0;
    double exponent = 0;
    int common = 0, common_count = 0, uncommon_count = 0, uncommon_most = 0;
    int before = 0, after = 0;
  };
  static constexpr int kFill = -1;

  std::string layout, answer, items, last_item;
  std::vector<std::string> count_words;
  std::map<std::string, Kind> kinds;
  std::vector<Task> tasks;  // by name
  std::map<std::string, std::map<std::string, std::vector<Wording>>> wordings;           // [wording][split]
  std::map<std::string, std::vector<std::vector<std::string>>> noise;                    // [split]
  std::map<std::string, std::vector<std::string>> lists;

  const Task& task(const std::string& name) const;  // BadInput that lists the known ones
};

// `where` names the source in messages. Throws CorruptData that names the field.
PromptSpec parse_prompt_spec(std::string_view json, const std::string& where);
// The preset that was built in.
const PromptSpec& builtin_prompt_spec();

// Replaces every {name} by values.at(name).
std::string fill_template(const std::string& text, const std::map<std::string, std::string>& values);

}  // namespace lacuna

#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// One line of a RULER-format file.
struct JsonlPrompt {
  int64_t index = 0;
  std::string input;
  std::vector<std::string> outputs;  // at least one
  int64_t length = 0;                // tokens by the file's own count; 0 where absent
  std::string answer_prefix;         // appended to the input where present, as RULER's model templates do
};

// Reads JSON lines {"index": int, "input": str, "outputs": [str, …] | str, "length": int?,
// "answer_prefix": str?}; other fields are ignored, blank lines skipped. `name` is what errors call the
// source. Every fault in the bytes throws CorruptData that names the line and the field.
std::vector<JsonlPrompt> parse_jsonl(std::string_view text, const std::string& name);
std::vector<JsonlPrompt> read_jsonl(const std::filesystem::path& path);

// Whole file; IoError with the system's reason.
std::string read_text_file(const std::filesystem::path& path);

}  // namespace lacuna

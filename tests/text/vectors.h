#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "base/mapped_file.h"

namespace lacuna {

// llama.cpp's tokenizer vectors: texts separated by a marker line, and a line of ids for each.
struct TokenizerVector {
  std::string text;
  std::vector<int32_t> ids;
};

inline std::vector<TokenizerVector> read_vectors(const std::filesystem::path& inp, const std::filesystem::path& out) {
  const std::string texts = read_text_file(inp, 1 << 20), marker = "\n__ggml_vocab_test__\n";
  std::istringstream lines(read_text_file(out, 1 << 20));
  std::vector<TokenizerVector> vectors;
  for (size_t at = 0;;) {
    const size_t end = texts.find(marker, at);
    TokenizerVector vector{texts.substr(at, end - at), {}};
    if (end == std::string::npos) break;  // behind the last marker stands nothing
    std::string line;
    std::getline(lines, line);
    std::istringstream ids(line);
    for (int32_t id; ids >> id;) vector.ids.push_back(id);
    vectors.push_back(std::move(vector));
    at = end + marker.size();
  }
  return vectors;
}

// What tests/data/tokenizers holds, unpacked when the build was configured: gpt2/, qwen2.5/, books.json, pipelines.json.
inline std::filesystem::path tokenizer_data(const char* name) { return std::filesystem::path(LACUNA_TOKENIZERS) / name; }
inline std::filesystem::path test_data() { return std::filesystem::path(LACUNA_SOURCE_DIR) / "tests" / "data"; }

}  // namespace lacuna

// What the golden tests share: where the cases lie.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

namespace lacuna::golden {

// LACUNA_GOLDENS, else tests/goldens.
inline std::filesystem::path golden_root() {
  const char* root = std::getenv("LACUNA_GOLDENS");
  return root && *root ? std::filesystem::path(root) : std::filesystem::path(LACUNA_SOURCE_DIR) / "tests" / "goldens";
}

inline std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == at)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

}  // namespace lacuna::golden

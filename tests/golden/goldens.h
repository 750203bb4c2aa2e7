// What the golden tests share: where the cases lie, and what they are called.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

namespace lacuna::golden {

// The repository's own cases, whatever LACUNA_GOLDENS says.
inline std::filesystem::path own_root() { return std::filesystem::path(LACUNA_SOURCE_DIR) / "tests" / "goldens"; }

// LACUNA_GOLDENS, else tests/goldens.
inline std::filesystem::path golden_root() {
  const char* root = std::getenv("LACUNA_GOLDENS");
  return root && *root ? std::filesystem::path(root) : own_root();
}

// Folders at or below root that hold a file which is_case(path) takes for a case's, relative to root and in order.
// Paths are given from the file system's own root on, so that LACUNA_GOLDENS may name a case's folder itself.
template <typename IsCase>
std::vector<std::string> folders_with(const std::filesystem::path& root, const IsCase& is_case) {
  namespace fs = std::filesystem;
  std::set<std::string> cases;
  const fs::path whole = fs::absolute(root);
  std::error_code error;
  for (fs::recursive_directory_iterator it(whole, fs::directory_options::follow_directory_symlink, error), end;
       !error && it != end; it.increment(error))
    if (is_case(it->path())) cases.insert(fs::relative(it->path().parent_path(), whole).string());
  return {cases.begin(), cases.end()};
}

// gtest takes letters, digits and _ for a case's name.
inline std::string case_name(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name + "_" + std::to_string(info.index);
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

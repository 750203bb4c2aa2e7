#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "base/error.h"

namespace lacuna {

// Files name replacements, and a chain of them can double a text each time. Real ones turn a byte
// into three; this bounds what a hostile file can make of an input of `bytes`.
inline size_t replacement_limit(size_t bytes) { return 16 * bytes + 1024; }

inline void check_replacement(size_t bytes, size_t limit) {
  if (bytes > limit) throw CorruptData("the tokenizer's replacements make more than {} bytes of a text", limit);
}

// Every `from` (not empty) in `text` by `to`, in one pass. CorruptData beyond `limit` bytes.
inline void replace_all(std::string& text, std::string_view from, std::string_view to, size_t limit) {
  size_t found = text.find(from);
  if (found == std::string::npos) return;
  std::string out;
  size_t at = 0;
  for (; found != std::string::npos; found = text.find(from, at)) {
    out.append(text, at, found - at).append(to);
    check_replacement(out.size(), limit);
    at = found + from.size();
  }
  text = out.append(text, at);
}

}  // namespace lacuna

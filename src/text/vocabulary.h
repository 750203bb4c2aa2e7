#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace lacuna {

// Token texts by id and ids by text.
class Vocabulary {
 public:
  // `where` starts messages. CorruptData for an id that is negative, absurdly large (a hostile file
  // must not make us allocate a table for it) or taken by another text.
  void add(std::string_view piece, int64_t id, std::string_view where);

  std::optional<int32_t> id(std::string_view piece) const {
    const auto found = ids_.find(piece);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  // Empty for an id that is not used.
  std::string_view piece(int32_t id) const {
    return id >= 0 && static_cast<size_t>(id) < pieces_.size() ? pieces_[static_cast<size_t>(id)] : std::string_view();
  }
  // Largest id + 1.
  int64_t size() const { return static_cast<int64_t>(pieces_.size()); }

 private:
  std::deque<std::string> texts_;          // never moves what the views below look at
  std::vector<std::string_view> pieces_;   // by id
  std::unordered_map<std::string_view, int32_t> ids_;
};

// The byte-level alphabet of GPT-2 (openai/gpt-2 encoder.py, bytes_to_unicode): each byte has a
// printable character. From text in that alphabet back to bytes; nothing if a character is not of it.
std::optional<std::string> bytes_of_byte_level(std::string_view piece);

}  // namespace lacuna

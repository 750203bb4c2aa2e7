#include "text/vocabulary.h"

#include <array>

#include "base/error.h"
#include "formats/json.h"
#include "text/utf8.h"

namespace lacuna {

void Vocabulary::add(std::string_view piece, int64_t id, std::string_view where) {
  // Real vocabularies have few holes: a million ids of slack is far more than any.
  const int64_t limit = 1'000'000 + 4 * static_cast<int64_t>(ids_.size());
  if (id < 0 || id >= limit)
    throw CorruptData("{}: token '{}' has id {}, expected 0 to {}", where, name_excerpt(piece), id, limit - 1);
  const auto slot = static_cast<size_t>(id);
  if (slot < pieces_.size() && pieces_[slot].data() != nullptr) {
    if (pieces_[slot] == piece) return;
    throw CorruptData("{}: tokens '{}' and '{}' have the same id {}", where, name_excerpt(pieces_[slot]),
                      name_excerpt(piece), id);
  }
  if (ids_.contains(piece))
    throw CorruptData("{}: token '{}' has two ids, {} and {}", where, name_excerpt(piece), ids_.at(piece), id);
  const std::string_view text = texts_.emplace_back(piece);
  if (slot >= pieces_.size()) pieces_.resize(slot + 1);
  pieces_[slot] = text;
  ids_.emplace(text, static_cast<int32_t>(id));
}

namespace {

// Byte + 1 by code point; 0 = not in the alphabet. Printable Latin-1 stands for itself, the 68
// other bytes take U+0100 onwards, in order.
constexpr std::array<uint16_t, 324> byte_level_table() {
  std::array<uint16_t, 324> table{};
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    table[static_cast<size_t>(itself ? byte : next++)] = static_cast<uint16_t>(byte + 1);
  }
  return table;
}

}  // namespace

std::optional<std::string> bytes_of_byte_level(std::string_view piece) {
  static constexpr auto kTable = byte_level_table();
  std::string bytes;
  for (size_t at = 0; at < piece.size();) {
    const char32_t point = utf8_next(piece, at);
    if (point >= kTable.size() || kTable[point] == 0) return std::nullopt;
    bytes += static_cast<char>(kTable[point] - 1);
  }
  return bytes;
}

}  // namespace lacuna

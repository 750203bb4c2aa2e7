#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/config_file.h"

namespace lacuna {

// The "decoder" of a tokenizer.json: ByteLevel, Metaspace, and sequences of Replace, ByteFallback,
// Fuse and Strip. Others are Unsupported. All of these work token by token, but for what the first
// token of a text loses, so that the bytes of every token can be formed once.
class PieceDecoder {
 public:
  // `tokenizer` is the whole file.
  explicit PieceDecoder(const ConfigFile& tokenizer);

  // What a token contributes to a text; may end inside a UTF-8 character.
  std::string bytes(std::string_view piece) const;
  // Leading blanks that the first token of a text loses, at most.
  size_t leading_blanks_lost() const { return leading_blanks_lost_; }
  // A file without a decoder: tokens are joined by blanks.
  bool joined_by_blanks() const { return joined_by_blanks_; }

 private:
  void add(const ConfigFile& step);

  bool byte_level_ = false, byte_fallback_ = false, joined_by_blanks_ = false;
  std::vector<std::pair<std::string, std::string>> replace_;
  size_t leading_blanks_lost_ = 0;
};

// The byte that a piece like <0x0A> stands for; −1 for any other piece.
int byte_of_fallback_piece(std::string_view piece);

}  // namespace lacuna

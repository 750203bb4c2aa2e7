#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/config_file.h"

namespace lacuna {

// A text cut into the pieces that the model sees one by one. Pieces are never empty.
struct Pieces {
  struct Range {
    size_t begin, end;  // bytes of text
  };
  std::string text;
  std::vector<Range> ranges;
  bool at_start = true;  // the text begins where the whole input begins
};

// The "pre_tokenizer" of a tokenizer.json: Split, ByteLevel, Metaspace, Digits, Whitespace,
// WhitespaceSplit, Punctuation, CharDelimiterSplit and sequences of them. Others are Unsupported.
class PreTokenizer {
 public:
  // `tokenizer` is the whole file.
  explicit PreTokenizer(const ConfigFile& tokenizer);
  // Cuts pieces.text, which is valid UTF-8 (Metaspace and a prefix space also change it).
  void apply(Pieces& pieces) const;
  // The model's alphabet is the 256 bytes (ByteLevel), not characters.
  bool byte_level() const { return byte_level_; }

 private:
  void add(const ConfigFile& step);
  std::vector<std::function<void(Pieces&)>> steps_;
  bool byte_level_ = false;
};

}  // namespace lacuna

#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/random.h"

namespace lacuna {

// Text to token ids, without special tokens.
using EncodeFn = std::function<std::vector<int32_t>(std::string_view)>;

// Text that prompts take passages from. Bytes are used as they are, except that byte order marks go,
// line ends become \n, and at most one blank line stays, as the trainer does it.
class Haystack {
 public:
  struct Book {
    std::string name, text;
    std::vector<size_t> starts;  // where a paragraph begins
    std::vector<size_t> ends;    // where a sentence ended: before a space and a capital letter
  };
  // A stretch of one book, from a paragraph's start to a sentence's end, in sentences: sentences[0],
  // the others with their leading space.
  struct Passage {
    std::vector<std::string_view> sentences;
    std::string_view text;
    int64_t tokens = 0;
  };

  void add(std::string name, std::string_view text);
  // A file, or every *.txt below a folder, in order of their names.
  static Haystack open(const std::filesystem::path& path);

  const std::vector<Book>& books() const { return books_; }
  // At most `room` tokens and at least 80 % of it, from a random paragraph of a random place.
  // BadInput when the books hold no stretch of that length.
  Passage passage(EvalRandom& random, int64_t room, const EncodeFn& encode) const;

 private:
  std::vector<Book> books_;
};

}  // namespace lacuna

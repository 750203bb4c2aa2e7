#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// A token whose text is found before the model sees the input (special tokens and others added to
// a vocabulary).
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;      // only where no word character touches it
  bool lstrip = false;           // swallows the white space before it
  bool rstrip = false;           // … behind it
  bool normalized = false;       // looked for in the normalised text
  bool special = false;
};

// Finds added tokens in text: leftmost first, the longest of those that start at one place
// (huggingface/tokenizers added_vocabulary.rs).
class AddedTokens {
 public:
  // `content`: the token's text as it stands where it is looked for. `where` starts messages.
  void add(const AddedToken& token, std::string_view content, std::string_view where);
  bool empty() const { return tokens_.empty(); }

  struct Part {
    size_t begin, end;
    int32_t id;  // -1: text between tokens
  };
  // Parts in order; white space swallowed by a token belongs to its part. `text` is valid UTF-8.
  std::vector<Part> split(std::string_view text) const;

 private:
  struct Node {
    std::map<uint8_t, int32_t> next;
    int32_t token = -1;  // index into tokens_
  };
  // The longest token that starts at `at`, or null.
  const AddedToken* match(std::string_view text, size_t at, size_t& end) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_{1};
  std::array<bool, 256> starts_{};
};

}  // namespace lacuna

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lacuna {

// One step through bytes that should be UTF-8.
struct Utf8Step {
  size_t bytes;    // ≥ 1
  char32_t point;  // code point; meaningless unless valid
  bool valid;      // else `bytes` is a maximal invalid part (Unicode 15, section 3.9, D93b)
  bool cut_short;  // invalid only because the text ends inside a character
};
// Text must not be empty.
Utf8Step utf8_step(std::string_view text);

// The code point that starts at `at` in text known to be valid; moves `at` behind it.
char32_t utf8_next(std::string_view text, size_t& at);
// Start of the character that ends before `at` (> 0) in text known to be valid.
size_t utf8_before(std::string_view text, size_t at);

void utf8_append(std::string& text, char32_t point);
// Unicode's White_Space property.
bool is_white_space(char32_t point);
bool utf8_valid(std::string_view text);
// Every maximal invalid part replaced by U+FFFD.
std::string utf8_lossy(std::string_view text);
// Appends the whole characters of `bytes` to `text` (invalid parts as U+FFFD) and leaves in `bytes`
// only the beginning of a character that later bytes may complete.
void utf8_drain(std::string& bytes, std::string& text);

}  // namespace lacuna

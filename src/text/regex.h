#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace lacuna {

// A compiled pattern in the dialect of tokenizer.json files (Oniguruma's), run by PCRE2 in UTF-8
// mode with Unicode classes. A pattern that backtracks without end is stopped by a match limit.
class Regex {
 public:
  // `where` starts the message of the CorruptData for a pattern that does not compile.
  Regex(const std::string& pattern, const std::string& where);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  // First match at or after `from` in `text`, which must be valid UTF-8: [begin, end). False when
  // there is none. BadInput when the pattern needs more steps than the limit allows.
  bool find(std::string_view text, size_t from, std::pair<size_t, size_t>& match) const;

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace lacuna

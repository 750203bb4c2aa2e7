#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/regex.h"

#include <pcre2.h>

#include "base/error.h"
#include "formats/json.h"

namespace lacuna {
namespace {

// Longest pattern taken; real ones stay below 1 KB.
constexpr size_t kMaxPattern = 64 * 1024;
// PCRE2 counts backtracking points. A run of a million blanks needs about that many; a pattern
// like (a+)+b would need 2^n.
constexpr uint32_t kMatchLimit = 20'000'000;
constexpr uint32_t kHeapLimitKiB = 256 * 1024;
constexpr size_t kJitStackBytes = 4 << 20;

std::string message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

// Scratch of one thread; patterns are shared between threads, match data must not be.
struct Scratch {
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 * 1024, kJitStackBytes, nullptr);
  Scratch() {
    if (!context || !data || !stack) throw OutOfMemory("no memory for regular expression matching");
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKiB);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Scratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

// Oniguruma's \s is Unicode White_Space, its \w letters, marks, decimal digits and connectors;
// PCRE2's differ in a few characters. Spelled out, both agree.
std::string spelled_out(const std::string& pattern) {
  constexpr std::string_view kSpace = R"(\t-\r\x{85}\p{Z})", kWord = R"(\p{L}\p{M}\p{Nd}\p{Pc})";
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char next = pattern[++i];
      const std::string_view set = next == 's' || next == 'S' ? kSpace : kWord;
      if ((next == 's' || next == 'w') && in_class)
        out += set;
      else if (next == 's' || next == 'w')
        ((out += '[') += set) += ']';
      else if ((next == 'S' || next == 'W') && !in_class)
        ((out += "[^") += set) += ']';
      else
        (out += c) += next;
      continue;
    }
    if (!in_class && c == '[') {
      in_class = true;
      out += c;
      // A bracket right at the start stands for itself.
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
      continue;
    }
    if (in_class && c == ']') in_class = false;
    out += c;
  }
  return out;
}

}  // namespace

struct Regex::Code {
  pcre2_code* code = nullptr;
  std::string where;
  ~Code() { pcre2_code_free(code); }
};

Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Regex::Regex(const std::string& pattern, const std::string& where) : code_(std::make_unique<Code>()) {
  if (pattern.size() > kMaxPattern)
    throw CorruptData("{}: a pattern of {} bytes, expected at most {}", where, pattern.size(), kMaxPattern);
  const std::string plain = spelled_out(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  // \C could split a character, which the unchecked matching below must never see.
  code_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(plain.data()), plain.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (!code_->code)
    throw CorruptData("{}: pattern '{}' does not compile at byte {}: {}", where, name_excerpt(plain), offset,
                      message(error));
  code_->where = where;
  pcre2_jit_compile(code_->code, PCRE2_JIT_COMPLETE);  // where it fails, matching is slower and the same
}

bool Regex::find(std::string_view text, size_t from, std::pair<size_t, size_t>& match) const {
  thread_local Scratch scratch;
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  int n = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, scratch.data, scratch.context);
  if (n == PCRE2_ERROR_JIT_STACKLIMIT)  // the interpreter keeps its stack on the heap
    n = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch.data,
                    scratch.context);
  if (n == PCRE2_ERROR_NOMATCH) return false;
  if (n < 0)
    throw BadInput("{}: the tokenizer's pattern failed on a text of {} bytes, at byte {}: {}", code_->where,
                   text.size(), from, message(n));
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(scratch.data);
  // \K inside a look-ahead can place the start of a match behind its end.
  if (bounds[0] > bounds[1] || bounds[0] < from)
    throw BadInput("{}: the tokenizer's pattern matched backwards at byte {}", code_->where, from);
  match = {bounds[0], bounds[1]};
  return true;
}

}  // namespace lacuna

#include "text/added_tokens.h"

#include <utf8proc.h>

#include "base/error.h"
#include "text/utf8.h"

namespace lacuna {
namespace {

// Longest text of an added token: bounds the work at one position of the input.
constexpr size_t kMaxContent = 1024;

bool is_word(char32_t point) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(point))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
  }
}

char32_t point_before(std::string_view text, size_t at) {
  size_t begin = utf8_before(text, at);
  return utf8_next(text, begin);
}

char32_t point_at(std::string_view text, size_t at) { return utf8_next(text, at); }

}  // namespace

void AddedTokens::add(const AddedToken& token, std::string_view content, std::string_view where) {
  if (content.empty()) return;
  if (content.size() > kMaxContent)
    throw CorruptData("{}: added token {} has a text of {} bytes, expected at most {}", where, token.id,
                      content.size(), kMaxContent);
  size_t node = 0;
  for (char c : content) {
    const auto fresh = static_cast<int32_t>(nodes_.size());
    const auto [child, added] = nodes_[node].next.try_emplace(static_cast<uint8_t>(c), fresh);
    node = static_cast<size_t>(child->second);
    if (added) nodes_.emplace_back();
  }
  nodes_[node].token = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
  starts_[static_cast<uint8_t>(content[0])] = true;
}

const AddedToken* AddedTokens::match(std::string_view text, size_t at, size_t& end) const {
  const AddedToken* found = nullptr;
  size_t node = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const auto child = nodes_[node].next.find(static_cast<uint8_t>(text[i]));
    if (child == nodes_[node].next.end()) break;
    node = static_cast<size_t>(child->second);
    if (nodes_[node].token >= 0) {
      found = &tokens_[static_cast<size_t>(nodes_[node].token)];
      end = i + 1;
    }
  }
  return found;
}

std::vector<AddedTokens::Part> AddedTokens::split(std::string_view text) const {
  std::vector<Part> parts;
  size_t covered = 0;
  for (size_t at = 0; at < text.size();) {
    size_t end = 0;
    const AddedToken* token = starts_[static_cast<uint8_t>(text[at])] ? match(text, at, end) : nullptr;
    if (!token) {
      ++at;
      continue;
    }
    size_t begin = at;
    at = end;
    if (token->single_word && ((begin > 0 && is_word(point_before(text, begin))) ||
                               (end < text.size() && is_word(point_at(text, end)))))
      continue;
    if (token->lstrip)
      while (begin > covered && is_white_space(point_before(text, begin))) begin = utf8_before(text, begin);
    if (token->rstrip)
      while (end < text.size() && is_white_space(point_at(text, end))) utf8_next(text, end);
    if (begin < covered) continue;  // white space swallowed by the token before held it
    if (covered < begin) parts.push_back({covered, begin, -1});
    parts.push_back({begin, end, token->id});
    covered = at = end;
  }
  if (covered < text.size()) parts.push_back({covered, text.size(), -1});
  return parts;
}

}  // namespace lacuna

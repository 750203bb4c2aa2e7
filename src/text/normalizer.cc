#include "text/normalizer.h"

#include <algorithm>
#include <memory>

#include <utf8proc.h>

#include "text/regex.h"
#include "text/replace.h"
#include "text/utf8.h"

namespace lacuna {
namespace {

// Text without marks and compatibility characters is in every normal form that composes: nothing
// below U+0300 composes with what follows it. Most text never goes further than this.
bool below_marks(const std::string& text) {
  // The lead byte 0xCC starts U+0300; continuation bytes are below 0xC0.
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0xCC; });
}

bool ascii(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x80; });
}

// Unicode normal forms (UAX 15). Not utf8proc_map: it orders marks by exchanging neighbours, which
// takes quadratic time on a long run of them.
void normal_form(std::string& text, bool compose, bool compatibility) {
  if (ascii(text) || (compose && !compatibility && below_marks(text))) return;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE |
                                                      (compatibility ? UTF8PROC_COMPAT : 0));
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  utf8proc_int32_t expanded[32];  // the longest decomposition of one character has 18 points
  for (size_t at = 0; at < text.size();) {
    const auto point = static_cast<utf8proc_int32_t>(utf8_next(text, at));
    int boundary = 0;
    const utf8proc_ssize_t n = utf8proc_decompose_char(point, expanded, 32, options, &boundary);
    if (n < 0 || n > 32) throw InternalError("utf8proc cannot decompose U+{:04X}: {}", point, n);
    points.insert(points.end(), expanded, expanded + n);
  }
  const auto combining = [](utf8proc_int32_t point) { return utf8proc_get_property(point)->combining_class; };
  for (size_t begin = 0; begin < points.size(); ++begin) {
    if (combining(points[begin]) == 0) continue;
    size_t end = begin + 1;
    while (end < points.size() && combining(points[end]) != 0) ++end;
    std::stable_sort(points.begin() + static_cast<ptrdiff_t>(begin), points.begin() + static_cast<ptrdiff_t>(end),
                     [&](auto a, auto b) { return combining(a) < combining(b); });
    begin = end;
  }
  auto size = static_cast<utf8proc_ssize_t>(points.size());
  if (compose) {
    size = utf8proc_normalize_utf32(points.data(), size,
                                    static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    if (size < 0) throw InternalError("utf8proc cannot compose: {}", size);
  }
  text.clear();
  for (utf8proc_ssize_t i = 0; i < size; ++i) utf8_append(text, static_cast<char32_t>(points[static_cast<size_t>(i)]));
}

void lowercase(std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const char32_t point = utf8_next(text, at);
    // The one character whose lower case is longer (U+0130); utf8proc maps one to one.
    if (point == 0x130)
      out += "i\xCC\x87";
    else
      utf8_append(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(point))));
  }
  text = std::move(out);
}

void replace_pattern(std::string& text, const Regex& pattern, const std::string& to, size_t limit) {
  std::string out;
  size_t at = 0, from = 0;
  std::pair<size_t, size_t> match;
  while (from <= text.size() && pattern.find(text, from, match)) {
    out.append(text, at, match.first - at) += to;
    check_replacement(out.size(), limit);
    at = from = match.second;
    if (match.first == match.second) {
      if (from == text.size()) break;
      utf8_next(text, from);
    }
  }
  text = out.append(text, at);
}

void strip(std::string& text, bool left, bool right) {
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    size_t next = begin;
    if (!is_white_space(utf8_next(text, next))) break;
    begin = next;
  }
  while (right && begin < end) {
    const size_t before = utf8_before(text, end);
    size_t at = before;
    if (!is_white_space(utf8_next(text, at))) break;
    end = before;
  }
  text = text.substr(begin, end - begin);
}

}  // namespace

Normalizer::Normalizer(const ConfigFile& tokenizer) {
  if (const auto step = tokenizer.object("normalizer")) add(*step);
}

void Normalizer::add(const ConfigFile& step) {
  const std::string type = step.text("type");
  if (type == "Sequence") {
    for (const ConfigFile& inner : step.objects("normalizers")) add(inner);
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    steps_.push_back([compose = type.back() == 'C', compatibility = type.size() == 4](std::string& text) {
      normal_form(text, compose, compatibility);
    });
  } else if (type == "Lowercase") {
    steps_.push_back(lowercase);
  } else if (type == "Prepend") {
    steps_.push_back([prefix = step.text("prepend")](std::string& text) {
      if (!text.empty()) text.insert(0, prefix);
    });
  } else if (type == "Strip") {
    steps_.push_back([left = step.boolean("strip_left", true), right = step.boolean("strip_right", true)](
                         std::string& text) { strip(text, left, right); });
  } else if (type == "Replace") {
    const std::string to = step.text("content");
    const auto pattern = step.object("pattern");
    if (!pattern) step.wrong("pattern", "an object with String or Regex");
    if (pattern->has("String")) {
      const std::string from = pattern->text("String");
      if (from.empty()) pattern->wrong("String", "a text that is not empty");
      steps_.push_back(
          [from, to](std::string& text) { replace_all(text, from, to, replacement_limit(text.size())); });
    } else {
      auto regex = std::make_shared<const Regex>(pattern->text("Regex"), step.file());
      steps_.push_back(
          [regex, to](std::string& text) { replace_pattern(text, *regex, to, replacement_limit(text.size())); });
    }
  } else {
    step.unsupported("type", "the normalizers NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip and Sequence");
  }
}

void Normalizer::apply(std::string& text) const {
  const size_t limit = replacement_limit(text.size());
  for (const auto& step : steps_) {
    step(text);
    check_replacement(text.size(), limit);
  }
}

}  // namespace lacuna

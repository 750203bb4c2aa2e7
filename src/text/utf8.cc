#include "text/utf8.h"

#include <utf8proc.h>

namespace lacuna {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

}  // namespace

Utf8Step utf8_step(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, lead, true, false};
  // Length, and the bounds of the second byte that keep out overlong forms, surrogates and what
  // lies above U+10FFFF (Unicode 15, table 3-7).
  size_t length = 0;
  uint8_t low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {1, 0, false, false};
  }
  char32_t point = lead & (0xFFu >> (length + 1));
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {i, 0, false, true};
    if (byte(i) < low || byte(i) > high) return {i, 0, false, false};
    point = (point << 6) | (byte(i) & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  return {length, point, true, false};
}

char32_t utf8_next(std::string_view text, size_t& at) {
  const Utf8Step step = utf8_step(text.substr(at));
  at += step.bytes;
  return step.point;
}

size_t utf8_before(std::string_view text, size_t at) {
  do --at;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80);
  return at;
}

void utf8_append(std::string& text, char32_t point) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (point < 0x80) {
    put(point);
  } else if (point < 0x800) {
    put(0xC0 | (point >> 6));
    put(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    put(0xE0 | (point >> 12));
    put(0x80 | ((point >> 6) & 0x3F));
    put(0x80 | (point & 0x3F));
  } else {
    put(0xF0 | (point >> 18));
    put(0x80 | ((point >> 12) & 0x3F));
    put(0x80 | ((point >> 6) & 0x3F));
    put(0x80 | (point & 0x3F));
  }
}

bool is_white_space(char32_t point) {
  if (point < 0x80) return (point >= 9 && point <= 13) || point == ' ';
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(point));
  return point == 0x85 || (category >= UTF8PROC_CATEGORY_ZS && category <= UTF8PROC_CATEGORY_ZP);
}

bool utf8_valid(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text.substr(at));
    if (!step.valid) return false;
    at += step.bytes;
  }
  return true;
}

std::string utf8_lossy(std::string_view text) {
  std::string bytes(text), out;
  utf8_drain(bytes, out);
  if (!bytes.empty()) out += kReplacement;
  return out;
}

void utf8_drain(std::string& bytes, std::string& text) {
  size_t at = 0;
  while (at < bytes.size()) {
    const Utf8Step step = utf8_step(std::string_view(bytes).substr(at));
    if (step.cut_short) break;
    if (step.valid)
      text.append(bytes, at, step.bytes);
    else
      text += kReplacement;
    at += step.bytes;
  }
  bytes.erase(0, at);
}

}  // namespace lacuna

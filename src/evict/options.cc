#include "evict/options.h"

#include <charconv>
#include <cmath>

#include <fmt/ranges.h>

#include "base/error.h"

namespace lacuna {

PolicyOptions::PolicyOptions(std::string_view policy, std::string_view text) : policy_(policy) {
  while (!text.empty()) {
    const size_t comma = text.find(',');
    const std::string_view item = text.substr(0, comma);
    const size_t equals = item.find('=');
    if (equals == std::string_view::npos || equals == 0)
      throw BadInput("policy {}: \"{}\" is no switch; switches are written key=value, separated by commas", policy_, item);
    for (const Entry& e : entries_)
      if (e.key == item.substr(0, equals)) throw BadInput("policy {}: the switch {} is given twice", policy_, e.key);
    entries_.push_back({std::string(item.substr(0, equals)), std::string(item.substr(equals + 1))});
    text = comma == std::string_view::npos ? std::string_view() : text.substr(comma + 1);
  }
}

const std::string* PolicyOptions::take(std::string_view key) {
  known_.emplace_back(key);
  for (Entry& e : entries_)
    if (e.key == key) {
      e.used = true;
      given_ += (given_.empty() ? "" : ",") + e.key + "=" + e.value;
      return &e.value;
    }
  return nullptr;
}

int PolicyOptions::integer(std::string_view key, int otherwise, int least, int most) {
  const std::string* text = take(key);
  if (!text) return otherwise;
  int value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || value < least || value > most)
    throw BadInput("policy {}: {}={} is not a whole number from {} to {}", policy_, key, *text, least, most);
  return value;
}

double PolicyOptions::number(std::string_view key, double otherwise, double least, double most) {
  const std::string* text = take(key);
  if (!text) return otherwise;
  double value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || !(value >= least && value <= most))
    throw BadInput("policy {}: {}={} is not a number from {} to {}", policy_, key, *text, least, most);
  return value;
}

bool PolicyOptions::flag(std::string_view key, bool otherwise) {
  const std::string* text = take(key);
  if (!text) return otherwise;
  if (*text == "true" || *text == "1") return true;
  if (*text == "false" || *text == "0") return false;
  throw BadInput("policy {}: {}={} is neither true nor false", policy_, key, *text);
}

int PolicyOptions::choice(std::string_view key, std::span<const std::string_view> values, int otherwise) {
  const std::string* text = take(key);
  if (!text) return otherwise;
  for (size_t i = 0; i < values.size(); ++i)
    if (*text == values[i]) return static_cast<int>(i);
  throw BadInput("policy {}: {}={} is unknown; values are {}", policy_, key, *text, fmt::join(values, ", "));
}

int PolicyOptions::odd(std::string_view key, int otherwise) {
  const int value = integer(key, otherwise, 1, 1023);
  if (value % 2 == 0) throw BadInput("policy {}: {}={} is even; a pooling kernel is odd, so that it has a middle", policy_, key, value);
  return value;
}

void PolicyOptions::done() const {
  for (const Entry& e : entries_)
    if (!e.used) {
      if (known_.empty()) throw BadInput("policy {}: {} is given, but this policy has no switches", policy_, e.key);
      throw BadInput("policy {}: there is no switch {}; switches are {}", policy_, e.key, fmt::join(known_, ", "));
    }
}

std::string PolicyOptions::canonical() const { return given_.empty() ? policy_ : policy_ + ":" + given_; }

}  // namespace lacuna

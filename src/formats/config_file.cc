#include "formats/config_file.h"

#include <cmath>
#include <utility>

#include "base/mapped_file.h"
#include "formats/json.h"

namespace lacuna {
namespace {

const Json* find(const Json& object, std::string_view field) {
  const auto found = object.find(field);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

}  // namespace

ConfigFile ConfigFile::load(const std::filesystem::path& path, size_t limit) {
  return parse(read_text_file(path, limit), path.string());
}

ConfigFile ConfigFile::parse(std::string_view text, std::string name, ErrorKind kind) {
  ConfigFile config;
  config.file_ = std::make_shared<const std::string>(std::move(name));
  config.kind_ = kind;
  try {
    config.object_ = std::make_shared<const Json>(parse_json(text, *config.file_));
  } catch (const CorruptData& error) {
    config.fail(error.what());
  }
  if (!config.object_->is_object())
    config.fail(fmt::format("{}: is {}, expected a JSON object", config.file(), json_excerpt(*config.object_)));
  return config;
}

void ConfigFile::fail(std::string message) const {
  if (kind_ == ErrorKind::kBadInput) throw BadInput("{}", message);
  throw CorruptData("{}", message);
}

void ConfigFile::wrong(std::string_view field, std::string_view expected) const {
  fail(fmt::format("{}: field '{}{}': found {}, expected {}", file(), prefix_, field, shown(field), expected));
}

void ConfigFile::unsupported(std::string_view field, std::string_view expected) const {
  throw Unsupported("{}: field '{}{}': found {}, this build supports {}", file(), prefix_, field, shown(field),
                    expected);
}

std::string ConfigFile::shown(std::string_view field) const {
  const Json* value = find(*object_, field);
  return value ? json_excerpt(*value) : mentions(field) ? "null" : "nothing";
}

bool ConfigFile::has(std::string_view field) const { return find(*object_, field) != nullptr; }
bool ConfigFile::mentions(std::string_view field) const { return object_->contains(field); }

std::vector<std::string> ConfigFile::fields() const {
  std::vector<std::string> names;
  for (const auto& [name, unused] : object_->items()) names.push_back(name);
  return names;
}

const Json& ConfigFile::required(std::string_view field, std::string_view expected) const {
  const Json* value = find(*object_, field);
  if (!value) wrong(field, expected);
  return *value;
}

int64_t ConfigFile::to_integer(const Json& value, std::string_view field, int64_t min, int64_t max) const {
  const std::string expected = fmt::format("an integer from {} to {}", min, max);
  int64_t n = 0;
  if (value.is_number_unsigned()) {
    const uint64_t u = value.get<uint64_t>();
    if (u > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) wrong(field, expected);
    n = static_cast<int64_t>(u);
  } else if (value.is_number_integer()) {
    n = value.get<int64_t>();
  } else if (value.is_number_float()) {
    const double d = value.get<double>();
    // Beyond 2^53 a double no longer tells neighbouring integers apart.
    if (!(std::abs(d) <= 9007199254740992.0) || d != std::floor(d)) wrong(field, expected);
    n = static_cast<int64_t>(d);
  } else {
    wrong(field, expected);
  }
  if (n < min || n > max) wrong(field, expected);
  return n;
}

int64_t ConfigFile::integer(std::string_view field, int64_t min, int64_t max) const {
  return to_integer(required(field, fmt::format("an integer from {} to {}", min, max)), field, min, max);
}

int64_t ConfigFile::integer(std::string_view field, int64_t min, int64_t max, int64_t fallback) const {
  return has(field) ? integer(field, min, max) : fallback;
}

uint64_t ConfigFile::unsigned_integer(std::string_view field, uint64_t fallback) const {
  const Json* value = find(*object_, field);
  if (!value) return fallback;
  if (!value->is_number_unsigned()) wrong(field, "an integer from 0 to 18446744073709551615");
  return value->get<uint64_t>();
}

double ConfigFile::number(std::string_view field, double min, double max) const {
  const std::string expected = fmt::format("a number from {} to {}", min, max);
  const Json& value = required(field, expected);
  if (!value.is_number()) wrong(field, expected);
  const double d = value.get<double>();
  if (!(d >= min && d <= max)) wrong(field, expected);
  return d;
}

double ConfigFile::number(std::string_view field, double min, double max, double fallback) const {
  return has(field) ? number(field, min, max) : fallback;
}

bool ConfigFile::boolean(std::string_view field, bool fallback) const {
  const Json* value = find(*object_, field);
  if (!value) return fallback;
  if (!value->is_boolean()) wrong(field, "true or false");
  return value->get<bool>();
}

std::string ConfigFile::text(std::string_view field) const {
  const Json& value = required(field, "a text");
  if (!value.is_string()) wrong(field, "a text");
  return value.get<std::string>();
}

std::string ConfigFile::text(std::string_view field, std::string_view fallback) const {
  return has(field) ? text(field) : std::string(fallback);
}

std::vector<int64_t> ConfigFile::integers(std::string_view field, int64_t min, int64_t max) const {
  const Json* value = find(*object_, field);
  std::vector<int64_t> list;
  if (!value) return list;
  if (!value->is_array()) return {to_integer(*value, field, min, max)};
  for (const Json& item : *value) list.push_back(to_integer(item, field, min, max));
  return list;
}

std::vector<std::string> ConfigFile::texts(std::string_view field) const {
  const Json* value = find(*object_, field);
  std::vector<std::string> list;
  if (!value) return list;
  if (value->is_string()) return {value->get<std::string>()};
  if (!value->is_array()) wrong(field, "a text or a list of texts");
  for (const Json& item : *value) {
    if (!item.is_string()) wrong(field, "a text or a list of texts");
    list.push_back(item.get<std::string>());
  }
  return list;
}

ConfigFile ConfigFile::inside(const Json& value, std::string_view field) const {
  ConfigFile inner;
  inner.file_ = file_;
  inner.object_ = std::shared_ptr<const Json>(object_, &value);  // shares the owner, points inside
  inner.prefix_ = fmt::format("{}{}.", prefix_, field);
  inner.kind_ = kind_;
  return inner;
}

std::optional<ConfigFile> ConfigFile::object(std::string_view field) const {
  const Json* value = find(*object_, field);
  if (!value) return std::nullopt;
  if (!value->is_object()) wrong(field, "an object");
  return inside(*value, field);
}

std::vector<ConfigFile> ConfigFile::objects(std::string_view field) const {
  const Json* value = find(*object_, field);
  std::vector<ConfigFile> list;
  if (!value) return list;
  if (!value->is_array()) wrong(field, "a list of objects");
  for (const Json& item : *value) {
    const std::string name = fmt::format("{}[{}]", field, list.size());
    if (!item.is_object()) wrong(field, "a list of objects");
    list.push_back(inside(item, name));
  }
  return list;
}

bool ConfigFile::is_object(std::string_view field) const {
  const Json* value = find(*object_, field);
  return value && value->is_object();
}

const Json* ConfigFile::raw(std::string_view field) const { return find(*object_, field); }

}  // namespace lacuna

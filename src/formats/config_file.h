#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "base/error.h"

namespace lacuna {

// Typed access to the fields of a JSON object from outside: a config.json, or any object inside
// one. Every getter checks type and range and throws a sentence with file, field, found and
// expected. A field whose value is null counts as absent. Getters with a fallback return it when
// the field is absent; those without demand the field.
class ConfigFile {
 public:
  // IoError when it cannot be read, CorruptData when it is not a JSON object. The limit on the
  // file's bytes is for configurations, real ones stay below 100 KB; tokenizers need more.
  static ConfigFile load(const std::filesystem::path& path, size_t limit = 16 << 20);
  // `name` takes the path's place in messages; `kind` is what faults are reported as: kCorruptData
  // for files, kBadInput for a request of the user's.
  static ConfigFile parse(std::string_view text, std::string name, ErrorKind kind = ErrorKind::kCorruptData);

  // Path, or name given to parse().
  const std::string& file() const { return *file_; }
  bool has(std::string_view field) const;        // present and not null
  bool mentions(std::string_view field) const;   // present, null or not
  std::vector<std::string> fields() const;

  // Integers may be written as 4096 or 4096.0.
  int64_t integer(std::string_view field, int64_t min, int64_t max) const;
  int64_t integer(std::string_view field, int64_t min, int64_t max, int64_t fallback) const;
  // Any 64-bit value, for seeds.
  uint64_t unsigned_integer(std::string_view field, uint64_t fallback) const;
  // Finite; min and max belong to the range.
  double number(std::string_view field, double min, double max) const;
  double number(std::string_view field, double min, double max, double fallback) const;
  bool boolean(std::string_view field, bool fallback) const;
  std::string text(std::string_view field) const;
  std::string text(std::string_view field, std::string_view fallback) const;
  // A list, or one value that stands for a list of one; empty when absent.
  std::vector<int64_t> integers(std::string_view field, int64_t min, int64_t max) const;
  std::vector<std::string> texts(std::string_view field) const;
  // An object inside; nothing when absent.
  std::optional<ConfigFile> object(std::string_view field) const;
  bool is_object(std::string_view field) const;
  // A list of objects; empty when absent.
  std::vector<ConfigFile> objects(std::string_view field) const;
  // The value itself, for large tables; valid as long as this object. Null pointer when absent.
  const nlohmann::json* raw(std::string_view field) const;

  // Throws the error of a field that has the right type and a wrong value.
  [[noreturn]] void wrong(std::string_view field, std::string_view expected) const;
  // As above for what is well-formed but outside what this build can do.
  [[noreturn]] void unsupported(std::string_view field, std::string_view expected) const;
  // The field's value as it stands, for messages: "null" when absent.
  std::string shown(std::string_view field) const;

 private:
  ConfigFile() = default;
  ConfigFile inside(const nlohmann::json& value, std::string_view field) const;
  const nlohmann::json& required(std::string_view field, std::string_view expected) const;
  int64_t to_integer(const nlohmann::json& value, std::string_view field, int64_t min, int64_t max) const;
  [[noreturn]] void fail(std::string message) const;

  std::shared_ptr<const std::string> file_;
  std::shared_ptr<const nlohmann::json> object_;
  std::string prefix_;  // "rope_parameters." inside that object
  ErrorKind kind_ = ErrorKind::kCorruptData;
};

}  // namespace lacuna

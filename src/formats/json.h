#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace lacuna {

using Json = nlohmann::json;

// Deepest nesting of objects and lists that is read. Real checkpoints stay below 12; the limit
// keeps recursive walks over the result (printing, copying) off the end of the stack.
inline constexpr int kMaxJsonDepth = 64;

// Parses one JSON document. `where` (a path) starts every message. Unlike most parsers it refuses
// duplicate keys, because two readers could disagree about which one counts.
// Throws CorruptData with the byte position; OutOfMemory when the document does not fit.
Json parse_json(std::string_view text, std::string_view where);

// The value as text for a message, cut to a readable length.
std::string json_excerpt(const Json& value);
// A name out of a file for a message: cut likewise, control characters escaped.
std::string name_excerpt(std::string_view name);

}  // namespace lacuna

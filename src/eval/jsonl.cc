#include "eval/jsonl.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "formats/json.h"

namespace lacuna {
namespace {

std::string string_field(const Json& value, const std::string& name, int64_t line, const char* field) {
  if (!value.is_string())
    throw CorruptData("{}:{}: \"{}\" is {}, expected a string", name, line, field, value.type_name());
  return value.get<std::string>();
}

int64_t integer_field(const Json& value, const std::string& name, int64_t line, const char* field) {
  const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= INT64_MAX : value.is_number_integer();
  if (!fits || value.get<int64_t>() < 0)
    throw CorruptData("{}:{}: \"{}\" is {}, expected a whole number from 0", name, line, field, value.dump().substr(0, 40));
  return value.get<int64_t>();
}

JsonlPrompt parse_line(std::string_view text, const std::string& name, int64_t line) {
  const Json json = parse_json(text, fmt::format("{}:{}", name, line));
  if (!json.is_object()) throw CorruptData("{}:{}: the line is {}, expected an object", name, line, json.type_name());
  for (const char* field : {"input", "outputs"})
    if (!json.contains(field)) throw CorruptData("{}:{}: field \"{}\" is missing", name, line, field);

  JsonlPrompt out;
  out.index = json.contains("index") ? integer_field(json["index"], name, line, "index") : line - 1;
  out.input = string_field(json["input"], name, line, "input");
  if (out.input.empty()) throw CorruptData("{}:{}: \"input\" is empty", name, line);
  const Json& outputs = json["outputs"];
  if (outputs.is_array()) {
    for (const Json& one : outputs) out.outputs.push_back(string_field(one, name, line, "outputs"));
  } else {
    out.outputs.push_back(string_field(outputs, name, line, "outputs"));
  }
  if (out.outputs.empty()) throw CorruptData("{}:{}: \"outputs\" is empty, expected at least one answer", name, line);
  for (const std::string& one : out.outputs)
    if (one.empty()) throw CorruptData("{}:{}: an entry of \"outputs\" is empty, which any answer would match", name, line);
  if (json.contains("length")) out.length = integer_field(json["length"], name, line, "length");
  if (json.contains("answer_prefix")) out.answer_prefix = string_field(json["answer_prefix"], name, line, "answer_prefix");
  return out;
}

}  // namespace

std::vector<JsonlPrompt> parse_jsonl(std::string_view text, const std::string& name) {
  std::vector<JsonlPrompt> out;
  int64_t line = 0;
  while (!text.empty()) {
    ++line;
    const size_t end = text.find('\n');
    std::string_view row = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (row.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    out.push_back(parse_line(row, name, line));
  }
  if (out.empty()) throw CorruptData("{}: no prompts found in {} lines", name, line);
  return out;
}

std::vector<JsonlPrompt> read_jsonl(const std::filesystem::path& path) {
  return parse_jsonl(read_text_file(path), path.string());
}

std::string read_text_file(const std::filesystem::path& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) throw IoError("{} is a directory, expected a file", path.string());
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  if (!in) throw IoError("cannot open {}: {}", path.string(), std::strerror(errno));
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (in.bad()) throw IoError("cannot read {}: {}", path.string(), std::strerror(errno));
  return text;
}

}  // namespace lacuna

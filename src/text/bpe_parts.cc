#include "text/bpe_parts.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "base/error.h"
#include "formats/json.h"

namespace lacuna {
namespace {

// A table of tokens and ids.
void add_all(const Json& table, const std::string& where, Vocabulary& vocabulary) {
  // By id, so that the vocabulary's bound on holes sees them in order.
  std::vector<std::pair<int64_t, const std::string*>> by_id;
  for (const auto& [piece, id] : table.get_ref<const Json::object_t&>()) {
    if (!id.is_number_integer())
      throw CorruptData("{}: token '{}' has the id {}, expected an integer", where, name_excerpt(piece),
                        json_excerpt(id));
    by_id.emplace_back(id.get<int64_t>(), &piece);
  }
  std::sort(by_id.begin(), by_id.end());
  for (const auto& [id, piece] : by_id) vocabulary.add(*piece, id, where);
}

AddedToken parse_added_token(const ConfigFile& token, int32_t id) {
  AddedToken added;
  added.id = id;
  added.content = token.text("content");
  added.single_word = token.boolean("single_word", false);
  added.lstrip = token.boolean("lstrip", false);
  added.rstrip = token.boolean("rstrip", false);
  added.special = token.boolean("special", false);
  added.normalized = token.boolean("normalized", !added.special);
  return added;
}

BpeParts parse_model(const ConfigFile& tokenizer) {
  BpeParts parts;
  const auto model = tokenizer.object("model");
  if (!model) tokenizer.wrong("model", "an object");
  // Early files leave the type out; only BPE has merges.
  if (model->text("type", model->has("merges") ? "BPE" : "") != "BPE") model->unsupported("type", "\"BPE\"");
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!model->text(affix, "").empty()) model->unsupported(affix, "an empty text");
  if (model->number("dropout", 0, 1, 0) != 0) model->unsupported("dropout", "0");

  const Json* vocab = model->raw("vocab");
  if (!vocab || !vocab->is_object()) model->wrong("vocab", "an object of tokens and ids");
  add_all(*vocab, tokenizer.file(), parts.vocabulary);

  const Json* merges = model->raw("merges");
  if (!merges || !merges->is_array()) model->wrong("merges", "a list of pairs");
  parts.merges.reserve(merges->size());
  for (const Json& merge : *merges) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      parts.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : std::string();
    const size_t blank = text.find(' ');
    if (blank == std::string::npos || text.find(' ', blank + 1) != std::string::npos)
      throw CorruptData("{}: model.merges[{}] is {}, expected two tokens", tokenizer.file(), parts.merges.size(),
                        json_excerpt(merge));
    parts.merges.emplace_back(text.substr(0, blank), text.substr(blank + 1));
  }

  parts.options.byte_fallback = model->boolean("byte_fallback", false);
  parts.options.ignore_merges = model->boolean("ignore_merges", false);
  parts.options.fuse_unk = model->boolean("fuse_unk", false);
  if (const std::string unk = model->text("unk_token", ""); !unk.empty()) {
    parts.options.unk = parts.vocabulary.id(unk);
    if (!parts.options.unk) model->wrong("unk_token", "a token of the vocabulary");
  }
  return parts;
}

}  // namespace

BpeParts parse_bpe_parts(const ConfigFile& tokenizer) {
  BpeParts parts = parse_model(tokenizer);
  for (const ConfigFile& token : tokenizer.objects("added_tokens"))
    parts.added.push_back(parse_added_token(
        token, static_cast<int32_t>(token.integer("id", 0, std::numeric_limits<int32_t>::max()))));
  return parts;
}

BpeParts parse_gpt2_parts(std::string_view vocab, const std::string& vocab_path, std::string_view merges,
                          const std::string& merges_path) {
  BpeParts parts;
  const Json table = parse_json(vocab, vocab_path);
  if (!table.is_object()) throw CorruptData("{}: is not an object of tokens and ids", vocab_path);
  add_all(table, vocab_path, parts.vocabulary);
  int64_t number = 0;
  for (size_t begin = 0; begin < merges.size();) {
    const size_t end = std::min(merges.find('\n', begin), merges.size());
    std::string_view line = merges.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty() || line.starts_with("#version")) continue;
    const size_t blank = line.find(' ');
    if (blank == std::string_view::npos || line.find(' ', blank + 1) != std::string_view::npos)
      throw CorruptData("{}: line {} is '{}', expected two tokens", merges_path, number, name_excerpt(line));
    parts.merges.emplace_back(line.substr(0, blank), line.substr(blank + 1));
  }
  return parts;
}

std::vector<AddedToken> parse_added_tokens_decoder(const ConfigFile& config) {
  std::vector<AddedToken> tokens;
  const auto table = config.object("added_tokens_decoder");
  if (!table) return tokens;
  for (const std::string& field : table->fields()) {
    int32_t id = -1;
    const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), id);
    if (error != std::errc() || end != field.data() + field.size() || id < 0 || !table->is_object(field))
      table->wrong(field, "a token id and an object");
    tokens.push_back(parse_added_token(*table->object(field), id));
  }
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return tokens;
}

}  // namespace lacuna

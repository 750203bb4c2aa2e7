#include <array>

#include "base/error.h"
#include "base/mapped_file.h"
#include "formats/json.h"
#include "text/bpe_tokenizer.h"
#include "text/sentencepiece_tokenizer.h"
#include "text/tokenizer.h"

namespace lacuna {

namespace fs = std::filesystem;

namespace {

// Largest tokenizer file taken; vocabularies of 256,000 tokens need about 35 MB.
constexpr size_t kMaxFile = 256 << 20;

bool present(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

std::optional<ConfigFile> optional_config(const fs::path& path) {
  return present(path) ? std::optional(ConfigFile::load(path)) : std::nullopt;
}

// What the slow tokenizers' code does around vocab.json and merges.txt, as tokenizer.json says it
// (transformers convert_slow_tokenizer.py, GPT2Converter and Qwen2Converter).
constexpr std::string_view kGpt2Pipeline = R"({
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
  "decoder": {"type": "ByteLevel"}})";
constexpr std::string_view kQwen2Pipeline = R"({
  "normalizer": {"type": "NFC"},
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "behavior": "Isolated", "pattern": {"Regex":
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},
    {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
  "decoder": {"type": "ByteLevel"}})";

std::unique_ptr<Tokenizer> load_json(const fs::path& path, const fs::path& dir) {
  const ConfigFile file = ConfigFile::load(path, kMaxFile);
  auto tokenizer = std::make_unique<BpeTokenizer>(file, parse_bpe_parts(file));
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"})
    if (const auto config = optional_config(dir / name)) tokenizer->configure(*config);
  return tokenizer;
}

std::unique_ptr<Tokenizer> load_gpt2_layout(const fs::path& vocab, const fs::path& merges, const fs::path& dir) {
  BpeParts parts = parse_gpt2_parts(read_text_file(vocab, kMaxFile), vocab.string(), read_text_file(merges, kMaxFile),
                                    merges.string());
  const auto config = optional_config(dir / "tokenizer_config.json");
  const std::string kind = config ? config->text("tokenizer_class", "GPT2Tokenizer") : "GPT2Tokenizer";
  const bool qwen = kind.starts_with("Qwen2Tokenizer"), gpt2 = kind.starts_with("GPT2Tokenizer");
  if (!qwen && !gpt2)
    config->unsupported("tokenizer_class", "Qwen2Tokenizer and GPT2Tokenizer where there is no tokenizer.json");
  if (config) parts.added = parse_added_tokens_decoder(*config);
  if (const auto table = optional_config(dir / "added_tokens.json"); table && parts.added.empty())
    for (const std::string& content : table->fields()) {
      AddedToken token;
      token.content = content;
      token.id = static_cast<int32_t>(table->integer(content, 0, std::numeric_limits<int32_t>::max()));
      token.special = true;  // the file does not say; all that models add this way are
      parts.added.push_back(std::move(token));
    }
  // GPT-2's one special token is part of its vocabulary and of the code, not of a file.
  constexpr std::string_view kEndOfText = "<|endoftext|>";
  const bool implied_end = parts.added.empty() && parts.vocabulary.id(kEndOfText);
  if (implied_end) {
    AddedToken end;
    end.content = kEndOfText;
    end.id = *parts.vocabulary.id(kEndOfText);
    end.special = true;
    parts.added.push_back(std::move(end));
  }
  auto tokenizer = std::make_unique<BpeTokenizer>(
      ConfigFile::parse(qwen ? kQwen2Pipeline : kGpt2Pipeline, vocab.string()), std::move(parts));
  if (config) tokenizer->configure(*config);
  if (const auto map = optional_config(dir / "special_tokens_map.json")) tokenizer->configure(*map);
  if (implied_end && !tokenizer->eos_id()) tokenizer->set_end_of_text(kEndOfText);
  return tokenizer;
}

std::unique_ptr<Tokenizer> load_sentencepiece(const fs::path& path, const fs::path& dir) {
  return make_sentencepiece_tokenizer(read_text_file(path, kMaxFile), path.string(),
                                      optional_config(dir / "tokenizer_config.json"));
}

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& dir) {
  std::error_code ignored;
  if (!present(dir)) throw IoError("{}: no such file or folder", dir.string());
  if (!fs::is_directory(dir, ignored))
    return dir.extension() == ".model" ? load_sentencepiece(dir, dir.parent_path()) : load_json(dir, dir.parent_path());
  if (present(dir / "tokenizer.json")) return load_json(dir / "tokenizer.json", dir);
  if (present(dir / "tokenizer.model")) return load_sentencepiece(dir / "tokenizer.model", dir);
  constexpr std::array<std::pair<const char*, const char*>, 2> kLayouts{
      {{"vocab.json", "merges.txt"}, {"encoder.json", "vocab.bpe"}}};
  for (const auto& [vocab, merges] : kLayouts)
    if (present(dir / vocab) && present(dir / merges)) return load_gpt2_layout(dir / vocab, dir / merges, dir);
  throw BadInput("{}: has no tokenizer, expected tokenizer.json, tokenizer.model, vocab.json with merges.txt, or "
                 "encoder.json with vocab.bpe",
                 dir.string());
}

}  // namespace lacuna

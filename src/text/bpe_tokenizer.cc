#include "text/bpe_tokenizer.h"

#include <algorithm>

#include "base/error.h"
#include "formats/json.h"

namespace lacuna {
namespace {

constexpr size_t kMaxCachedWord = 64;      // bytes; longer words seldom repeat
constexpr size_t kMaxCachedWords = 1 << 16;  // about 8 MB

Bpe make_bpe(BpeParts& parts, bool byte_level, const std::string& where) {
  // The vocabulary's own id counts where an added token is already in it, as in the reference.
  for (AddedToken& token : parts.added) {
    if (const auto known = parts.vocabulary.id(token.content))
      token.id = *known;
    else
      parts.vocabulary.add(token.content, token.id, where);
  }
  parts.options.byte_level = byte_level;
  return Bpe(parts.vocabulary, parts.merges, parts.options, where);
}

}  // namespace

BpeTokenizer::BpeTokenizer(const ConfigFile& pipeline, BpeParts parts)
    : parts_(std::move(parts)),
      normalizer_(pipeline),
      pre_tokenizer_(pipeline),
      decoder_(pipeline),
      bpe_(make_bpe(parts_, pre_tokenizer_.byte_level(), pipeline.file())) {
  parts_.merges = {};  // the model has its own table of them
  vocab_size_ = parts_.vocabulary.size();
  unk_ = parts_.options.unk;
  for (const AddedToken& token : parts_.added) {
    if (token.special) special_.insert(token.id);
    if (!token.normalized) {
      raw_.add(token, token.content, pipeline.file());
    } else {
      std::string content = token.content;
      normalizer_.apply(content);
      normalized_.add(token, content, pipeline.file());
    }
  }
  byte_starts_.reserve(static_cast<size_t>(vocab_size_) + 1);
  for (int32_t id = 0; id <= vocab_size_; ++id) {
    byte_starts_.push_back(static_cast<uint32_t>(bytes_.size()));
    if (id == vocab_size_) break;
    bytes_ += decoder_.bytes(piece(id));
    if (bytes_.size() > std::numeric_limits<uint32_t>::max())
      throw CorruptData("{}: the vocabulary's texts have more than 4 GiB", pipeline.file());
  }
  if (const auto step = pipeline.object("post_processor")) add_post_processor(*step);
}

int32_t BpeTokenizer::checked_id(const ConfigFile& where, std::string_view field, int64_t id) const {
  if (id < 0 || id >= vocab_size_) where.wrong(field, fmt::format("ids below the vocabulary's {}", vocab_size_));
  return static_cast<int32_t>(id);
}

void BpeTokenizer::add_post_processor(const ConfigFile& step) {
  const std::string type = step.text("type");
  if (type == "ByteLevel") return;  // changes offsets only
  if (type == "Sequence") {
    for (const ConfigFile& inner : step.objects("processors")) add_post_processor(inner);
    return;
  }
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    for (const auto& [field, ids] : {std::pair("cls", &prefix_), std::pair("sep", &suffix_)}) {
      const Json* pair = step.raw(field);
      if (!pair || !pair->is_array() || pair->size() != 2 || !(*pair)[1].is_number_unsigned())
        step.wrong(field, "a token and its id");
      ids->push_back(checked_id(step, field, (*pair)[1].get<int64_t>()));
    }
    return;
  }
  if (type != "TemplateProcessing")
    step.unsupported("type", "the post-processors TemplateProcessing, ByteLevel, BertProcessing, RobertaProcessing "
                             "and Sequence");
  const auto tokens = step.object("special_tokens");
  bool behind_text = false;
  for (const ConfigFile& item : step.objects("single")) {
    if (item.has("Sequence")) {
      if (behind_text) step.unsupported("single", "one Sequence");
      behind_text = true;
      continue;
    }
    const auto special = item.object("SpecialToken");
    if (!special) step.wrong("single", "a list of SpecialToken and Sequence");
    const auto token = tokens ? tokens->object(special->text("id")) : std::nullopt;
    if (!token) step.wrong("special_tokens", fmt::format("an entry for '{}'", special->text("id")));
    for (int64_t id : token->integers("ids", 0, std::numeric_limits<int32_t>::max()))
      (behind_text ? suffix_ : prefix_).push_back(checked_id(*token, "ids", id));
  }
}

void BpeTokenizer::configure(const ConfigFile& config) {
  const auto named = [&](std::string_view field, std::optional<int32_t>& id) {
    // A text, or an object like those of added_tokens.
    if (!config.has(field) || id) return;
    const std::string content =
        config.is_object(field) ? config.object(field)->text("content") : config.text(field);
    id = this->id(content);
    if (id) special_.insert(*id);
  };
  named("bos_token", bos_);
  named("eos_token", eos_);
  named("pad_token", pad_);
  named("unk_token", unk_);
  if (prefix_.empty() && bos_ && config.boolean("add_bos_token", false)) prefix_.push_back(*bos_);
  if (suffix_.empty() && eos_ && config.boolean("add_eos_token", false)) suffix_.push_back(*eos_);
}

void BpeTokenizer::set_end_of_text(std::string_view piece) {
  const auto id = this->id(piece);
  if (!id) return;
  eos_ = bos_ = id;
  special_.insert(*id);
}

void BpeTokenizer::append_bytes(int32_t id, bool at_start, std::string& bytes) const {
  if (id < 0 || id >= vocab_size_) return;
  const size_t begin = byte_starts_[static_cast<size_t>(id)], end = byte_starts_[static_cast<size_t>(id) + 1];
  std::string_view text = std::string_view(bytes_).substr(begin, end - begin);
  if (at_start)
    text.remove_prefix(std::min({decoder_.leading_blanks_lost(), text.find_first_not_of(' '), text.size()}));
  else if (decoder_.joined_by_blanks())
    bytes += ' ';
  bytes += text;
}

void BpeTokenizer::encode_text(std::string_view text, std::vector<int32_t>& ids) const {
  // A second thread that encodes at the same time works with a cache of its own.
  const std::unique_lock lock(cache_mutex_, std::try_to_lock);
  WordCache own;
  WordCache& cache = lock.owns_lock() ? cache_ : own;
  Bpe::Scratch scratch;
  for (const auto& part : raw_.split(text)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
      continue;
    }
    std::string segment(text.substr(part.begin, part.end - part.begin));
    normalizer_.apply(segment);
    for (const auto& inner : normalized_.split(segment)) {
      if (inner.id >= 0)
        ids.push_back(inner.id);
      else
        encode_segment(std::string_view(segment).substr(inner.begin, inner.end - inner.begin),
                       part.begin == 0 && inner.begin == 0, cache, scratch, ids);
    }
  }
}

void BpeTokenizer::encode_segment(std::string_view text, bool at_start, WordCache& cache, Bpe::Scratch& scratch,
                                  std::vector<int32_t>& ids) const {
  Pieces pieces{std::string(text), {}, at_start};
  pre_tokenizer_.apply(pieces);
  for (const auto& range : pieces.ranges) {
    const std::string_view word = std::string_view(pieces.text).substr(range.begin, range.end - range.begin);
    if (word.size() > kMaxCachedWord) {
      bpe_.encode(word, ids, scratch);
      continue;
    }
    if (const auto known = cache.words.find(word); known != cache.words.end()) {
      const auto [begin, count] = known->second;
      ids.insert(ids.end(), cache.ids.begin() + begin, cache.ids.begin() + begin + count);
      continue;
    }
    const size_t before = ids.size();
    bpe_.encode(word, ids, scratch);
    if (cache.words.size() >= kMaxCachedWords) {
      cache.words.clear();
      cache.ids.clear();
    }
    cache.words.emplace(word, std::pair(static_cast<uint32_t>(cache.ids.size()), static_cast<uint32_t>(ids.size() - before)));
    cache.ids.insert(cache.ids.end(), ids.begin() + static_cast<ptrdiff_t>(before), ids.end());
  }
}

}  // namespace lacuna

#include "text/tokenizer.h"

#include "base/error.h"
#include "text/utf8.h"

namespace lacuna {

namespace {

// Positions inside a text are kept in 32 bits.
constexpr size_t kMaxText = size_t{1} << 30;

}  // namespace

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  if (text.size() > kMaxText) throw BadInput("a text of {} bytes, expected at most {}", text.size(), kMaxText);
  std::vector<int32_t> ids;
  if (add_special) ids = prefix_;
  if (utf8_valid(text))
    encode_text(text, ids);
  else
    encode_text(utf8_lossy(text), ids);
  if (add_special) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  StreamDecoder decoder(*this, skip_special);
  for (int32_t id : ids) text += decoder.push(id);
  return text += decoder.finish();
}

std::string StreamDecoder::push(int32_t id) {
  std::string text;
  if (id < 0 || id >= tokenizer_->vocab_size()) return text;
  if (skip_special_ && tokenizer_->is_special(id)) return text;
  tokenizer_->append_bytes(id, at_start_, held_);
  at_start_ = false;
  utf8_drain(held_, text);
  return text;
}

std::string StreamDecoder::finish() {
  std::string text = utf8_lossy(held_);
  held_.clear();
  return text;
}

}  // namespace lacuna

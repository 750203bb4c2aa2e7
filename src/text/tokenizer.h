// text: tokenizers and the streaming detokeniser.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// Turns text into token ids and back. Immutable and safe to share between threads.
//
// Text is UTF-8. Bytes that are not are read as U+FFFD, one for each maximal invalid part (as
// Python's errors="replace" does). Texts of special and added tokens inside the input become their
// ids, as in Hugging Face tokenizers.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // add_special: with what the tokenizer's files put around a text (a begin-of-text id, mostly).
  std::vector<int32_t> encode(std::string_view text, bool add_special) const;
  // Always valid UTF-8. skip_special leaves out special tokens (</s>, <|im_end|>, …).
  // Ids outside the vocabulary contribute nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special = true) const;

  // Largest id + 1; the model's vocabulary may be padded to more.
  int64_t vocab_size() const { return vocab_size_; }
  // The token as its vocabulary spells it ("Ġthe", "▁the", "<0x0A>"); empty for an unused id.
  virtual std::string_view piece(int32_t id) const = 0;
  virtual std::optional<int32_t> id(std::string_view piece) const = 0;
  virtual bool is_special(int32_t id) const = 0;

  // As the tokenizer's files name them; generation_config.json may know more end ids.
  std::optional<int32_t> bos_id() const { return bos_; }
  std::optional<int32_t> eos_id() const { return eos_; }
  std::optional<int32_t> pad_id() const { return pad_; }
  std::optional<int32_t> unk_id() const { return unk_; }

  // Appends what `id` contributes to a text, as bytes that may end inside a UTF-8 character.
  // `at_start`: nothing precedes it (some tokenizers drop a leading space there).
  virtual void append_bytes(int32_t id, bool at_start, std::string& bytes) const = 0;

 protected:
  // `text` is valid UTF-8.
  virtual void encode_text(std::string_view text, std::vector<int32_t>& ids) const = 0;

  int64_t vocab_size_ = 0;
  std::optional<int32_t> bos_, eos_, pad_, unk_;
  std::vector<int32_t> prefix_, suffix_;  // what add_special puts around a text
};

// Text from ids one at a time. Bytes of a character that is not complete yet are held back, so
// every returned piece is valid UTF-8; all pieces together equal Tokenizer::decode of all ids.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true)
      : tokenizer_(&tokenizer), skip_special_(skip_special) {}

  // The text that this id completes; may be empty.
  std::string push(int32_t id);
  // What is still held back, as U+FFFD. Nothing may be pushed afterwards.
  std::string finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  bool at_start_ = true;
  std::string held_;
};

// The tokenizer of a model directory: tokenizer.json, else tokenizer.model (SentencePiece), else
// vocab.json + merges.txt or encoder.json + vocab.bpe; with tokenizer_config.json and
// added_tokens.json where there are any. A path to a tokenizer.json or .model file stands for that
// file. Faults in the files are CorruptData, kinds of tokenizers not known here Unsupported.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& dir);

}  // namespace lacuna

#include "text/sentencepiece_tokenizer.h"

#include <exception>
#include <unordered_set>

#include <sentencepiece_processor.h>

#include "base/error.h"
#include "formats/json.h"
#include "text/added_tokens.h"
#include "text/bpe_parts.h"
#include "text/piece_decoder.h"
#include "text/replace.h"
#include "text/sentencepiece_check.h"
#include "text/vocabulary.h"

namespace lacuna {
namespace {

constexpr std::string_view kBlank = "\xE2\x96\x81";  // ▁, the library's mark for a blank

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view bytes, const std::string& where, const std::optional<ConfigFile>& config)
      : where_(where) {
    check_sentencepiece_model(bytes, where);
    try {
      const auto status = processor_.LoadFromSerializedProto(std::string_view(bytes));
      if (!status.ok()) throw CorruptData("{}: is not a SentencePiece model: {}", where, status.ToString());
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      throw CorruptData("{}: is not a SentencePiece model: {}", where, error.what());
    }
    const int pieces = processor_.GetPieceSize();
    for (int id = 0; id < pieces; ++id) {
      const std::string& piece = processor_.IdToPiece(id);
      if (piece.empty()) throw CorruptData("{}: piece {} is empty", where, id);
      vocabulary_.add(piece, id, where);
      const bool control = processor_.IsControl(id);
      if (control || processor_.IsUnknown(id)) special_.insert(id);
      if (control) added_.add({id, piece, false, false, false, false, true}, piece, where);
      surfaces_.push_back(surface(id, piece));
    }
    for (const AddedToken& token : config ? parse_added_tokens_decoder(*config) : std::vector<AddedToken>()) {
      if (token.special) special_.insert(token.id);
      if (token.id < pieces) continue;  // the model's own pieces, found above or by the library
      vocabulary_.add(token.content, token.id, where);
      added_.add(token, token.content, where);
      surfaces_.resize(static_cast<size_t>(vocabulary_.size()));
      surfaces_[static_cast<size_t>(token.id)] = token.content;
    }
    vocab_size_ = vocabulary_.size();
    const auto known = [](int id) { return id >= 0 ? std::optional<int32_t>(id) : std::nullopt; };
    bos_ = known(processor_.bos_id());
    eos_ = known(processor_.eos_id());
    pad_ = known(processor_.pad_id());
    unk_ = known(processor_.unk_id());
    if (bos_ && (!config || config->boolean("add_bos_token", true))) prefix_.push_back(*bos_);
    if (eos_ && config && config->boolean("add_eos_token", false)) suffix_.push_back(*eos_);
    // The library puts a blank before a text if the model asks for it, and takes it off again.
    std::vector<int> ids;
    drops_first_blank_ = processor_.Encode(std::string_view("a"), &ids).ok() && !ids.empty() &&
                         piece(ids[0]).starts_with(kBlank);
  }

  std::string_view piece(int32_t id) const override { return vocabulary_.piece(id); }
  std::optional<int32_t> id(std::string_view piece) const override { return vocabulary_.id(piece); }
  bool is_special(int32_t id) const override { return special_.contains(id); }

  void append_bytes(int32_t id, bool at_start, std::string& bytes) const override {
    if (id < 0 || static_cast<size_t>(id) >= surfaces_.size()) return;
    std::string_view text = surfaces_[static_cast<size_t>(id)];
    if (at_start && drops_first_blank_ && text.starts_with(' ')) text.remove_prefix(1);
    bytes += text;
  }

 protected:
  void encode_text(std::string_view text, std::vector<int32_t>& ids) const override {
    for (const auto& part : added_.split(text)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      std::vector<int> piece_ids;
      const auto status = processor_.Encode(text.substr(part.begin, part.end - part.begin), &piece_ids);
      if (!status.ok()) throw CorruptData("{}: the model cannot encode a text: {}", where_, status.ToString());
      ids.insert(ids.end(), piece_ids.begin(), piece_ids.end());
    }
  }

 private:
  // What a piece contributes to a text.
  std::string surface(int id, const std::string& piece) const {
    if (processor_.IsByte(id)) {
      const int byte = byte_of_fallback_piece(piece);
      if (byte < 0) throw CorruptData("{}: byte piece {} is '{}', expected <0x00> to <0xFF>", where_, id,
                                      name_excerpt(piece));
      return std::string(1, static_cast<char>(byte));
    }
    if (processor_.IsUnknown(id)) return " \xE2\x81\x87 ";  // ⁇, the library's default surface
    std::string text = piece;
    replace_all(text, kBlank, " ", text.size());
    return text;
  }

  std::string where_;
  sentencepiece::SentencePieceProcessor processor_;
  Vocabulary vocabulary_;
  AddedTokens added_;
  std::unordered_set<int32_t> special_;
  std::vector<std::string> surfaces_;  // by id
  bool drops_first_blank_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(std::string_view bytes, const std::string& where,
                                                        const std::optional<ConfigFile>& config) {
  return std::make_unique<SentencePieceTokenizer>(bytes, where, config);
}

}  // namespace lacuna

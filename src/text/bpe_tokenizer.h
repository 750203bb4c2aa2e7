#pragma once

#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "formats/config_file.h"
#include "text/added_tokens.h"
#include "text/bpe_parts.h"
#include "text/normalizer.h"
#include "text/piece_decoder.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer.h"

namespace lacuna {

// Hugging Face's pipeline around a BPE model: added tokens, normaliser, pre-tokeniser, model, and
// what the post-processor puts around it.
class BpeTokenizer : public Tokenizer {
 public:
  // `pipeline`: an object with a tokenizer.json's normalizer, pre_tokenizer, post_processor, decoder.
  BpeTokenizer(const ConfigFile& pipeline, BpeParts parts);

  // tokenizer_config.json or special_tokens_map.json: names of special tokens, add_bos_token.
  void configure(const ConfigFile& config);
  // The special token's name and role, for layouts that do not say.
  void set_end_of_text(std::string_view piece);

  std::string_view piece(int32_t id) const override { return parts_.vocabulary.piece(id); }
  std::optional<int32_t> id(std::string_view piece) const override { return parts_.vocabulary.id(piece); }
  bool is_special(int32_t id) const override { return special_.contains(id); }
  void append_bytes(int32_t id, bool at_start, std::string& bytes) const override;

 protected:
  void encode_text(std::string_view text, std::vector<int32_t>& ids) const override;

 private:
  // Ids of words seen before; text repeats its words.
  struct WordCache {
    struct Hash {
      using is_transparent = void;
      size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
    };
    std::unordered_map<std::string, std::pair<uint32_t, uint32_t>, Hash, std::equal_to<>> words;  // begin, count
    std::vector<int32_t> ids;
  };
  void encode_segment(std::string_view text, bool at_start, WordCache& cache, Bpe::Scratch& scratch,
                      std::vector<int32_t>& ids) const;
  void add_post_processor(const ConfigFile& step);
  int32_t checked_id(const ConfigFile& where, std::string_view field, int64_t id) const;

  BpeParts parts_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  PieceDecoder decoder_;
  Bpe bpe_;
  AddedTokens raw_, normalized_;  // looked for before and after normalising
  std::unordered_set<int32_t> special_;
  std::string bytes_;                  // what each token contributes to a text, one after another
  std::vector<uint32_t> byte_starts_;  // [vocab_size + 1]
  mutable std::mutex cache_mutex_;
  mutable WordCache cache_;
};

}  // namespace lacuna

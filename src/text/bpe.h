#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/vocabulary.h"

namespace lacuna {

// Byte-pair encoding (Sennrich et al., arXiv 1508.07909) as Hugging Face tokenizers runs it
// (models/bpe/{model,word}.rs): the leftmost pair of lowest rank is merged until none is left.
class Bpe {
 public:
  struct Options {
    bool byte_level = false;     // words are raw bytes; vocabulary texts are in the byte-level alphabet
    bool byte_fallback = false;  // characters not in the vocabulary become <0xXX> tokens
    bool ignore_merges = false;  // a word that is in the vocabulary is that token
    bool fuse_unk = false;       // unknown characters in a row become one unknown token
    std::optional<int32_t> unk;  // else unknown characters are left out
  };

  // `vocabulary` must outlive this. Merges in order of rank; CorruptData when one is of texts, or
  // makes a text, that the vocabulary does not have.
  Bpe(const Vocabulary& vocabulary, const std::vector<std::pair<std::string, std::string>>& merges,
      const Options& options, const std::string& where);

  // Buffers reused between words.
  struct Scratch {
    struct Symbol {
      int32_t id;  // < 0: merged into an earlier one
      int32_t previous, next;
    };
    struct Candidate {
      uint32_t rank;
      int32_t left;  // index of the left symbol
      int32_t merged;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };
  // Appends the ids of one word. Time n log n for n symbols.
  void encode(std::string_view word, std::vector<int32_t>& ids, Scratch& scratch) const;

 private:
  struct Merge {
    uint64_t pair = kEmpty;  // left id << 32 | right id
    uint32_t rank = 0;
    int32_t merged = 0;
  };
  static constexpr uint64_t kEmpty = ~uint64_t{0};

  const Merge* find(int32_t left, int32_t right) const;
  void split(std::string_view word, std::vector<Scratch::Symbol>& symbols) const;

  const Vocabulary& vocabulary_;
  Options options_;
  std::vector<Merge> merges_;  // open addressing, at most half full
  int shift_ = 64;
  std::array<int32_t, 256> byte_ids_;      // the token of one byte (byte_level) or of <0xXX>; -1 = none
  std::unordered_map<std::string, int32_t> words_;  // byte_level with ignore_merges: raw bytes to id
};

}  // namespace lacuna

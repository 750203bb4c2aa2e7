#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/config_file.h"
#include "text/added_tokens.h"
#include "text/bpe.h"

namespace lacuna {

// What the files of a BPE tokenizer hold, wherever it stood.
struct BpeParts {
  Vocabulary vocabulary;
  std::vector<std::pair<std::string, std::string>> merges;  // in order of rank
  Bpe::Options options;                                     // byte_level comes from the pre-tokenizer
  std::vector<AddedToken> added;
};

// The "model" and "added_tokens" of a tokenizer.json. Models other than BPE are Unsupported.
BpeParts parse_bpe_parts(const ConfigFile& tokenizer);

// vocab.json (or encoder.json) and merges.txt (or vocab.bpe) of the GPT-2 layout, as text; the paths
// start messages.
BpeParts parse_gpt2_parts(std::string_view vocab, const std::string& vocab_path, std::string_view merges,
                          const std::string& merges_path);

// tokenizer_config.json's added_tokens_decoder: {"151643": {"content": …, "special": …}, …}.
std::vector<AddedToken> parse_added_tokens_decoder(const ConfigFile& config);

}  // namespace lacuna

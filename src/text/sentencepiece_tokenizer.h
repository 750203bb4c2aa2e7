#pragma once

#include <memory>
#include <string_view>

#include "formats/config_file.h"
#include "text/tokenizer.h"

namespace lacuna {

// A SentencePiece model (tokenizer.model; BPE, unigram, char or word), run by the SentencePiece
// library. `bytes` is the file; CorruptData when the library refuses it. `config`, where there is
// one, is tokenizer_config.json: added tokens, add_bos_token (on unless it says otherwise).
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(std::string_view bytes, const std::string& where,
                                                        const std::optional<ConfigFile>& config);

}  // namespace lacuna

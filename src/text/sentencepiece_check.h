#pragma once

#include <string>
#include <string_view>

namespace lacuna {

// Checks the part of a SentencePiece model that the library reads without checking: the table of
// character replacements inside its normaliser specifications, whose offsets would otherwise lead
// anywhere in memory. Throws CorruptData; `where` starts messages. Everything else is left to the
// library's own checks.
void check_sentencepiece_model(std::string_view model, const std::string& where);

}  // namespace lacuna

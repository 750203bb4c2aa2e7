#pragma once

#include <cstdlib>

#include "text/tokenizer.h"
#include "text/utf8.h"

namespace lacuna {

// A tokenizer that loads must also encode, and decode what it encoded to valid text.
inline void use(const Tokenizer& tokenizer) {
  for (const char* text : {"Hello  wörld's 12345 \xF0\x9F\xA6\x99\r\n\n x<|im_end|></s>a", "\xC3(\xFF  ", "e\xCC\x81 ab aab"}) {
    const auto ids = tokenizer.encode(text, true);
    if (!utf8_valid(tokenizer.decode(ids, false))) std::abort();
  }
  tokenizer.decode(std::vector<int32_t>{-1, 0, 1, static_cast<int32_t>(tokenizer.vocab_size())});
}

}  // namespace lacuna

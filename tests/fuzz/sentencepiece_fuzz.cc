#include "fuzz/fuzz.h"
#include "fuzz/use_tokenizer.h"
#include "text/sentencepiece_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return lacuna::fuzz(data, size, [](std::string_view text) {
    use(*lacuna::make_sentencepiece_tokenizer(text, "fuzz", std::nullopt));
  });
}

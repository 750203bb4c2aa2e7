#include "fuzz/fuzz.h"
#include "fuzz/use_tokenizer.h"
#include "text/bpe_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return lacuna::fuzz(data, size, [](std::string_view text) {
    const auto file = lacuna::ConfigFile::parse(text, "fuzz");
    lacuna::BpeTokenizer tokenizer(file, lacuna::parse_bpe_parts(file));
    tokenizer.configure(file);
    use(tokenizer);
  });
}

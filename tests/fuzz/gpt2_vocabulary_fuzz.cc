// Input: vocab.json, a NUL byte, merges.txt.
#include "fuzz/fuzz.h"
#include "fuzz/use_tokenizer.h"
#include "text/bpe_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return lacuna::fuzz(data, size, [](std::string_view text) {
    const size_t cut = std::min(text.find('\0'), text.size());
    auto parts = lacuna::parse_gpt2_parts(text.substr(0, cut), "vocab.json", text.substr(std::min(cut + 1, text.size())),
                                          "merges.txt");
    use(lacuna::BpeTokenizer(
        lacuna::ConfigFile::parse(R"({"pre_tokenizer": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"}})", "fuzz"),
        std::move(parts)));
  });
}

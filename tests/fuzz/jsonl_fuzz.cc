#include "eval/jsonl.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return lacuna::fuzz(data, size, [](std::string_view text) { lacuna::parse_jsonl(text, "fuzz"); });
}

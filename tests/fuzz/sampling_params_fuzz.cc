#include "formats/sampling_params.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return lacuna::fuzz(data, size,
                      [](std::string_view text) { lacuna::validate(lacuna::parse_sampling_params(text, "fuzz")); });
}

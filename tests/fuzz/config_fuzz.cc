#include <cmath>

#include "formats/config.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lacuna::fuzz(data, size, [](std::string_view text) {
    lacuna::parse_generation_config(lacuna::ConfigFile::parse(text, "fuzz"));
  });
  return lacuna::fuzz(data, size, [](std::string_view text) {
    const auto config = lacuna::parse_model_config(lacuna::ConfigFile::parse(text, "fuzz"));
    const auto rope = lacuna::rope_frequencies(config.rope, config.head_dim, config.max_positions, 100'000);
    // What passes the checks must give angles that can be used.
    for (float f : rope.inv_freq)
      if (!std::isfinite(f)) std::abort();
  });
}

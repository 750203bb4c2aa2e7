#include "formats/safetensors_file.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return lacuna::fuzz(data, size, [](std::string_view text) {
    const lacuna::SafetensorsFile file(std::as_bytes(std::span(text)), "fuzz");
    for (const auto& [name, unused] : file.entries()) check_finite(file.get(name), name, "fuzz");
  });
}

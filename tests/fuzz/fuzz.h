#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace lacuna {

// Runs a parser on fuzzed bytes. Typed errors are its answer to bad input; an internal error, or
// anything else that escapes, is a bug.
template <typename Parser>
int fuzz(const uint8_t* data, size_t size, const Parser& parse) {
  try {
    parse(std::string_view(reinterpret_cast<const char*>(data), size));
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::kInternal) std::abort();
  }
  return 0;
}

}  // namespace lacuna

#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "base/error.h"

namespace lacuna {
namespace {

constexpr Isa kLevels[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// The level in use, or -1 before the first question.
std::atomic<int> level{-1};
std::optional<bool> fast_pairs;  // what a test says instead of the processor

#if defined(__x86_64__)
// Clang's builtin does not know this feature's name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool is_amd() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}
#endif

Isa from_environment() {
  const Isa best = detected_isa();
  const char* wish = std::getenv("LACUNA_ISA");
  if (!wish || !*wish) return best;
  for (Isa isa : kLevels) {
    if (isa_name(isa) != wish) continue;
    if (isa > best)
      throw BadInput("LACUNA_ISA asks for {}, but this machine goes no further than {}", wish, isa_name(best));
    return isa;
  }
  throw BadInput("LACUNA_ISA is \"{}\"; expected scalar, avx2, avx512 or avx512_bf16", wish);
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
  }
  return "?";
}

Isa detected_isa() {
#if defined(__x86_64__)
  // These builtins ask the operating system's register state (XCR0) as well as the processor.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
    return Isa::kScalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512vnni"))
    return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kScalar;
#endif
}

bool has_fast_bf16_pairs() {
  if (fast_pairs) return *fast_pairs;
#if defined(__x86_64__)
  static const bool has = is_amd();
  return has;
#else
  return false;
#endif
}

bool has_full_width_units() {
#if defined(__x86_64__)
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!is_amd() || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 15) == 15 && (a >> 20 & 255) >= 11;  // base family 15 and the extended one on top: 26
  }();
  return has;
#else
  return false;
#endif
}

Isa cpu_isa() {
  int now = level.load(std::memory_order_relaxed);
  if (now < 0) {
    now = static_cast<int>(from_environment());
    level.store(now, std::memory_order_relaxed);
  }
  return static_cast<Isa>(now);
}

ScopedIsa::ScopedIsa(Isa isa, std::optional<bool> fast_bf16_pairs) : before_(level.load()), pairs_before_(fast_pairs) {
  LACUNA_CHECK(isa <= detected_isa());
  level.store(static_cast<int>(isa));
  if (fast_bf16_pairs) fast_pairs = fast_bf16_pairs;
}

ScopedIsa::~ScopedIsa() {
  level.store(before_);
  fast_pairs = pairs_before_;
}

}  // namespace lacuna

// Which per-ISA bodies (files *_avx2.cc, *_avx512.cc) this process may call.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace lacuna {

// Ascending: each level has everything the ones before it have.
//   kScalar      plain C++ for the compiler's baseline target (SSE2 on x86-64, NEON on ARM64)
//   kAvx2        AVX2, FMA, F16C
//   kAvx512      AVX-512 F, BW, DQ, VL and VNNI: the compiler may use any of them by itself in a file
//                built for this level, so a machine that lacks one counts as kAvx2
//   kAvx512Bf16  and the bf16 pair dot products
enum class Isa : uint8_t { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

// "scalar", "avx2", "avx512", "avx512_bf16": the words that LACUNA_ISA takes.
std::string_view isa_name(Isa isa);

// What the processor and the operating system offer.
Isa detected_isa();

// The level to use: detected_isa(), or a lower one that the environment variable LACUNA_ISA names
// (read once). Throws BadInput if the variable names no level or one this machine lacks.
Isa cpu_isa();

// Whether 512-bit operations run in units as wide, so that widening weights in registers hides behind the memory:
// AMD family 1Ah (Zen 5) on. Its bit for it (8000001Ah, FP512) is not shown to every virtual machine. Others were
// not measured.
bool has_full_width_units();

// Whether products of bf16 pairs are faster than plain f32 ones: on AMD. Intel's Emerald Rapids gives 88 against 185
// GFLOP/s a core, so that where arithmetic decides, products there widen their operands instead.
bool has_fast_bf16_pairs();

// Holds cpu_isa() at a level while it lives, so that one test process runs every body, and pairs at fast or slow if that
// is said. Not to be used while other threads run kernels; the level must not exceed detected_isa().
class ScopedIsa {
 public:
  explicit ScopedIsa(Isa isa, std::optional<bool> fast_bf16_pairs = {});
  ~ScopedIsa();
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;

 private:
  int before_;
  std::optional<bool> pairs_before_;
};

}  // namespace lacuna

// Bodies for any machine: vectors in the compiler's own notation, which it maps to SSE2, NEON or plain scalars.
#include "kernels/cpu/spike_bodies.h"

// Vectors wider than the target's are split; none crosses a function that other files see.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace lacuna::cpu {
namespace {

struct Portable {
  static constexpr bool kBiased = true;
  typedef int32_t Sums __attribute__((vector_size(64)));
  static Sums zero() { return Sums{}; }
  static void store(int32_t* p, const Sums& v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Sums dot(const Sums& sum, const uint8_t* codes, int32_t four) {
    int8_t s[4];
    __builtin_memcpy(s, &four, 4);
    int32_t part[16];
    for (int j = 0; j < 16; ++j)
      part[j] = codes[4 * j] * s[0] + codes[4 * j + 1] * s[1] + codes[4 * j + 2] * s[2] + codes[4 * j + 3] * s[3];
    Sums add;
    __builtin_memcpy(&add, part, sizeof(add));
    return sum + add;
  }

  typedef int16_t Shorts __attribute__((vector_size(16)));
  static constexpr int kShorts = 8;
  static Shorts no_shorts() { return Shorts{}; }
  static void store_shorts(int16_t* p, Shorts v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Shorts add(Shorts a, Shorts b) { return a + b; }
  static Shorts subtract(Shorts a, Shorts b) { return a - b; }
  static Shorts widen(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(8)));
    Bytes v;
    __builtin_memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Shorts);
  }
};

#include "kernels/cpu/spike_body.h"

constexpr SpikeBodies kBodies = spike_table<Portable>();

}  // namespace

const SpikeBodies& spike_portable() { return kBodies; }

}  // namespace lacuna::cpu

// AVX-512 bodies with the quad dot product of VNNI. Compiled for that target only: see linear_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/spike_bodies.h"

namespace lacuna::cpu {
namespace {

struct Avx512 {
  // The instruction multiplies unsigned by signed bytes: codes are the unsigned ones.
  static constexpr bool kBiased = true;
  using Sums = __m512i;
  static Sums zero() { return _mm512_setzero_si512(); }
  static void store(int32_t* p, Sums v) { _mm512_storeu_si512(p, v); }
  static Sums dot(Sums sum, const uint8_t* codes, int32_t four) {
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(codes), _mm512_set1_epi32(four));
  }

  using Shorts = __m512i;
  static constexpr int kShorts = 32;
  static Shorts no_shorts() { return _mm512_setzero_si512(); }
  static void store_shorts(int16_t* p, Shorts v) { _mm512_storeu_si512(p, v); }
  static Shorts add(Shorts a, Shorts b) { return _mm512_add_epi16(a, b); }
  static Shorts subtract(Shorts a, Shorts b) { return _mm512_sub_epi16(a, b); }
  static Shorts widen(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

#include "kernels/cpu/spike_body.h"

constexpr SpikeBodies kBodies = spike_table<Avx512>();

}  // namespace

const SpikeBodies& spike_avx512() { return kBodies; }

}  // namespace lacuna::cpu

#endif

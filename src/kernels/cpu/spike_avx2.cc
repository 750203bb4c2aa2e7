// AVX2 bodies. Compiled for that target only: see linear_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/spike_bodies.h"

// Vectors wider than the target's are split; none crosses a function that other files see.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace lacuna::cpu {
namespace {

struct Avx2 {
  static constexpr bool kBiased = false;
  struct Sums {
    __m256i low, high;
  };
  static Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static void store(int32_t* p, Sums v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.high);
  }
  // Pairs of |s| (u8) times sign(s) * code: both within 127, so that two products stay below 2^15.
  static __m256i dot8(__m256i sum, const uint8_t* codes, __m256i s, __m256i magnitude) {
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i code = _mm256_xor_si256(stored, _mm256_set1_epi8(static_cast<char>(0x80)));
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(code, s));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Sums dot(Sums sum, const uint8_t* codes, int32_t four) {
    const __m256i s = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(s);
    return {dot8(sum.low, codes, s, magnitude), dot8(sum.high, codes + 32, s, magnitude)};
  }

  using Shorts = __m256i;
  static constexpr int kShorts = 16;
  static Shorts no_shorts() { return _mm256_setzero_si256(); }
  static void store_shorts(int16_t* p, Shorts v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Shorts add(Shorts a, Shorts b) { return _mm256_add_epi16(a, b); }
  static Shorts subtract(Shorts a, Shorts b) { return _mm256_sub_epi16(a, b); }
  static Shorts widen(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

#include "kernels/cpu/spike_body.h"

constexpr SpikeBodies kBodies = spike_table<Avx2>();

}  // namespace

const SpikeBodies& spike_avx2() { return kBodies; }

}  // namespace lacuna::cpu

#endif

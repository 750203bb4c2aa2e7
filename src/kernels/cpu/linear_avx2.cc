// AVX2 bodies. Compiled for that target only: see linear_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;

  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static V fma(V sum, V a, V b) { return _mm256_fmadd_ps(a, b, sum); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  // A tree of pairwise merges; each halves the vectors and doubles the sums that one of them holds.
  static V sums(const V (&v)[8]) {
    V t[4], u[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) t[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) u[i] = _mm256_hadd_ps(t[2 * i], t[2 * i + 1]);
    return add(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31));
  }

  static V round_bf16(V v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i bits = _mm256_and_si256(near, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm256_blendv_ps(_mm256_castsi256_ps(bits), v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }

  static V widen(const float* p) { return _mm256_loadu_ps(p); }
  static V widen(const BF16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
  static V widen(const F16* p) { return _mm256_cvtph_ps(load128(p)); }
  static V widen(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  static void transpose(V (&v)[8]) {
    V t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {  // 4 x 4 within each 128-bit lane
      const int b = 4 * i;
      v[b + 0] = _mm256_shuffle_ps(t[b], t[b + 2], 0x44);
      v[b + 1] = _mm256_shuffle_ps(t[b], t[b + 2], 0xee);
      v[b + 2] = _mm256_shuffle_ps(t[b + 1], t[b + 3], 0x44);
      v[b + 3] = _mm256_shuffle_ps(t[b + 1], t[b + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {  // the lanes
      t[c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x20);
      t[4 + c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x31);
    }
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }

 private:
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

#include "kernels/cpu/linear_body.h"

constexpr LinearBodies kBodies = Table<Avx2, false>::bodies();

}  // namespace

const LinearBodies& linear_avx2() { return kBodies; }

}  // namespace lacuna::cpu

#endif

// AVX-512 bodies, with and without the bf16 pair dot product. Compiled for that target only: no
// standard templates here, so that nothing built with these flags can be merged into other files.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;

  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static V fma(V sum, V a, V b) { return _mm512_fmadd_ps(a, b, sum); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  // Subnormals count as zero in the products and sums of this instruction.
  static V pairs(V sum, V a, V b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // A tree of pairwise merges; each halves the vectors and doubles the sums that one of them holds.
  static V sums(const V (&v)[16]) {
    V t[8], u[4], w[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      t[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) u[i] = add(pair_shuffle<0x00>(t[2 * i], t[2 * i + 1]), pair_shuffle<0xff>(t[2 * i], t[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      w[i] = add(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
    return add(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
  }

  static V round_bf16(V v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i bits = _mm512_and_si512(near, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(bits), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
  }

  static V widen(const float* p) { return _mm512_loadu_ps(p); }
  static V widen(const BF16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
  }
  static V widen(const F16* p) { return _mm512_cvtph_ps(load256(p)); }
  static V widen(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  static V narrow(const BF16* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static V narrow(const int8_t* p) {
    return reinterpret_cast<V>(_mm512_cvtne2ps_pbh(widen(p + 16), widen(p)));
  }
  static V narrow2(const float* p) { return reinterpret_cast<V>(_mm512_cvtne2ps_pbh(load(p + 16), load(p))); }

  // Four rounds of pairwise exchange: rows r and r + distance swap the halves of their distance-wide pieces.
  static void transpose(V (&v)[16]) {
    V t[16];
    for (int i = 0; i < 8; ++i) {  // rows 2i, 2i + 1
      t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {  // 4 x 4 within each 128-bit lane
      const int b = 4 * i;
      v[b + 0] = pair_shuffle<0x00>(t[b], t[b + 2]);
      v[b + 1] = pair_shuffle<0xff>(t[b], t[b + 2]);
      v[b + 2] = pair_shuffle<0x00>(t[b + 1], t[b + 3]);
      v[b + 3] = pair_shuffle<0xff>(t[b + 1], t[b + 3]);
    }
    for (int c = 0; c < 4; ++c) {  // the lanes: a 4 x 4 transpose of 128-bit pieces
      const V a = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
      const V b = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
      const V d = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
      const V e = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
      t[c] = _mm512_shuffle_f32x4(a, d, 0x88);
      t[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
      t[8 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
      t[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
  }

 private:
  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  // Of every 128 bits the lower (0x00) or upper (0xff) 64 of a, then of b.
  template <int kControl>
  static V pair_shuffle(V a, V b) {
    return _mm512_castpd_ps(_mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), kControl));
  }
};

#include "kernels/cpu/linear_body.h"

template <bool kPairs>
constexpr LinearBodies with_others() {
  LinearBodies b = Table<Avx512, kPairs>::bodies();
  b.digits = linear_digits_avx512;
  b.panels = kPairs ? linear_panels_avx512 : nullptr;
  return b;
}
constexpr LinearBodies kBodies = with_others<false>(), kBf16Bodies = with_others<true>();

}  // namespace

const LinearBodies& linear_avx512() { return kBodies; }
const LinearBodies& linear_avx512_bf16() { return kBf16Bodies; }

}  // namespace lacuna::cpu

#endif

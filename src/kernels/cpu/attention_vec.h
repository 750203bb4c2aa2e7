// One f32 vector of the widest kind that the including file is compiled for, and the handful of
// operations that attention and the elementwise ops need. Everything has internal linkage: a file
// built for AVX-512 must not leave a body behind that the linker could give to another file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lacuna::cpu {
namespace {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
// Lanes of columns [at, at + 16) that lie in [begin, end).
inline __mmask16 visible(int at, int begin, int end) {
  const int lo = begin - at, hi = end - at;
  const uint32_t above = lo <= 0 ? 0xffffu : lo >= 16 ? 0u : 0xffffu << lo;
  const uint32_t below = hi <= 0 ? 0u : hi >= 16 ? 0xffffu : (1u << hi) - 1u;
  return static_cast<__mmask16>(above & below);
}
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_part(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_part(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// If either is NaN the result is b.
inline Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec vabs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
// a with its exponent raised by the integer in the low bits of t.
inline Vec add_exponent(Vec a, Vec t) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}
inline Vec load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline Vec load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Round half to even; NaN keeps its sign and becomes quiet.
inline void store_bf16(uint16_t* p, Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_srli_epi32(u, 16),
                           _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
// Round half to even, values within [-127, 127].
inline void store_i8(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
// dst[c][r] = src[r][c] of a kLanes x kLanes block.
inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * ld_src);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  // a[4q + c] now holds column c of each of the four 128-bit quarters, for rows 4q … 4q + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512 x = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88), y = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88),
                 w = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    _mm512_storeu_ps(dst + c * ld_dst, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_storeu_ps(dst + (c + 4) * ld_dst, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_storeu_ps(dst + (c + 8) * ld_dst, _mm512_shuffle_f32x4(x, z, 0xdd));
    _mm512_storeu_ps(dst + (c + 12) * ld_dst, _mm512_shuffle_f32x4(y, w, 0xdd));
  }
}
// Lane i: a[i]'s lanes, put together by `op` in a fixed tree, for i below 4 * kFours; other lanes repeat.
template <int kFours, class Op>
inline Vec fold(const Vec* a, Op op) {
  __m512 u[4];
#pragma GCC unroll 16
  for (int q = 0; q < 4; ++q) {
    if (q >= kFours) {
      u[q] = u[q - kFours];
      continue;
    }
    const Vec* v = a + 4 * q;
    const __m512 s = op(_mm512_unpacklo_ps(v[0].v, v[1].v), _mm512_unpackhi_ps(v[0].v, v[1].v));
    const __m512 t = op(_mm512_unpacklo_ps(v[2].v, v[3].v), _mm512_unpackhi_ps(v[2].v, v[3].v));
    const __m512d x = _mm512_castps_pd(s), y = _mm512_castps_pd(t);
    u[q] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 s = op(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const __m512 t =
      kFours < 4 ? s : op(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return {op(_mm512_shuffle_f32x4(s, t, 0x88), _mm512_shuffle_f32x4(s, t, 0xdd))};
}
template <int kFours = 4>
inline Vec sums_of(const Vec* a) {
  return fold<kFours>(a, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}
template <int kFours = 4>
inline Vec maxima_of(const Vec* a) {
  return fold<kFours>(a, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); });
}
// out[i] = sum of the lanes of a[i].
inline constexpr int kQuads = 4;
inline void sum_quads(const Vec a[kQuads * 4], float* out) { store(out, sums_of(a)); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_part(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_part(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec vabs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline Vec add_exponent(Vec a, Vec t) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(t.v), 23)))};
}
inline Vec load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
inline Vec load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store_bf16(uint16_t* p, Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
  const __m128i lo = _mm256_castsi256_si128(r), hi = _mm256_extracti128_si256(r, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(lo, hi));
}
inline void store_i8(int8_t* p, Vec a) {
  const __m256i c = _mm256_cvtps_epi32(a.v);
  const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(w, w));
}
inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(src + i * ld_src);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(b[i + j]), y = _mm256_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(dst + c * ld_dst, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
    _mm256_storeu_ps(dst + (c + 4) * ld_dst, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
  }
}
inline constexpr int kQuads = 2;
inline void sum_quads(const Vec a[kQuads * 4], float* out) {
  for (int q = 0; q < 2; ++q) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a[4 * q].v, a[4 * q + 1].v), _mm256_hadd_ps(a[4 * q + 2].v, a[4 * q + 3].v));
    _mm_storeu_ps(out + 4 * q, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
}

#else

// Four lanes by the compiler's own vectors: SSE2 or NEON where the baseline has them.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;
};
inline Vec zero() { return {Float4{0, 0, 0, 0}}; }
inline Vec set1(float x) { return {Float4{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
inline Vec load_part(const float* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
inline void store_part(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec select(Int4 mask, Vec a, Vec b) {
  Int4 x, y;
  std::memcpy(&x, &a.v, 16);
  std::memcpy(&y, &b.v, 16);
  x = (x & mask) | (y & ~mask);
  Vec r;
  std::memcpy(&r.v, &x, 16);
  return r;
}
inline Vec vmax(Vec a, Vec b) { return select(a.v > b.v, a, b); }
inline Vec vmin(Vec a, Vec b) { return select(a.v < b.v, a, b); }
inline Vec vabs(Vec a) { return vmax(a, {-a.v}); }
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < 4; ++i) m = m > a.v[i] ? m : a.v[i];
  return m;
}
inline Vec add_exponent(Vec a, Vec t) {
  Word4 x, y;
  std::memcpy(&x, &a.v, 16);
  std::memcpy(&y, &t.v, 16);
  x += y << 23;
  Vec r;
  std::memcpy(&r.v, &x, 16);
  return r;
}
inline Vec load_bf16(const uint16_t* p) {
  const Word4 w = {uint32_t{p[0]} << 16, uint32_t{p[1]} << 16, uint32_t{p[2]} << 16, uint32_t{p[3]} << 16};
  Vec r;
  std::memcpy(&r.v, &w, 16);
  return r;
}
inline Vec load_i8(const int8_t* p) {
  return {Float4{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])}};
}
inline void store_bf16(uint16_t* p, Vec a) {
  uint32_t u[4];
  std::memcpy(u, &a.v, 16);
  for (int i = 0; i < 4; ++i) {
    const bool nan = (u[i] & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>(nan ? (u[i] >> 16) | 0x40u : (u[i] + 0x7fffu + ((u[i] >> 16) & 1u)) >> 16);
  }
}
inline void store_i8(int8_t* p, Vec a) {
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits: half to even, as the hardware adds.
  for (int i = 0; i < 4; ++i) {
    const float t = a.v[i] + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &t, 4);
    p[i] = static_cast<int8_t>(bits - 0x4b400000);
  }
}
inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
}
inline constexpr int kQuads = 2;
inline void sum_quads(const Vec a[kQuads * 4], float* out) {
  for (int q = 0; q < 2; ++q)
    for (int i = 0; i < 4; ++i) out[4 * q + i] = sum(a[4 * q + i]);
}

#endif

// 2^x for x in about [-126, 127]; below, 2^-126, which the sums that use it cannot tell from 0; NaN
// stays NaN. x = n + f with |f| <= 1/2 by adding 1.5 * 2^23, whose sum has no fraction bits and keeps
// n in the low bits of its mantissa; 2^f by the polynomial of least maximal relative error.
template <int kDegree>
inline Vec exp2(Vec x) {
  const Vec magic = set1(12582912.0f);
  x = vmax(set1(-126.0f), x);
  const Vec t = x + magic;
  const Vec f = x - (t - magic);
  Vec p;
  if constexpr (kDegree == 5) {  // 7.5e-8
    p = fma(set1(1.327647217e-03f), f, set1(9.675541331e-03f));
    p = fma(p, f, set1(5.550713273e-02f));
    p = fma(p, f, set1(2.402211972e-01f));
    p = fma(p, f, set1(6.931469671e-01f));
    p = fma(p, f, set1(1.0f));
  } else {  // 7.5e-5: for values that are rounded to bf16 (2^-9) next
    p = fma(set1(5.517166909e-02f), f, set1(2.426111222e-01f));
    p = fma(p, f, set1(6.932609855e-01f));
    p = fma(p, f, set1(9.999280735e-01f));
  }
  return add_exponent(p, t);
}

}  // namespace
}  // namespace lacuna::cpu

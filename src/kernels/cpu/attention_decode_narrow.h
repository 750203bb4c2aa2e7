// What the parts of the decode over narrow caches share: attention_decode_avx512.cc (queries, scores),
// attention_decode_values_avx512.cc (softmax, values) and attention_decode_heads_avx512.cc (query heads in lanes).
// Internal linkage, as attention_vec.h says why.
#pragma once

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_vec.h"

namespace lacuna::cpu {

// NarrowOps' softmax, values and restore.
void narrow_softmax(DType dtype, const SoftmaxStep& step, const SlotRun* runs, int n);
void narrow_values(DType dtype, const SlotRun* runs, int n, int d, const void* p, const float* digit_scale, int rows,
                   float* out, int64_t ld_out);
void narrow_restore(DType dtype, float* sums, int64_t ld, int rows, int d);
// The same over int8 where p has a quad of slots after the other: [quad][8 rows][hi, lo][4], for seven or eight rows.
void quad_values(DType dtype, const SlotRun* runs, int n, int d, const void* p, const float* digit_scale, int rows,
                 float* out, int64_t ld_out);

namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int kMaxRows = 16;
constexpr int kMaxDim = 256;

inline __m512i words(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i word(const void* p) {
  int32_t w;
  __builtin_memcpy(&w, p, 4);
  return _mm512_set1_epi32(w);
}
inline int least(int a, int b) { return a < b ? a : b; }

// sum += products of pairs, of quads (u unsigned), with a vector or with one word. Around the intrinsics GCC 12
// copies every sum of a loop into another register and back at each step.
[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512i a, const int32_t* b) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
}
[[gnu::always_inline]] inline void add_quads(__m512i& sum, __m512i u, __m512i s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
}
[[gnu::always_inline]] inline void add_quads(__m512i& sum, __m512i u, const int32_t* s) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*s));
}

// A row of a query in two digits: put(c, hi, lo) for every sixteen elements. Returns the scale.
template <class F>
inline float digits_of(const float* q, int d, F put) {
  Vec most = zero();
  __mmask16 nan = 0;
  for (int c = 0; c < d; c += kLanes) {
    const Vec x = load(q + c);
    most = vmax(vabs(x), most);
    nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q));
  }
  const float amax = largest(most);
  // Elements below 2^-100 of anything that matters are zero; NaN and infinity reach the scores.
  const float inverse = amax > 1e-30f ? 32512.0f / amax : 0.0f;
  for (int c = 0; c < d; c += kLanes) {
    const __m512i t = _mm512_cvtps_epi32((load(q + c) * set1(inverse)).v);
    const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(t, _mm512_set1_epi32(128)), 8);
    put(c, hi, _mm512_sub_epi32(t, _mm512_slli_epi32(hi, 8)));
  }
  return nan ? __builtin_nanf("") : amax > 1e-30f ? amax / 32512.0f : 0.0f;
}

// The scales of all slots of `runs`, then zeros up to `to` and beyond, to a whole vector.
inline void copy_scales(const SlotRun* runs, int n, int to, float* out) {
  const float* end = out + to;
  for (const SlotRun* run = runs; run < runs + n; out += run++->count)
    for (int i = 0; i < run->count; i += kLanes)
      store(out + i, load_part(run->scales + i, least(run->count - i, kLanes)));
  for (; out < end; out += kLanes) store(out, zero());
}

// 2^x: what is above the next lower integer by a polynomial, the rest by vscalefps, which takes any x. Neither is done
// by the pipes of the products. kDegree 3 for bf16, 7.5e-5; 4 for digits of 7.6e-6, 2.6e-6. Coefficients by Remez'
// method.
template <int kDegree>
[[gnu::always_inline]] inline Vec power(Vec x) {
  const Vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p;
  if constexpr (kDegree == 4) {
    p = fma(set1(1.353416778e-02f), f, set1(5.201146007e-02f));
    p = fma(p, f, set1(2.414427549e-01f));
    p = fma(p, f, set1(6.930038333e-01f));
    p = fma(p, f, set1(1.000002623e+00f));
  } else {
    p = fma(set1(7.802452147e-02f), f, set1(2.260671556e-01f));
    p = fma(p, f, set1(6.958335638e-01f));
    p = fma(p, f, set1(9.999251962e-01f));
  }
  return {_mm512_scalef_ps(p.v, x.v)};
}

// A running maximum that is too small by so much is left alone: probabilities up to 2^8 lose nothing in
// floating point. Nearly every step then finds nothing to change, and since that is predicted, the
// exponentials don't wait for the comparison, nor is anything folded.
constexpr float kSlack = 8;

// The part of the cache that is read next is asked for a line at a time between products.
[[gnu::always_inline]] inline void prefetch(const char* line) { __builtin_prefetch(line); }
// `next`, known only once `line` is there. Requests that run ahead of what arrives pile up, and beyond 128 a core
// drops them: so one goes out for each that comes in.
[[gnu::always_inline]] inline const char* once_here(const char* next, const void* line) {
  int64_t zero;
  asm("movl %1, %k0\n\tandl $0, %k0" : "=r"(zero) : "m"(*static_cast<const int32_t*>(line)) : "cc");
  return next + zero;
}

template <template <int> class F, int kQ, class... Args>
inline void group_of(int rows, int first, Args&... args) {
  if (rows == kQ) return F<kQ>::run(first, args...);
  if constexpr (kQ > 1) group_of<F, kQ - 1>(rows, first, args...);
}
// Runs F<kQ>(first row) over rows, kMost at a time and what is left in one.
template <int kMost, template <int> class F, class... Args>
inline void each_group(int rows, Args&&... args) {
  int i = 0;
  for (; i + kMost <= rows; i += kMost) F<kMost>::run(i, args...);
  group_of<F, kMost - 1>(rows - i, i, args...);
}

}  // namespace
}  // namespace lacuna::cpu

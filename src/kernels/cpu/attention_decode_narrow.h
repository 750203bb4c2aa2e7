// What both halves of the decode over narrow caches share: attention_decode_avx512.cc (queries, scores) and
// attention_decode_values_avx512.cc (softmax, values). Internal linkage, as attention_vec.h says why.
#pragma once

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_vec.h"

namespace lacuna::cpu {

// NarrowOps' softmax, values and restore.
void narrow_softmax(DType dtype, const SoftmaxStep& step, const SlotRun* runs, int n);
void narrow_values(DType dtype, const SlotRun* runs, int n, int d, const void* p, const float* digit_scale, int rows,
                   float* out, int64_t ld_out);
void narrow_restore(DType dtype, float* sums, int64_t ld, int rows, int d);

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

// AVX-512 limits. Compiled for that target only: see linear_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/machine_bodies.h"

namespace lacuna::cpu {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kSums = 24;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V sum, V a, V b) { return _mm512_fmadd_ps(sum, a, b); }
  static float sum(V v) { return _mm512_reduce_add_ps(v); }
};

struct PairStep {
  static __m512 step(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

struct QuadStep {
  static __m512 step(__m512 sum, __m512 a, __m512 b) {
    return _mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(sum), _mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

#include "kernels/cpu/machine_body.h"

constexpr PeakLoop kF32 = peak_loop<Avx512, FmaStep<Avx512>>(1);
constexpr PeakLoop kInt8 = peak_loop<Avx512, QuadStep>(4);
constexpr MachineBodies kBodies = {read_all<Avx512>, kF32, {}, kInt8};
constexpr MachineBodies kBf16Bodies = {read_all<Avx512>, kF32, peak_loop<Avx512, PairStep>(2), kInt8};

}  // namespace

const MachineBodies& machine_avx512() { return kBodies; }
const MachineBodies& machine_avx512_bf16() { return kBf16Bodies; }

}  // namespace lacuna::cpu

#endif

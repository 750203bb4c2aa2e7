// AVX2 limits. Compiled for that target only: see linear_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/machine_bodies.h"

namespace lacuna::cpu {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kSums = 12;
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V sum, V a, V b) { return _mm256_fmadd_ps(sum, a, b); }
  static float sum(V v) {
    float lanes[kLanes];
    _mm256_storeu_ps(lanes, v);
    float s = 0;
    for (float lane : lanes) s += lane;
    return s;
  }
};

#include "kernels/cpu/machine_body.h"

constexpr MachineBodies kBodies = {read_all<Avx2>, peak_loop<Avx2, FmaStep<Avx2>>(1), {}, {}};

}  // namespace

const MachineBodies& machine_avx2() { return kBodies; }

}  // namespace lacuna::cpu

#endif

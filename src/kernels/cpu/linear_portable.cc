// Bodies for any machine: four-float vectors in the compiler's own notation, which it maps to SSE2,
// NEON or plain scalars.
#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

struct Portable {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;

  static V zero() { return V{}; }
  static V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static V broadcast(const float* p) { return V{*p, *p, *p, *p}; }
  static V fma(V sum, V a, V b) { return sum + a * b; }
  static V add(V a, V b) { return a + b; }
  static V sums(const V (&v)[4]) {
    V s;
    for (int i = 0; i < kLanes; ++i) s[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    return s;
  }

  static V round_bf16(V v) {
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(to_bf16(v[i]));
    return v;
  }

  static V widen(const float* p) { return load(p); }
  template <class W>
  static V widen(const W* p) { return V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static V widen(const int8_t* p) {
    return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
  }

  static void transpose(V (&v)[4]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float a = v[i][j];
        v[i][j] = v[j][i];
        v[j][i] = a;
      }
    }
  }
};

#include "kernels/cpu/linear_body.h"

constexpr LinearBodies kBodies = Table<Portable, false>::bodies();

}  // namespace

const LinearBodies& linear_portable() { return kBodies; }

}  // namespace lacuna::cpu

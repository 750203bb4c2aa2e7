// Limits of the compiler's baseline target.
#include "kernels/cpu/machine_bodies.h"

namespace lacuna::cpu {
namespace {

struct Portable {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kSums = 12;
  static V zero() { return V{}; }
  static V load(const float* p) { return V{p[0], p[1], p[2], p[3]}; }
  static V broadcast(const float* p) { return V{*p, *p, *p, *p}; }
  static V add(V a, V b) { return a + b; }
  static V fma(V sum, V a, V b) { return sum * a + b; }
  static float sum(V v) { return v[0] + v[1] + v[2] + v[3]; }
};

#include "kernels/cpu/machine_body.h"

constexpr MachineBodies kBodies = {read_all<Portable>, peak_loop<Portable, FmaStep<Portable>>(1), {}, {}};

}  // namespace

const MachineBodies& machine_portable() { return kBodies; }

}  // namespace lacuna::cpu

// Gated linear attention for the compiler's baseline target, and the choice among all levels.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/gla_ops.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/gla_body.h"
}  // namespace

const GlaOps& gla_ops_portable() { return kOps; }

const GlaOps& gla_ops(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return gla_ops_avx512();
  if (isa == Isa::kAvx2) return gla_ops_avx2();
#endif
  return gla_ops_portable();
}

}  // namespace lacuna::cpu

// Elementwise bodies for the compiler's baseline target, and the choice among all levels.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/elementwise_ops.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/elementwise_body.h"
}  // namespace

const ElementwiseOps& elementwise_ops_portable() { return kOps; }

const ElementwiseOps& elementwise_ops(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return elementwise_ops_avx512();
  if (isa == Isa::kAvx2) return elementwise_ops_avx2();
#endif
  return elementwise_ops_portable();
}

}  // namespace lacuna::cpu

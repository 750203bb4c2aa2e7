// Elementwise bodies for AVX-512.
#if defined(__x86_64__)

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/elementwise_ops.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/elementwise_body.h"
}  // namespace

const ElementwiseOps& elementwise_ops_avx512() { return kOps; }

}  // namespace lacuna::cpu

#endif

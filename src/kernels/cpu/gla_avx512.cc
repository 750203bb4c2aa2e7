// Gated linear attention for AVX-512.
#if defined(__x86_64__)

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/gla_ops.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/gla_body.h"
}  // namespace

const GlaOps& gla_ops_avx512() { return kOps; }

}  // namespace lacuna::cpu

#endif

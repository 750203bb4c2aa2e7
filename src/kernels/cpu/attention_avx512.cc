// Attention bodies for AVX-512.
#if defined(__x86_64__)

#include <cstring>

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_vec.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/attention_body.h"
}  // namespace

const AttentionOps& attention_ops_avx512() { return kF32Ops; }
const AttentionOps& attention_ops_avx512_bf16() { return kF32Ops; }

}  // namespace lacuna::cpu

#endif

// Attention bodies for the compiler's baseline target, and the choice among all levels.
#include <cstring>

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_vec.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/attention_body.h"
}  // namespace

const AttentionOps& attention_ops_portable() { return kF32Ops; }

const AttentionOps& attention_ops(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512Bf16: return attention_ops_avx512_bf16();
    case Isa::kAvx512: return attention_ops_avx512();
    case Isa::kAvx2: return attention_ops_avx2();
    case Isa::kScalar: break;
  }
#endif
  return attention_ops_portable();
}

}  // namespace lacuna::cpu

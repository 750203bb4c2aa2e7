// One row of prepare_heads().
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"

namespace lacuna::cpu {

inline constexpr int kPreparedDim = 64;  // of a head that the body takes

// Heads of kPreparedDim values over a bf16 cache.
struct PreparedRow {
  int heads = 0;
  float* q = nullptr;  // [heads, d]; null: not wanted
  const float *k = nullptr, *v = nullptr;
  const float *q_weight, *q_bias, *k_weight, *k_bias;  // [d]
  float q_eps, k_eps;
  const float *cosine, *sine;  // [half]
  int half = 0;                // a multiple of 8
  std::byte* const* slots = nullptr;  // [heads, 2]: of the key, of the value
};

using PrepareRow = void (*)(const PreparedRow& row);
PrepareRow prepare_row_avx512();
// Null: none for this machine.
inline PrepareRow prepare_row(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return prepare_row_avx512();
#endif
  return nullptr;
}

}  // namespace lacuna::cpu

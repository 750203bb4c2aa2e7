// A few rows of prepare_heads().
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"

namespace lacuna::cpu {

inline constexpr int kPreparedDim = 64;  // of a head that the body takes

// Rows at a time, whose folds overlap.
inline constexpr int kPreparedRows = 8, kPreparedHeads = 32;

// Heads of kPreparedDim values over a bf16 cache.
struct PreparedRows {
  struct Row {
    float* q;  // [heads, d]; null: not wanted, in any row
    const float *k, *v;
    const float *cosine, *sine;                              // [half]
    std::byte *key[kPreparedHeads], *value[kPreparedHeads];  // their slots
  };
  int count = 0, heads = 0;
  const float *q_weight, *q_bias, *k_weight, *k_bias;  // [d]
  float q_eps, k_eps;
  int half = 0;  // a multiple of 8
  Row rows[kPreparedRows];
};

using PrepareRows = void (*)(const PreparedRows& rows);
PrepareRows prepare_rows_avx512();
// Null: none for this machine.
inline PrepareRows prepare_rows(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return prepare_rows_avx512();
#endif
  return nullptr;
}

}  // namespace lacuna::cpu

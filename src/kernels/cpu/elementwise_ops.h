// The vector bodies of the elementwise ops, a row at a time, one table for each ISA level.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"

namespace lacuna::cpu {

// Layer norms of up to sixteen rows, whose sums are folded together: one after the other they would wait for each fold.
// n = (x - mean) / sqrt(variance + eps) * weight + bias (each null: 1, 0); y = n, or n * (1 + scale) + shift where
// shift is not null: d values of each row, scale behind it; added to y if `add`. May be in place. If `gated`, a row is
// first added branch * gate, in place.
inline constexpr int kNormRows = 16;
struct NormRows {
  int count = 0;
  int64_t d = 0;
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
  bool add = false, gated = false;
  const float* x[kNormRows];
  const float *branch[kNormRows], *gate[kNormRows];
  const float* shift[kNormRows];
  float* y[kNormRows];
};

struct ElementwiseOps {
  // y = x * rsqrt(mean(x^2) + eps) * weight; may be in place.
  void (*rms_norm)(const float* x, int64_t d, const float* weight, float eps, float* y);
  // out = gate / (1 + e^-gate) * up; may be in place.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*relu)(float* x, int64_t n);
  // out = log(1 / (1 + e^-x)) * factor; may be in place.
  void (*log_sigmoid)(const float* x, int64_t n, float factor, float* out);
  // Rotates the pairs (i, i + half) of one head.
  void (*rope)(float* x, int64_t half, const float* cosine, const float* sine);
  // x / (1 + e^-x), and GELU by tanh, in place.
  void (*silu)(float* x, int64_t n);
  void (*gelu_tanh)(float* x, int64_t n);
  // Rotates the pairs (2i, 2i + 1) of one head.
  void (*rope_pairs)(float* x, int64_t half, const float* cosine, const float* sine);
  void (*layer_norm)(const NormRows& rows);
  // y += a * b.
  void (*add_product)(const float* a, const float* b, int64_t n, float* y);
};

const ElementwiseOps& elementwise_ops_portable();
#if defined(__x86_64__)
const ElementwiseOps& elementwise_ops_avx2();
const ElementwiseOps& elementwise_ops_avx512();
#endif
const ElementwiseOps& elementwise_ops(Isa isa);

}  // namespace lacuna::cpu

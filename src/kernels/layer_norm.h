#pragma once

#include "kernels/context.h"
#include "kernels/linear.h"

namespace lacuna {

// (x - mean) / sqrt(variance + eps) * weight + bias over the last d values, variance the mean square around the mean.
struct LayerNorm {
  const float* weight = nullptr;  // [d], or null: 1
  const float* bias = nullptr;    // [d], or null: 0
  float eps = 0;
};

// y[m, groups, d] (=|+=) the norm of each group of d values of x, f32 throughout; rows of groups * d values are
// `stride` floats apart (0 = dense) in both. x and y may be the same.
void layer_norm(Context& ctx, const LayerNorm& norm, const float* x, int64_t m, int64_t d, float* y,
                LinearMode mode = LinearMode::kStore, int64_t groups = 1, int64_t stride = 0);

// Vectors of d values that rows choose from by index: row i takes table + of_row[i] * stride. Indices are the caller's
// to check.
struct RowTable {
  const float* values = nullptr;
  int64_t stride = 0;
  const int32_t* of_row = nullptr;  // [m]
  const float* row(int64_t i) const { return values + of_row[i] * stride; }
};

// Adaptive layer norm: y[m, d] = norm(x) * (1 + scale) + shift with a row's shift and, behind it, scale:
// 2 * d values of `shift_scale`. Dense rows; x and y may be the same.
void adaptive_norm(Context& ctx, const LayerNorm& norm, const float* x, int64_t m, int64_t d, const RowTable& shift_scale,
                   float* y);

// x[m, d] += branch[m, d] * gate, as add_gated() does, then y = adaptive_norm() of x, in one pass. y is not x.
void gated_norm(Context& ctx, const float* branch, const RowTable& gate, const LayerNorm& norm, float* x, int64_t m,
                int64_t d, const RowTable& shift_scale, float* y);

// y[m, d] += x[m, d] * gate, a gate of d values for each row. Dense rows.
void add_gated(Context& ctx, const float* x, int64_t m, int64_t d, const RowTable& gate, float* y);

}  // namespace lacuna

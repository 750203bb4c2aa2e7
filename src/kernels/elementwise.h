#pragma once

#include "kernels/context.h"

namespace lacuna {

// y[m, d] = x * rsqrt(mean(x^2) + eps) * weight[d], f32 throughout; rows `stride` floats apart
// (0 = dense) in both. x and y may be the same. Used with d = head_dim for q/k norms too.
void rms_norm(Context& ctx, const float* x, int64_t m, int64_t d, const float* weight, float eps, float* y,
              int64_t stride = 0);

// out[m, f] = silu(gate[m, f]) * up[m, f]; rows of gate and up `stride` floats apart (0 = dense), so
// that both may be halves of one product. out dense; may alias gate when dense.
void silu_mul(Context& ctx, const float* gate, const float* up, int64_t m, int64_t f, float* out, int64_t stride = 0);

// x[i] = max(x[i], 0), in place; NaN stays NaN.
void relu(Context& ctx, float* x, int64_t n);

// out[i] = log(sigmoid(x[i])) * factor, in place allowed: never above 0 for factor > 0, to about 2e-7 of its
// value on either side (log1p, not log), NaN for NaN.
void log_sigmoid(Context& ctx, const float* x, int64_t n, float factor, float* out);

// x[i] = x[i] / (1 + e^-x[i]), in place.
void silu(Context& ctx, float* x, int64_t n);

// x[i] = x[i] / 2 * (1 + tanh(sqrt(2 / pi) * (x[i] + 0.044715 x[i]^3))), in place.
void gelu_tanh(Context& ctx, float* x, int64_t n);

// Rotary embedding, half-split (NeoX) pairs (i, i + d/2), in place on x [m, heads, d] (rows `stride`
// floats apart, 0 = dense). cos_table/sin_table are [m, d/2], already scaled by any attention factor.
void rope(Context& ctx, float* x, int64_t m, int64_t heads, int64_t d, const float* cos_table, const float* sin_table,
          int64_t stride = 0);

// Rotary embedding of neighbouring pairs (2i, 2i + 1) of the first `rotated` elements of each head, in place on
// x [m, heads, d]; the others stay. cos_table/sin_table are [m, rotated/2].
void rope_pairs(Context& ctx, float* x, int64_t m, int64_t heads, int64_t d, int64_t rotated, const float* cos_table,
                const float* sin_table, int64_t stride = 0);

}  // namespace lacuna

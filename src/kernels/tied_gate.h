#pragma once

#include "kernels/context.h"

namespace lacuna {

// x = 1 / (1 + e^-x), in place, n values.
void sigmoid(Context& ctx, float* x, int64_t n);

// Keys of a linear attention whose forget gate is tied to the key (SpikingBrain report, 3.1: g_t = 1 - k_t):
// k = sigmoid(z), log_decay = ln(1 - k) = -softplus(z), n values. The logarithm is taken of z, not of k, which
// rounds to 1 from z = 17 on. k may be z.
void tied_gate(Context& ctx, const float* z, int64_t n, float* k, float* log_decay);

// y += factor * x, n values.
void add_scaled(Context& ctx, const float* x, float factor, int64_t n, float* y);

}  // namespace lacuna

// The CPU bodies of kernels/tied_gate.h. Operands are checked by now.
#pragma once

#include "kernels/tied_gate.h"

namespace lacuna::cpu {

void sigmoid(Context& ctx, float* x, int64_t n);
void tied_gate(Context& ctx, const float* z, int64_t n, float* k, float* log_decay);
void add_scaled(Context& ctx, const float* x, float factor, int64_t n, float* y);

}  // namespace lacuna::cpu

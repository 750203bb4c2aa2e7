// The CPU bodies of kernels/router.h. Operands are checked by now.
#pragma once

#include "kernels/router.h"

namespace lacuna::cpu {

void route(Context& ctx, const RouterShape& shape, const float* weight, const float* x, int64_t m, int32_t* expert,
           float* p);
void gather_rows(Context& ctx, const float* x, int64_t d, const int32_t* token, int64_t count, float* out);
void scatter_rows(Context& ctx, const float* y, int64_t d, const int32_t* token, const float* p, int64_t count,
                  float* out);

}  // namespace lacuna::cpu

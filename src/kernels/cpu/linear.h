// The CPU bodies of kernels/linear.h. Operands are checked and strides are explicit by now.
#pragma once

#include "kernels/linear.h"

namespace lacuna::cpu {

void linear(Context& ctx, const LinearWeight& w, const float* x, int64_t m, float* y, LinearMode mode,
            int64_t x_stride, int64_t y_stride);
size_t panel_bytes(ActivationType activations, const Tensor& weight);
void pack_panels(Context& ctx, const Tensor& weight, void* panels);
void quantize_rows(Context& ctx, const Tensor& weight, int8_t* codes, float* scales);
void embed_rows(Context& ctx, const LinearWeight& table, const int32_t* ids, int64_t count, float* out);

}  // namespace lacuna::cpu

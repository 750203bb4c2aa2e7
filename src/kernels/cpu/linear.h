// The CPU bodies of kernels/linear.h. Operands are checked and strides are explicit by now.
#pragma once

#include "kernels/linear.h"

namespace lacuna::cpu {

void linear(Context& ctx, const LinearWeight& w, const float* x, int64_t m, float* y, LinearMode mode,
            int64_t x_stride, int64_t y_stride);
// Whether `in` and `out` have panels that the next two take.
bool packs_gelu(const Context& ctx, const LinearWeight& in, const LinearWeight& out);
// gelu_tanh of x W^T + bias, packed for linear_packed; in the shared workspace, until that is asked for again.
const float* linear_gelu(Context& ctx, const LinearWeight& w, const float* x, int64_t m);
void linear_packed(Context& ctx, const LinearWeight& w, const float* packed, int64_t m, float* y);
size_t panel_bytes(ActivationType activations, const Tensor& weight);
void pack_panels(Context& ctx, const Tensor& weight, void* panels);
void quantize_rows(Context& ctx, const Tensor& weight, int8_t* codes, float* scales);
void embed_rows(Context& ctx, const LinearWeight& table, const int32_t* ids, int64_t count, float* out);

}  // namespace lacuna::cpu

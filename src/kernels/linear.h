#pragma once

#include <span>

#include "kernels/context.h"

namespace lacuna {

// A linear layer's parameters, as stored: weight [N, K] row-major in f32, f16, bf16 or int8.
// int8 rows need row_scale [N]: real weight = code * row_scale[row].
struct LinearWeight {
  Tensor weight;
  const float* row_scale = nullptr;
  const float* bias = nullptr;  // [N] or null
  const void* panels = nullptr;  // the weights once more, packed (pack_panels), or null
  size_t panel_bytes = 0;
  int64_t out() const { return weight.shape[0]; }
  int64_t in() const { return weight.shape[1]; }
};

enum class LinearMode : uint8_t { kStore, kAccumulate };  // y = …  |  y += …

// y[M, N] (=|+=) x[M, K] · W[N, K]^T + bias. x and y are f32, row-major, rows x_stride / y_stride
// floats apart (0 = dense). Accumulates in f32. ctx.activations decides whether x is rounded to
// bf16 first (kBF16) or used as it is. M = 1 … a few streams the weights once at memory speed;
// large M packs panels. The result of a row does not depend on M's split, on other rows, or on the
// number of threads beyond the choice between the small-M and large-M body (at 8 rows; int8 times bf16 pairs: 24).
void linear(Context& ctx, const LinearWeight& w, const float* x, int64_t m, float* y,
            LinearMode mode = LinearMode::kStore, int64_t x_stride = 0, int64_t y_stride = 0);

// y[M, N] = out(gelu_tanh(in(x))), rows dense; `wide` [M, in.out()] may take what comes between. With panels for both
// (below) nothing does: pieces of it go on to `out`, rounded to bf16, and GELU is no more exact than that needs.
void gelu_mlp(Context& ctx, const LinearWeight& in, const LinearWeight& out, const float* x, int64_t m, float* wide,
              float* y);

// A second copy of a weight of a model that stays in the caches, where unpacking the weights of every call costs as
// much as reading them: words in the order in which products take them, pairs of bf16 or, for weights that bf16 does not
// hold and where products of pairs are slow, f32. With it a product has one body for any M, whose rows have the bits of
// the large-M body. Its bytes; 0 where no such product exists (bf16 or int8 weights with f32 activations, processors
// without bf16 pairs).
size_t panel_bytes(const Context& ctx, const LinearWeight& w);
// Gives all of them panels, which live in the result; none of them, and nothing, if one cannot have any or they would
// take more than `most` bytes.
Buffer pack_panels(Context& ctx, std::span<LinearWeight* const> weights, size_t most);

// Quantises rows symmetrically: code = round_half_even(w / scale), scale = amax / 127, for weights
// of dtype f32, f16 or bf16 [N, K]. codes [N, K], scales [N]. An all-zero row gets scale 0.
void quantize_rows(Context& ctx, const Tensor& weight, int8_t* codes, float* scales);

// out[i, :] = row ids[i] of table [V, D] (any LinearWeight dtype) as f32. ids must be in range.
void embed_rows(Context& ctx, const LinearWeight& table, const int32_t* ids, int64_t count, float* out);

}  // namespace lacuna

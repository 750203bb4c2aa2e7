// Row-wise companions of the matrix product: quantisation and embedding look-up.
#include <algorithm>

#include "base/error.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

// Rows handed out at a time: a few microseconds of work at the usual widths.
constexpr int64_t kRowsPerPiece = 16;
int64_t pieces(int64_t rows) { return (rows + kRowsPerPiece - 1) / kRowsPerPiece; }

const std::byte* row_of(const Tensor& t, int64_t row) {
  return t.as<std::byte>() + row * t.shape[1] * static_cast<int64_t>(dtype_size(t.dtype));
}

}  // namespace

void quantize_rows(Context& ctx, const Tensor& weight, int8_t* codes, float* scales) {
  const LinearBodies& b = linear_bodies();
  const int64_t n = weight.shape[0], k = weight.shape[1];
  const bool narrow = weight.dtype != DType::kF32;
  for (int t = 0; narrow && t < ctx.pool.size(); ++t) ctx.workspace<float>(t, static_cast<size_t>(k));
  ctx.pool.parallel_for(pieces(n), [&](int64_t index, int thread) {
    for (int64_t r = index * kRowsPerPiece; r < std::min(n, (index + 1) * kRowsPerPiece); ++r) {
      const float* values = weight.as<float>() + (narrow ? 0 : r * k);
      if (narrow) {
        float* wide = ctx.workspace<float>(thread, static_cast<size_t>(k));
        b.widen(weight.dtype, row_of(weight, r), k, wide);
        values = wide;
      }
      if (!b.quantize(values, k, codes + r * k, scales + r))
        throw BadInput("quantize_rows: row {} of the weight holds a value that is not finite", r);
    }
  });
}

void embed_rows(Context& ctx, const LinearWeight& table, const int32_t* ids, int64_t count, float* out) {
  const LinearBodies& b = linear_bodies();
  const int64_t d = table.in();
  ctx.pool.parallel_for(pieces(count), [&](int64_t index, int) {
    for (int64_t i = index * kRowsPerPiece; i < std::min(count, (index + 1) * kRowsPerPiece); ++i) {
      float* to = out + i * d;
      b.widen(table.weight.dtype, row_of(table.weight, ids[i]), d, to);
      if (table.weight.dtype != DType::kI8) continue;
      const float scale = table.row_scale[ids[i]];
      for (int64_t j = 0; j < d; ++j) to[j] *= scale;
    }
  });
}

}  // namespace lacuna::cpu

// Row-wise companions of the matrix product: quantisation and embedding look-up. Plain loops: the first
// runs once a weight at load time, the second touches a few rows a step.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "kernels/cpu/linear.h"

namespace lacuna::cpu {
namespace {

float as_float(float x) { return x; }
template <class T>
float as_float(T x) { return to_float(x); }

// Code range of symmetric int8: -128 is left out so that negation is exact.
constexpr float kMaxCode = 127.0f;
// Rows handed out at a time.
constexpr int64_t kRowsPerPiece = 16;

template <class T>
void quantize_row(const T* w, int64_t k, int64_t row, int8_t* codes, float* scale) {
  float amax = 0;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    const float a = std::fabs(as_float(w[i]));
    finite &= std::isfinite(a);
    amax = std::max(amax, a);
  }
  if (!finite) throw BadInput("quantize_rows: row {} of the weight holds a value that is not finite", row);
  *scale = amax / kMaxCode;
  if (*scale == 0) {  // an all-zero row, or one so small that its scale underflows
    std::memset(codes, 0, static_cast<size_t>(k));
    return;
  }
  for (int64_t i = 0; i < k; ++i) {
    // A subnormal scale is inexact, so that the quotient may pass 127.
    const float q = std::nearbyint(as_float(w[i]) / *scale);
    codes[i] = static_cast<int8_t>(std::clamp(q, -kMaxCode, kMaxCode));
  }
}

template <class T>
void quantize(Context& ctx, const Tensor& weight, int8_t* codes, float* scales) {
  const int64_t n = weight.shape[0], k = weight.shape[1];
  ctx.pool.parallel_for((n + kRowsPerPiece - 1) / kRowsPerPiece, [&](int64_t index, int) {
    for (int64_t r = index * kRowsPerPiece; r < std::min(n, (index + 1) * kRowsPerPiece); ++r)
      quantize_row(weight.as<T>() + r * k, k, r, codes + r * k, scales + r);
  });
}

template <class T>
void embed(const LinearWeight& table, const int32_t* ids, int64_t count, float* out) {
  const int64_t d = table.in();
  for (int64_t i = 0; i < count; ++i) {
    const T* row = table.weight.as<T>() + ids[i] * d;
    const float scale = table.weight.dtype == DType::kI8 ? table.row_scale[ids[i]] : 1.0f;
    for (int64_t j = 0; j < d; ++j) {
      if constexpr (std::is_same_v<T, int8_t>)
        out[i * d + j] = static_cast<float>(row[j]) * scale;
      else
        out[i * d + j] = as_float(row[j]);
    }
  }
}

}  // namespace

void quantize_rows(Context& ctx, const Tensor& weight, int8_t* codes, float* scales) {
  if (weight.dtype == DType::kF32) return quantize<float>(ctx, weight, codes, scales);
  if (weight.dtype == DType::kF16) return quantize<F16>(ctx, weight, codes, scales);
  return quantize<BF16>(ctx, weight, codes, scales);
}

void embed_rows(Context& ctx, const LinearWeight& table, const int32_t* ids, int64_t count, float* out) {
  const DType t = table.weight.dtype;
  if (t == DType::kF32) return embed<float>(table, ids, count, out);
  if (t == DType::kF16) return embed<F16>(table, ids, count, out);
  if (t == DType::kBF16) return embed<BF16>(table, ids, count, out);
  return embed<int8_t>(table, ids, count, out);
}

}  // namespace lacuna::cpu

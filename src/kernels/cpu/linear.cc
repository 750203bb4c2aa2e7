#include "kernels/cpu/linear.h"

#include <algorithm>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

// A large-M product is cut into at least this many pieces, if its columns allow: a few for each core of
// the machines this is run on, so that none idles for long at the end.
constexpr int64_t kWantedPieces = 32;

// f32 and f16 weights lose bits in bf16, so they stay wide whatever the activations are.
Operand operand_for(ActivationType activations, DType weights, const LinearBodies& b) {
  if (activations == ActivationType::kF32) return Operand::kF32;
  const bool exact = weights == DType::kBF16 || weights == DType::kI8;
  return exact && b.bf16_pairs ? Operand::kBf16Pair : Operand::kF32Rounded;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The product restricted to rows [row, row + m) and columns [column, column + count); x is set by the caller.
LinearPiece piece(const LinearWeight& w, Operand operand, int64_t row, int64_t m, int64_t column, int64_t count,
                  float* y, int64_t y_stride, LinearMode mode) {
  LinearPiece p;
  p.dtype = w.weight.dtype;
  p.operand = operand;
  p.weight = w.weight.as<std::byte>() + column * w.in() * static_cast<int64_t>(dtype_size(p.dtype));
  p.row_scale = w.weight.dtype == DType::kI8 ? w.row_scale + column : nullptr;
  p.bias = w.bias ? w.bias + column : nullptr;
  p.count = count;
  p.k = w.in();
  p.m = m;
  p.y = y + row * y_stride + column;
  p.y_stride = y_stride;
  p.accumulate = mode == LinearMode::kAccumulate;
  return p;
}

void linear_small(Context& ctx, const LinearBodies& b, Operand operand, const LinearWeight& w, const float* x,
                  int64_t m, float* y, LinearMode mode, int64_t x_stride, int64_t y_stride) {
  const int64_t n = w.out(), k = w.in();
  const DigitBodies* digits = w.weight.dtype == DType::kI8 && k < kMaxDigitK && b.digits ? &b.digits() : nullptr;
  const int64_t row_words = digits ? digits->words(k) : b.small_words(words(operand, k));
  float* packed = ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(m * row_words));
  for (int64_t i = 0; i < m; ++i)
    if (digits)
      digits->pack(operand != Operand::kF32, x + i * x_stride, k, packed + i * row_words);
    else
      b.pack_small(operand, x + i * x_stride, k, packed + i * row_words);

  const int64_t row_bytes = k * static_cast<int64_t>(dtype_size(w.weight.dtype));
  const int64_t rows = std::max<int64_t>(1, kSmallPieceBytes / row_bytes / kMaxSmallRows) * kMaxSmallRows;
  ctx.pool.parallel_runs(ceil_div(n, rows), [&](int64_t index, int) {
    const int64_t first = index * rows;
    LinearPiece p = piece(w, operand, 0, m, first, std::min(rows, n - first), y, y_stride, mode);
    p.x = packed;
    digits ? digits->small(p) : b.small(p);
  });
}

void linear_large(Context& ctx, const LinearBodies& b, Operand operand, const LinearWeight& w, const float* x,
                  int64_t m, float* y, LinearMode mode, int64_t x_stride, int64_t y_stride) {
  const int64_t n = w.out(), k = w.in(), k_words = words(operand, k);
  const int64_t groups = ceil_div(m, b.lanes), group_words = k_words * b.lanes;
  float* packed = ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(groups * group_words));
  const int64_t blocks = ceil_div(k_words, kBlockWords);
  ctx.pool.parallel_for(groups * blocks, [&](int64_t index, int) {
    const int64_t group = index / blocks, begin = index % blocks * kBlockWords;
    const int64_t row = group * b.lanes;
    b.pack_group(operand, x + row * x_stride, x_stride, std::min<int64_t>(b.lanes, m - row), k, begin,
                 std::min(begin + kBlockWords, k_words), packed + group * group_words);
  });

  const int64_t row_pieces = ceil_div(m, kTaskRows);
  int64_t columns = kMaxTaskColumns;
  while (columns > kMaxLanes && row_pieces * ceil_div(n, columns) < kWantedPieces) columns /= 2;
  const int64_t column_pieces = ceil_div(n, columns);
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<float>(t, large_workspace());
  ctx.pool.parallel_for(row_pieces * column_pieces, [&](int64_t index, int thread) {
    const int64_t row = index / column_pieces * kTaskRows, first = index % column_pieces * columns;
    LinearPiece p =
        piece(w, operand, row, std::min(kTaskRows, m - row), first, std::min(columns, n - first), y, y_stride, mode);
    p.x = packed + row / b.lanes * group_words;
    b.large(p, ctx.workspace<float>(thread, large_workspace()));
  });
}

}  // namespace

const LinearBodies& linear_bodies() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kScalar: break;
    case Isa::kAvx2: return linear_avx2();
    case Isa::kAvx512: return linear_avx512();
    case Isa::kAvx512Bf16: return linear_avx512_bf16();
  }
#endif
  return linear_portable();
}

void linear(Context& ctx, const LinearWeight& w, const float* x, int64_t m, float* y, LinearMode mode,
            int64_t x_stride, int64_t y_stride) {
  const LinearBodies& b = linear_bodies();
  const Operand operand = operand_for(ctx.activations, w.weight.dtype, b);
  const auto body = m <= kMaxSmallRows ? linear_small : linear_large;
  body(ctx, b, operand, w, x, m, y, mode, x_stride, y_stride);
}

}  // namespace lacuna::cpu

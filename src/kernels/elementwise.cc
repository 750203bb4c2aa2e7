#include "kernels/elementwise.h"

#include <algorithm>
#include <functional>

#include "base/error.h"
#include "kernels/cpu/elementwise_ops.h"

namespace lacuna {
namespace {

// Elements of a piece of work: 16 Ki floats are a few microseconds, more than handing out a piece
// costs, and the least that is worth waking the other threads for.
constexpr int64_t kPieceElements = 16384;

void check_rows(const char* op, int64_t m, int64_t d) {
  if (m < 0 || d < 1) throw BadInput("{}: {} rows of {} elements; expected 0 or more rows of 1 or more", op, m, d);
}

int64_t check_stride(const char* op, int64_t stride, int64_t row) {
  if (stride == 0) return row;
  if (stride < row) throw BadInput("{}: rows of {} elements are {} apart", op, row, stride);
  return stride;
}

// Calls row(i) for every row, several to a piece.
template <typename Row>
void for_rows(Context& ctx, int64_t m, int64_t row_elements, const Row& row) {
  const int64_t piece = std::max<int64_t>(1, kPieceElements / row_elements);
  const auto body = [&](int64_t index, int) {
    for (int64_t i = index * piece, end = std::min(m, i + piece); i < end; ++i) row(i);
  };
  ctx.pool.parallel_for((m + piece - 1) / piece, std::ref(body));
}

void report(OpScope& scope, int64_t m, int64_t n, int64_t read, int64_t written) {
  scope.record.m = m;
  scope.record.n = n;
  scope.record.activation_bytes = (read + written) * 4;
}

}  // namespace

void rms_norm(Context& ctx, const float* x, int64_t m, int64_t d, const float* weight, float eps, float* y,
              int64_t stride) {
  check_rows("rms_norm", m, d);
  stride = check_stride("rms_norm", stride, d);
  if (m == 0) return;
  if (!x || !weight || !y) throw BadInput("rms_norm: {} rows without x, weight or y", m);
  OpScope scope(ctx, OpKind::kNorm);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_rows(ctx, m, d, [&](int64_t i) { ops.rms_norm(x + i * stride, d, weight, eps, y + i * stride); });
  report(scope, m, d, m * d, m * d);
  scope.record.weight_bytes = d * 4;
}

void silu_mul(Context& ctx, const float* gate, const float* up, int64_t m, int64_t f, float* out, int64_t stride) {
  check_rows("silu_mul", m, f);
  stride = check_stride("silu_mul", stride, f);
  if (m == 0) return;
  if (!gate || !up || !out) throw BadInput("silu_mul: {} rows without gate, up or out", m);
  if (out == gate && stride != f)
    throw BadInput("silu_mul: out may alias gate only when its rows of {} are dense, not {} apart", f, stride);
  OpScope scope(ctx, OpKind::kActivation);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_rows(ctx, m, f, [&](int64_t i) { ops.silu_mul(gate + i * stride, up + i * stride, f, out + i * f); });
  report(scope, m, f, 2 * m * f, m * f);
}

namespace {

// Runs a flat operation in pieces of kPieceElements.
template <typename Piece>
void for_elements(Context& ctx, const char* op, const float* x, const float* out, int64_t n, const Piece& piece) {
  if (n < 0) throw BadInput("{}: {} elements; expected 0 or more", op, n);
  if (n == 0) return;
  if (!x || !out) throw BadInput("{}: {} elements without memory", op, n);
  OpScope scope(ctx, OpKind::kActivation);
  const auto body = [&](int64_t index, int) {
    const int64_t at = index * kPieceElements;
    piece(at, std::min(kPieceElements, n - at));
  };
  ctx.pool.parallel_for((n + kPieceElements - 1) / kPieceElements, std::ref(body));
  report(scope, 1, n, n, n);
}

}  // namespace

void relu(Context& ctx, float* x, int64_t n) {
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_elements(ctx, "relu", x, x, n, [&](int64_t at, int64_t count) { ops.relu(x + at, count); });
}

void log_sigmoid(Context& ctx, const float* x, int64_t n, float factor, float* out) {
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_elements(ctx, "log_sigmoid", x, out, n,
               [&](int64_t at, int64_t count) { ops.log_sigmoid(x + at, count, factor, out + at); });
}

void rope(Context& ctx, float* x, int64_t m, int64_t heads, int64_t d, const float* cos_table, const float* sin_table,
          int64_t stride) {
  check_rows("rope", m, d);
  if (heads < 1) throw BadInput("rope: {} heads; expected 1 or more", heads);
  if (d % 2 != 0) throw BadInput("rope: a head of {} elements has no pairs; expected an even number", d);
  stride = check_stride("rope", stride, heads * d);
  if (m == 0) return;
  if (!x || !cos_table || !sin_table) throw BadInput("rope: {} rows without x or tables", m);
  OpScope scope(ctx, OpKind::kRope);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_rows(ctx, m, heads * d, [&](int64_t i) {
    for (int64_t h = 0; h < heads; ++h)
      ops.rope(x + i * stride + h * d, d / 2, cos_table + i * (d / 2), sin_table + i * (d / 2));
  });
  report(scope, m, heads * d, m * heads * d + m * d, m * heads * d);
}

}  // namespace lacuna

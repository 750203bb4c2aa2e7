#include "kernels/elementwise.h"

#include "kernels/cpu/elementwise_ops.h"
#include "kernels/rows.h"

namespace lacuna {
void rms_norm(Context& ctx, const float* x, int64_t m, int64_t d, const float* weight, float eps, float* y,
              int64_t stride) {
  check_rows("rms_norm", m, d);
  stride = check_stride("rms_norm", stride, d);
  if (m == 0) return;
  if (!x || !weight || !y) throw BadInput("rms_norm: {} rows without x, weight or y", m);
  OpScope scope(ctx, OpKind::kNorm);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_rows(ctx, m, d, [&](int64_t i) { ops.rms_norm(x + i * stride, d, weight, eps, y + i * stride); });
  report_rows(scope, m, d, m * d, m * d);
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
  report_rows(scope, m, f, 2 * m * f, m * f);
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
  report_rows(scope, 1, n, n, n);
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

void silu(Context& ctx, float* x, int64_t n) {
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_elements(ctx, "silu", x, x, n, [&](int64_t at, int64_t count) { ops.silu(x + at, count); });
}

void gelu_tanh(Context& ctx, float* x, int64_t n) {
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_elements(ctx, "gelu_tanh", x, x, n, [&](int64_t at, int64_t count) { ops.gelu_tanh(x + at, count); });
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
  report_rows(scope, m, heads * d, m * heads * d + m * d, m * heads * d);
}

void rope_pairs(Context& ctx, float* x, int64_t m, int64_t heads, int64_t d, int64_t rotated, const float* cos_table,
                const float* sin_table, int64_t stride) {
  check_rows("rope_pairs", m, d);
  if (heads < 1) throw BadInput("rope_pairs: {} heads; expected 1 or more", heads);
  if (rotated < 0 || rotated > d || rotated % 2 != 0)
    throw BadInput("rope_pairs: {} of a head's {} elements are turned; expected an even number of them", rotated, d);
  stride = check_stride("rope_pairs", stride, heads * d);
  if (m == 0 || rotated == 0) return;
  if (!x || !cos_table || !sin_table) throw BadInput("rope_pairs: {} rows without x or tables", m);
  OpScope scope(ctx, OpKind::kRope);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  const int64_t half = rotated / 2;
  for_rows(ctx, m, heads * rotated, [&](int64_t i) {
    for (int64_t h = 0; h < heads; ++h)
      ops.rope_pairs(x + i * stride + h * d, half, cos_table + i * half, sin_table + i * half);
  });
  report_rows(scope, m, heads * rotated, m * (heads + 1) * rotated, m * heads * rotated);
}

}  // namespace lacuna

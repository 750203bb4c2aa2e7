#include "kernels/layer_norm.h"

#include "base/error.h"
#include "kernels/cpu/elementwise_ops.h"
#include "kernels/rows.h"

namespace lacuna {
namespace {

void check_norm(const char* op, const LayerNorm& norm) {
  // Below zero it could cancel a variance; a constant row needs one above zero.
  if (!(norm.eps > 0)) throw BadInput("{}: eps is {}; expected a positive number", op, norm.eps);
}

int64_t norm_bytes(const LayerNorm& norm, int64_t d) {
  return ((norm.weight != nullptr) + (norm.bias != nullptr)) * d * 4;
}

// Runs the norms of `groups` times d values of m rows, up to kNormRows at a time, with each row's shift from `table`
// and, of one group, with what is added to x before.
void for_norms(Context& ctx, const LayerNorm& norm, const float* x, int64_t m, int64_t groups, int64_t d,
               int64_t stride, const RowTable* table, bool add, float* y, const float* branch = nullptr,
               const RowTable* gate = nullptr) {
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  const int64_t piece = std::max<int64_t>(1, kPieceElements / (groups * d));
  const auto body = [&](int64_t index, int) {
    cpu::NormRows rows;
    rows.d = d;
    rows.weight = norm.weight;
    rows.bias = norm.bias;
    rows.eps = norm.eps;
    rows.add = add;
    rows.gated = branch != nullptr;
    for (int64_t i = index * piece, end = std::min(m, i + piece); i < end; ++i) {
      const float* shift = table ? table->row(i) : nullptr;
      for (int64_t at = i * stride, last = at + groups * d; at < last; at += d) {
        rows.x[rows.count] = x + at;
        rows.shift[rows.count] = shift;
        rows.y[rows.count] = y + at;
        if (branch) {
          rows.branch[rows.count] = branch + at;
          rows.gate[rows.count] = gate->row(i);
        }
        if (++rows.count < cpu::kNormRows && (i + 1 < end || at + d < last)) continue;
        ops.layer_norm(rows);
        rows.count = 0;
      }
    }
  };
  ctx.pool.parallel_for((m + piece - 1) / piece, std::ref(body));
}

}  // namespace

void layer_norm(Context& ctx, const LayerNorm& norm, const float* x, int64_t m, int64_t d, float* y, LinearMode mode,
                int64_t groups, int64_t stride) {
  constexpr const char* kOp = "layer_norm";
  check_rows(kOp, m, d);
  if (groups < 1) throw BadInput("{}: {} groups; expected 1 or more", kOp, groups);
  stride = check_stride(kOp, stride, groups * d);
  check_norm(kOp, norm);
  if (m == 0) return;
  if (!x || !y) throw BadInput("{}: {} rows without x or y", kOp, m);
  OpScope scope(ctx, OpKind::kNorm);
  const bool add = mode == LinearMode::kAccumulate;
  for_norms(ctx, norm, x, m, groups, d, stride, nullptr, add, y);
  report_rows(scope, m, groups * d, m * groups * d * (add ? 2 : 1), m * groups * d);
  scope.record.weight_bytes = norm_bytes(norm, d);
}

void adaptive_norm(Context& ctx, const LayerNorm& norm, const float* x, int64_t m, int64_t d,
                   const RowTable& shift_scale, float* y) {
  constexpr const char* kOp = "adaptive_norm";
  check_rows(kOp, m, d);
  check_norm(kOp, norm);
  if (m == 0) return;
  if (!x || !y || !shift_scale.values || !shift_scale.of_row)
    throw BadInput("{}: {} rows without x, y or modulation", kOp, m);
  OpScope scope(ctx, OpKind::kNorm);
  for_norms(ctx, norm, x, m, 1, d, d, &shift_scale, false, y);
  report_rows(scope, m, d, 3 * m * d, m * d);
  scope.record.weight_bytes = norm_bytes(norm, d);
}

void gated_norm(Context& ctx, const float* branch, const RowTable& gate, const LayerNorm& norm, float* x, int64_t m,
                int64_t d, const RowTable& shift_scale, float* y) {
  constexpr const char* kOp = "gated_norm";
  check_rows(kOp, m, d);
  check_norm(kOp, norm);
  if (m == 0) return;
  if (!x || !y || x == y || !branch || !gate.values || !gate.of_row || !shift_scale.values || !shift_scale.of_row)
    throw BadInput("{}: {} rows without x, y, a branch, gates or modulation, or with y in the place of x", kOp, m);
  OpScope scope(ctx, OpKind::kNorm);
  for_norms(ctx, norm, x, m, 1, d, d, &shift_scale, false, y, branch, &gate);
  report_rows(scope, m, d, 5 * m * d, 2 * m * d);
  scope.record.weight_bytes = norm_bytes(norm, d);
}

void add_gated(Context& ctx, const float* x, int64_t m, int64_t d, const RowTable& gate, float* y) {
  constexpr const char* kOp = "add_gated";
  check_rows(kOp, m, d);
  if (m == 0) return;
  if (!x || !y || !gate.values || !gate.of_row) throw BadInput("{}: {} rows without x, y or gates", kOp, m);
  OpScope scope(ctx, OpKind::kActivation);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_rows(ctx, m, d, [&](int64_t i) { ops.add_product(x + i * d, gate.row(i), d, y + i * d); });
  report_rows(scope, m, d, 3 * m * d, m * d);
}

}  // namespace lacuna

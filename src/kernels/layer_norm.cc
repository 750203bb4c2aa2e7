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

int64_t norm_bytes(const LayerNorm& norm, int64_t d) { return ((norm.weight != nullptr) + (norm.bias != nullptr)) * d * 4; }

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
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  const bool add = mode == LinearMode::kAccumulate;
  for_rows(ctx, m, groups * d, [&](int64_t i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = i * stride + g * d;
      ops.layer_norm(x + at, d, norm.weight, norm.bias, norm.eps, nullptr, nullptr, add, y + at);
    }
  });
  report_rows(scope, m, groups * d, m * groups * d * (add ? 2 : 1), m * groups * d);
  scope.record.weight_bytes = norm_bytes(norm, d);
}

void adaptive_norm(Context& ctx, const LayerNorm& norm, const float* x, int64_t m, int64_t d, const RowTable& shift_scale,
                   float* y) {
  constexpr const char* kOp = "adaptive_norm";
  check_rows(kOp, m, d);
  check_norm(kOp, norm);
  if (m == 0) return;
  if (!x || !y || !shift_scale.values || !shift_scale.of_row)
    throw BadInput("{}: {} rows without x, y or modulation", kOp, m);
  OpScope scope(ctx, OpKind::kNorm);
  const auto& ops = cpu::elementwise_ops(cpu_isa());
  for_rows(ctx, m, d, [&](int64_t i) {
    const float* shift = shift_scale.row(i);
    ops.layer_norm(x + i * d, d, norm.weight, norm.bias, norm.eps, shift, shift + d, false, y + i * d);
  });
  report_rows(scope, m, d, 3 * m * d, m * d);
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

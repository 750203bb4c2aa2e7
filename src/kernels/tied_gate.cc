#include "kernels/tied_gate.h"

#include "base/error.h"
#include "kernels/cpu/tied_gate.h"

namespace lacuna {
namespace {

void check(const char* op, int64_t n, bool present) {
  if (n < 0) throw BadInput("{}: {} values; expected 0 or more", op, n);
  if (n > 0 && !present) throw BadInput("{}: {} values without memory", op, n);
}

// `touched` values read or written for each of n.
void report(OpScope& scope, int64_t n, int64_t touched) {
  scope.record.m = n;
  scope.record.activation_bytes = touched * n * 4;
}

}  // namespace

void sigmoid(Context& ctx, float* x, int64_t n) {
  check("sigmoid", n, x);
  if (n == 0) return;
  OpScope scope(ctx, OpKind::kActivation);
  cpu::sigmoid(ctx, x, n);
  report(scope, n, 2);
}

void tied_gate(Context& ctx, const float* z, int64_t n, float* k, float* log_decay) {
  check("tied_gate", n, z && k && log_decay);
  if (n == 0) return;
  OpScope scope(ctx, OpKind::kActivation);
  cpu::tied_gate(ctx, z, n, k, log_decay);
  report(scope, n, 3);
}

void add_scaled(Context& ctx, const float* x, float factor, int64_t n, float* y) {
  check("add_scaled", n, x && y);
  if (n == 0) return;
  OpScope scope(ctx, OpKind::kActivation);
  cpu::add_scaled(ctx, x, factor, n, y);
  report(scope, n, 3);
}

}  // namespace lacuna

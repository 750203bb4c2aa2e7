#include "kernels/router.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "base/error.h"
#include "kernels/cpu/router.h"

namespace lacuna {
namespace {

void check_tokens(const char* op, const int32_t* token, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (token[i] < 0 || token[i] >= rows)
      throw BadInput("{}: token {} at index {} is outside the {} rows", op, token[i], i, rows);
}

}  // namespace

void route(Context& ctx, const RouterShape& shape, const float* weight, const float* x, int64_t m, int32_t* expert,
           float* p) {
  if (shape.hidden < 1 || shape.experts < 1)
    throw BadInput("route: {} experts on rows of {} elements; expected 1 or more of both", shape.experts, shape.hidden);
  if (shape.top_k < 1 || shape.top_k > shape.experts)
    throw BadInput("route: top_k is {}; expected 1 to {}, the number of experts", shape.top_k, shape.experts);
  if (m < 0) throw BadInput("route: {} rows; expected 0 or more", m);
  if (m == 0) return;
  if (!weight || !x || !expert || !p) throw BadInput("route: {} rows without weight, x, expert or p", m);
  OpScope scope(ctx, OpKind::kRouter);
  cpu::route(ctx, shape, weight, x, m, expert, p);
  scope.record.m = m;
  scope.record.n = shape.experts;
  scope.record.k = shape.hidden;
  scope.record.macs = m * shape.experts * shape.hidden;
  scope.record.weight_bytes = shape.experts * shape.hidden * 4;
  scope.record.activation_bytes = m * (shape.hidden * 4 + shape.top_k * 8);
}

void gather_expert(Context& ctx, int expert, const float* x, int64_t rows, int64_t d, const int32_t* token,
                   int64_t count, float* out) {
  if (expert < 0 || rows < 0 || d < 1 || count < 0)
    throw BadInput("gather_expert: expert {}, {} of {} rows of {} elements", expert, count, rows, d);
  if (count == 0) return;
  if (!x || !token || !out) throw BadInput("gather_expert: {} tokens without x, token or out", count);
  check_tokens("gather_expert", token, count, rows);
  OpScope scope(ctx, OpKind::kExpert);
  cpu::gather_rows(ctx, x, d, token, count, out);
  scope.record.m = count;
  scope.record.n = expert;
  scope.record.k = d;
  scope.record.experts = 1;
  scope.record.activation_bytes = 2 * count * d * 4;
}

void scatter_expert(Context& ctx, const float* y, int64_t count, int64_t d, const int32_t* token, const float* p,
                    int64_t rows, float* out) {
  if (rows < 0 || d < 1 || count < 0) throw BadInput("scatter_expert: {} of {} rows of {} elements", count, rows, d);
  if (count == 0) return;
  if (!y || !token || !p || !out) throw BadInput("scatter_expert: {} tokens without y, token, p or out", count);
  check_tokens("scatter_expert", token, count, rows);
  OpScope scope(ctx, OpKind::kActivation);
  cpu::scatter_rows(ctx, y, d, token, p, count, out);
  scope.record.m = count;
  scope.record.n = d;
  scope.record.activation_bytes = 3 * count * d * 4;
}

}  // namespace lacuna

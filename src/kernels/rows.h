// What the ops over rows of floats share: checks, pieces of work, records.
#pragma once

#include <algorithm>
#include <functional>

#include "base/error.h"
#include "kernels/context.h"

namespace lacuna {

// Elements of a piece of work: 16 Ki floats are a few microseconds, more than handing out a piece
// costs, and the least that is worth waking the other threads for.
inline constexpr int64_t kPieceElements = 16384;

inline void check_rows(const char* op, int64_t m, int64_t d) {
  if (m < 0 || d < 1) throw BadInput("{}: {} rows of {} elements; expected 0 or more rows of 1 or more", op, m, d);
}

inline int64_t check_stride(const char* op, int64_t stride, int64_t row) {
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

inline void report_rows(OpScope& scope, int64_t m, int64_t n, int64_t read, int64_t written) {
  scope.record.m = m;
  scope.record.n = n;
  scope.record.activation_bytes = (read + written) * 4;
}

}  // namespace lacuna

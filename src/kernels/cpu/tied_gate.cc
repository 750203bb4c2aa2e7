#include "kernels/cpu/tied_gate.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace lacuna::cpu {
namespace {

// Values of a piece of work: an exponential takes some 5 ns, so a piece tens of microseconds. A layer of 4096
// of them costs a thousandth of its matrix products at the sizes of the 76B model; no vector body has been
// worth it.
constexpr int64_t kPiece = 4096;

template <typename Each>
void for_each(Context& ctx, int64_t n, const Each& each) {
  const auto body = [&](int64_t index, int) {
    for (int64_t i = index * kPiece, end = std::min(n, i + kPiece); i < end; ++i) each(i);
  };
  ctx.pool.parallel_for((n + kPiece - 1) / kPiece, std::ref(body));
}

}  // namespace

void sigmoid(Context& ctx, float* x, int64_t n) {
  for_each(ctx, n, [x](int64_t i) { x[i] = 1.0f / (1.0f + std::exp(-x[i])); });
}

void tied_gate(Context& ctx, const float* z, int64_t n, float* k, float* log_decay) {
  for_each(ctx, n, [=](int64_t i) {
    const float x = z[i], e = std::exp(-std::fabs(x));  // in (0, 1]
    k[i] = (x >= 0 ? 1.0f : e) / (1.0f + e);
    log_decay[i] = -(std::max(x, 0.0f) + std::log1p(e));
  });
}

void add_scaled(Context& ctx, const float* x, float factor, int64_t n, float* y) {
  for_each(ctx, n, [=](int64_t i) { y[i] += factor * x[i]; });
}

}  // namespace lacuna::cpu

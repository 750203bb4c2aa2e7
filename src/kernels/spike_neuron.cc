#include "kernels/spike_neuron.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.h"
#include "kernels/cpu/spike_bodies.h"

namespace lacuna {

void fire_neurons(Context& ctx, const float* x, int64_t m, int64_t width, float k, int32_t* counts, SpikeRow* rows,
                  int64_t x_stride) {
  if (m < 0 || width <= 0)
    throw BadInput("fire_neurons: x has shape [{}, {}]; expected rows of 1 or more inputs", m, width);
  if (!(k > 0) || !std::isfinite(k)) throw BadInput("fire_neurons: k: found {}, expected a number above 0", k);
  if (m == 0) return;
  if (!x || !counts || !rows) throw BadInput("fire_neurons: {} no data", !x ? "x has" : "counts have");
  if (x_stride == 0) x_stride = width;
  if (x_stride < 0) throw BadInput("fire_neurons: rows of x are {} floats apart; expected 0 or more", x_stride);

  OpScope scope(ctx, OpKind::kQuantize);
  const cpu::SpikeBodies& b = cpu::spike_bodies();
  std::atomic<int64_t> wrong{-1};
  const auto row = [&](int64_t i) {
    if (!b.fire(x + i * x_stride, width, k, counts + i * width, rows + i)) wrong.store(i, std::memory_order_relaxed);
  };
  // A row is a few microseconds: not worth handing out by itself.
  constexpr int64_t kRowsPerPiece = 4;
  if (m <= kRowsPerPiece)
    for (int64_t i = 0; i < m; ++i) row(i);
  else
    ctx.pool.parallel_for((m + kRowsPerPiece - 1) / kRowsPerPiece, [&](int64_t piece, int) {
      for (int64_t i = piece * kRowsPerPiece; i < m && i < (piece + 1) * kRowsPerPiece; ++i) row(i);
    });
  if (const int64_t i = wrong.load(); i >= 0) {
    for (int64_t j = 0; j < width; ++j)
      if (!std::isfinite(x[i * x_stride + j]))
        throw BadInput("fire_neurons: input {} of row {} is {}; expected a finite number", j, i, x[i * x_stride + j]);
    throw BadInput("fire_neurons: row {} has inputs of more than 2^31 spikes (one spike stands for {})", i,
                   rows[i].threshold);
  }
  if (scope.on()) {
    OpRecord& r = scope.record;
    r.m = m;
    r.k = width;
    r.activation_bytes = 8 * m * width;
  }
}

void round_to_int8(Context& ctx, float* x, int64_t m, int64_t d, int8_t* codes, float* scales) {
  if (m < 0 || d <= 0) throw BadInput("round_to_int8: x has shape [{}, {}]; expected rows of 1 or more values", m, d);
  if (m == 0) return;
  if (!x) throw BadInput("round_to_int8: x has no data");
  OpScope scope(ctx, OpKind::kQuantize);
  std::atomic<int64_t> wrong{-1};
  constexpr int64_t kRowsPerPiece = 64;  // of one head each: some 10 microseconds
  ctx.pool.parallel_for((m + kRowsPerPiece - 1) / kRowsPerPiece, [&](int64_t piece, int) {
    for (int64_t r = piece * kRowsPerPiece; r < m && r < (piece + 1) * kRowsPerPiece; ++r) {
      float* row = x + r * d;
      float most = 0;
      bool finite = true;
      for (int64_t i = 0; i < d; ++i) {
        finite = finite && std::isfinite(row[i]);
        most = std::max(most, std::fabs(row[i]));
      }
      if (!finite) {
        wrong.store(r, std::memory_order_relaxed);
        continue;
      }
      const float step = std::clamp(most / 127.0f, 1e-5f, 1e4f);
      for (int64_t i = 0; i < d; ++i) {
        const float code = std::clamp(std::nearbyint(row[i] / step), -128.0f, 127.0f);
        if (codes) codes[r * d + i] = static_cast<int8_t>(code);
        row[i] = code * step;
      }
      if (scales) scales[r] = step;
    }
  });
  if (const int64_t r = wrong.load(); r >= 0)
    throw BadInput("round_to_int8: row {} holds a value that is not finite", r);
  if (scope.on()) {
    OpRecord& r = scope.record;
    r.m = m;
    r.k = d;
    r.activation_bytes = 8 * m * d;
  }
}

}  // namespace lacuna

#include "kernels/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace lacuna::cpu {
namespace {

// Multiply-adds of a piece of work: some 20 microseconds of double products, far more than handing it out.
constexpr int64_t kPieceMacs = 65536;
// Elements of a piece that only moves rows.
constexpr int64_t kPieceElements = 16384;

// Two doubles; the compiler maps them to whatever the target has.
typedef double Lanes __attribute__((vector_size(16)));

// A product of two f32 is exact in double; the sum's order is fixed. At E = 16 the router is a ten-thousandth
// of the expert it chooses, so one portable body serves every machine alike.
double dot(const float* a, const float* b, int64_t n) {
  Lanes s[4] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 4; ++j) s[j] += Lanes{a[i + 2 * j], a[i + 2 * j + 1]} * Lanes{b[i + 2 * j], b[i + 2 * j + 1]};
  const Lanes all = (s[0] + s[1]) + (s[2] + s[3]);
  double sum = all[0] + all[1];
  for (; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// The k highest of logits [E], by insertion: k is 1 or 2 in every published model.
void choose(const double* logits, int experts, int k, int32_t* chosen) {
  const auto rank = [&](int e) { return std::isnan(logits[e]) ? -std::numeric_limits<double>::infinity() : logits[e]; };
  int held = 0;
  for (int e = 0; e < experts; ++e) {
    if (held == k && !(rank(e) > rank(chosen[k - 1]))) continue;
    int at = held < k ? held++ : k - 1;
    for (; at > 0 && rank(e) > rank(chosen[at - 1]); --at) chosen[at] = chosen[at - 1];
    chosen[at] = e;
  }
}

}  // namespace

void route(Context& ctx, const RouterShape& shape, const float* weight, const float* x, int64_t m, int32_t* expert,
           float* p) {
  const int experts = shape.experts, k = shape.top_k;
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<double>(t, static_cast<size_t>(experts));
  const int64_t piece = std::max<int64_t>(1, kPieceMacs / (experts * shape.hidden));
  const auto body = [&](int64_t index, int thread) {
    double* logits = ctx.workspace<double>(thread, static_cast<size_t>(experts));
    for (int64_t i = index * piece, end = std::min(m, i + piece); i < end; ++i) {
      for (int e = 0; e < experts; ++e) logits[e] = dot(weight + e * shape.hidden, x + i * shape.hidden, shape.hidden);
      choose(logits, experts, k, expert + i * k);
      double total = 0;
      const double top = logits[expert[i * k]];
      if (shape.gate == RouterGate::kSoftmax)
        for (int e = 0; e < experts; ++e) total += std::exp(logits[e] - top);
      for (int j = 0; j < k; ++j) {
        const double logit = logits[expert[i * k + j]];
        p[i * k + j] = static_cast<float>(shape.gate == RouterGate::kSoftmax ? std::exp(logit - top) / total
                                                                             : 1 / (1 + std::exp(-logit)));
      }
    }
  };
  ctx.pool.parallel_for((m + piece - 1) / piece, std::ref(body));
}

void gather_rows(Context& ctx, const float* x, int64_t d, const int32_t* token, int64_t count, float* out) {
  const int64_t piece = std::max<int64_t>(1, kPieceElements / d);
  const auto body = [&](int64_t index, int) {
    for (int64_t i = index * piece, end = std::min(count, i + piece); i < end; ++i)
      std::memcpy(out + i * d, x + token[i] * d, static_cast<size_t>(d) * sizeof(float));
  };
  ctx.pool.parallel_for((count + piece - 1) / piece, std::ref(body));
}

void scatter_rows(Context& ctx, const float* y, int64_t d, const int32_t* token, const float* p, int64_t count,
                  float* out) {
  const int64_t piece = std::max<int64_t>(1, kPieceElements / d);
  const auto body = [&](int64_t index, int) {
    for (int64_t i = index * piece, end = std::min(count, i + piece); i < end; ++i) {
      const float* from = y + i * d;
      float* to = out + token[i] * d;
      for (int64_t c = 0; c < d; ++c) to[c] += p[i] * from[c];
    }
  };
  ctx.pool.parallel_for((count + piece - 1) / piece, std::ref(body));
}

}  // namespace lacuna::cpu

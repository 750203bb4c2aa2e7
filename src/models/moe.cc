#include "models/moe.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace lacuna {

void MoeBlock::forward(Context& ctx, const LayerCall& call, const MoeWeights& w, const float* x, float* out) {
  const int64_t m = call.row_count, d = w.shape.hidden, k = w.shape.top_k, experts = w.shape.experts, pairs = m * k;
  LACUNA_CHECK(static_cast<int64_t>(w.experts.size()) == experts);
  if (pairs > std::numeric_limits<int32_t>::max())
    throw Unsupported("{} tokens at once with {} experts each; expected fewer than 2^31 pairs", m, k);
  for (const FeedForward& shared : w.shared) feed_forward(ctx, call, shared, x, out, LinearMode::kAccumulate);

  // Choices [M, k] and weights [M, k], then the same by expert: tokens and weights [M * k], and where each
  // expert's begin [E + 1]. All are 4 bytes wide.
  routing_.ensure(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(4 * pairs + experts + 1) * 4);
  auto* choice = routing_.as<int32_t>();
  auto* p = routing_.as<float>() + pairs;
  auto* token = choice + 2 * pairs;
  auto* p_sorted = p + 2 * pairs;
  auto* begin = choice + 4 * pairs;
  route(ctx, w.shape, w.router, x, m, choice, p);

  // A counting sort, so that an expert's tokens ascend. begin[e + 1] counts, then marks where e is written
  // next, and ends as where e ends.
  std::fill_n(begin, experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) ++begin[choice[i] + 1];
  int64_t most = 0, sum = 0;
  for (int64_t e = 1; e <= experts; ++e) {
    const int64_t count = begin[e];
    most = std::max(most, count);
    begin[e] = static_cast<int32_t>(sum);
    sum += count;
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t at = begin[choice[i] + 1]++;
    token[at] = static_cast<int32_t>(i / k);
    p_sorted[at] = p[i];
  }

  float* in = ctx.activation(ActivationSlot::kExpertIn, static_cast<size_t>(most * d));
  float* y = ctx.activation(ActivationSlot::kExpertOut, static_cast<size_t>(most * d));
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = begin[e], count = begin[e + 1] - first;
    if (count == 0) continue;
    gather_expert(ctx, static_cast<int>(e), x, m, d, token + first, count, in);
    const LayerCall gathered{.layer = call.layer, .row_count = count, .call_tokens = count};
    feed_forward(ctx, gathered, w.experts[static_cast<size_t>(e)], in, y, LinearMode::kStore);
    scatter_expert(ctx, y, count, d, token + first, p_sorted + first, m, out);
  }
}

}  // namespace lacuna

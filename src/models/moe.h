#pragma once

#include <vector>

#include "kernels/router.h"
#include "models/feed_forward.h"

namespace lacuna {

// One mixture-of-experts layer's parameters.
struct MoeWeights {
  RouterShape shape;
  const float* router = nullptr;     // [E, D]
  std::vector<FeedForward> experts;  // E, routed to
  std::vector<FeedForward> shared;   // always on
};

// A mixture of experts: y = sum over shared of S(x) + sum over the top k of p_e E_e(x), p not renormalised.
// Tokens are gathered by expert, so that an expert is one feed-forward over all its tokens, and an expert
// without tokens costs nothing: its weights are not read. A token's sum runs over the shared experts, then
// its own by ascending index, so a result does not depend on the number of threads, nor on the batch
// beyond what `linear` says of small and large M.
class MoeBlock {
 public:
  // out [M, D] += the mixture of x [M, D], M = call.row_count. Uses the activation slots kExpertIn, kExpertOut,
  // kGate and kUp. Observers of spikes are shown those of shared experts, whose input is what routed ones read
  // too; rows gathered for a routed one belong to no sequence.
  void forward(Context& ctx, const LayerCall& call, const MoeWeights& w, const float* x, float* out);

 private:
  Buffer routing_;  // reused: decode allocates nothing
};

}  // namespace lacuna

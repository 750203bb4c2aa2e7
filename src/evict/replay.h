#pragma once

#include <span>
#include <vector>

#include "models/forward.h"

namespace lacuna {

// KVzip's second pass: the model reads "repeat the context" and then the context again, in chunks of
// 2048 tokens, over the full cache. Returns, for each layer, KV head and slot, the largest attention
// that any replayed query of the group pays to the slot while its own chunk is replayed; the softmax
// runs over the first four slots, the chunk, and the replayed tokens so far (kvpress). The cache and
// the next position are as before afterwards.
std::vector<std::vector<std::vector<float>>> replay_attention(Context& ctx, Model& model, SequenceState& state,
                                                              std::span<const int32_t> context,
                                                              std::span<const int32_t> replay_prompt,
                                                              const PrefillOptions& options);

}  // namespace lacuna

#pragma once

#include "kernels/attention.h"
#include "kernels/layer_norm.h"

namespace lacuna {

// What a layer over latents does to the heads of its queries and keys before attention.
struct HeadPreparation {
  LayerNorm q_norm, k_norm;  // over a head's d values, shared by the heads
  // RoPE turns the pairs (2i, 2i + 1) of a head's first `rotated` values by these angles, [rows, rotated / 2].
  int rotated = 0;
  const float *cosine = nullptr, *sine = nullptr;
};

// Norms and turns rows of fused products [q | k | v], each of `heads` heads, rows `stride` floats apart, and puts keys and
// values where kv_append_rows would put those of rows [first, first + rows) of all sequences' rows: layer_norm, rope_pairs
// and kv_append_rows in one pass where there is a body for it, else one after the other. Queries come back in place;
// without `queries` they stay as they are. Keys in qkv are undefined afterwards.
void prepare_heads(Context& ctx, const KvLayout& layout, const HeadPreparation& how, std::span<const KvRows> sequences,
                   int heads, int64_t first, int64_t rows, float* qkv, int64_t stride, bool queries);

}  // namespace lacuna

// Moving rows into, out of and within KV pages.
#pragma once

#include "kernels/attention.h"

namespace lacuna::cpu {

// Rows of k and v go to slots from head.length + skip on; first_position is that of the slot at head.length.
void kv_append(Context& ctx, const KvLayout& layout, const KvHeadView* heads, int kv_heads, const float* k,
               const float* v, int64_t skip, int64_t tokens, int64_t first_position, int64_t stride);
void kv_read(Context& ctx, const KvLayout& layout, const KvHeadView& head, int64_t begin, int64_t end, float* k_out,
             float* v_out);
// Returns the slots that moved.
int64_t kv_compact(const KvLayout& layout, const KvHeadView& head, std::span<const int32_t> keep);

}  // namespace lacuna::cpu

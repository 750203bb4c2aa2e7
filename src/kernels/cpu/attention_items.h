// One call of attention() in pieces: what a thread does at a time, and what all pieces read. attention_cpu.cc plans
// them and packs the keys of many query rows; attention_streaming.cc takes few rows over keys and values as they lie.
#pragma once

#include <algorithm>

#include "kernels/cpu/attention_cpu.h"

namespace lacuna::cpu {

// Up to so many rows the keys and values are used as they lie, without packing: the time to stream
// them covers the arithmetic.
inline constexpr int64_t kStreamRows = 16;
// Query rows that lanes take: ten cost as much as sixteen, more than the streaming path's ten.
inline constexpr int64_t kLeastLaneRows = 13, kLaneRows = 16;
inline constexpr float kLn2 = 0.693147180559945309f;

// The work of one thread at a time.
struct AttentionItem {
  int64_t sequence, head;
  int64_t token_begin, token_end;
  int64_t slot_begin, slot_end;
  int64_t partial;  // where its unfinished result goes, in floats; -1: it is the only chunk
  int64_t merge;    // which puts it together with the others
};

// Chunks of one head to be put together: items [first, first + chunks).
struct alignas(64) AttentionMerge {
  int64_t first, chunks;
  int64_t left;  // items that are not done
};

// Those of the call, or of the layer that an item is run for.
using Sequences = std::span<const AttentionSequence>;

struct AttentionJob {
  KvLayout layout;
  PageMap pages;
  AttentionShape shape;
  const AttentionOps& ops;
  const TileOps& tile;
  const NarrowOps* narrow_ops;  // null: operands stay f32
  const NarrowOps* head_ops;    // null: likewise, or pages that they do not take
  const LaneOps* lane_ops;      // null: likewise, or caches that they do not take
  int64_t group;                // query heads to a KV head
  int64_t ld;                   // stride of rows of d elements
  int64_t q_stride, out_stride;
  float scale;  // log2(e) included
  AttentionItem* items = nullptr;
  const AttentionItem* items_end = nullptr;
  AttentionMerge* merges = nullptr;
  float* partials = nullptr;
  int64_t fetch_steps = 0;  // stretches from the one in use to the one that is asked for

  int d() const { return layout.head_dim; }
  const float* query(const AttentionSequence& s, int64_t head, int64_t token) const {
    return s.q + token * q_stride + head * group * d();
  }
  float* output(const AttentionSequence& s, int64_t head, int64_t token) const {
    return s.out + token * out_stride + head * group * d();
  }
  // Where the query heads of a group want their logarithms; null if nowhere.
  float* lse(const AttentionSequence& s, int64_t head, int64_t token) const {
    return s.lse ? s.lse + token * shape.query_heads + head * group : nullptr;
  }
  // Slots that a token of a sequence sees end here.
  int64_t end(const AttentionSequence& s, const KvHeadView& h, int64_t token) const {
    if (!shape.causal) return h.length;
    const int64_t in_block = (s.first_position + token) % shape.block;
    return h.length - s.tokens + std::min(s.tokens, token - in_block + shape.block);
  }
  int64_t rows(const AttentionItem& item) const { return (item.token_end - item.token_begin) * group; }
  bool lanes(const AttentionItem& item) const {
    return lane_ops && rows(item) >= kLeastLaneRows && rows(item) <= kLaneRows;
  }
  bool streams(const AttentionItem& item) const { return rows(item) <= kStreamRows && !lanes(item); }
  // Null: operands stay f32.
  const NarrowOps* narrow(const AttentionItem& item) const {
    for (const NarrowOps* o : {head_ops, narrow_ops})
      if (o && o->takes(layout.dtype, static_cast<int>(rows(item)), d())) return o;
    return nullptr;
  }
  // Sums [rows, ld], then maxima [rows], then sums of p [rows].
  int64_t partial_size(int64_t rows) const { return rows * (ld + 2); }
};

// Carves arrays out of a thread's workspace; every part starts on a cache line.
class Carver {
 public:
  explicit Carver(std::byte* base) : at_(base) {}
  template <typename T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at_);
    at_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }

 private:
  std::byte* at_;
};

// The slots each token of an item sees, clipped to the item's: [begin, end), both ascending. Query rows x visible slots.
inline int64_t visible_slots(const AttentionJob& job, const AttentionSequence& s, const AttentionItem& item,
                             int64_t* begin, int64_t* end) {
  const KvHeadView& head = s.heads[item.head];
  const bool by_blocks = job.shape.block > 1 && job.shape.causal;
  int64_t lo = item.slot_begin, pairs = 0;
  int64_t see = 0, same = item.token_begin;  // the end of tokens before `same`
  for (int64_t t = item.token_begin, last = item.token_end, slot_end = item.slot_end; t < last; ++t) {
    if (job.shape.window > 0) lo = first_visible(job.layout, head, lo, s.first_position + t, job.shape.window);
    const int64_t b = std::min(lo, slot_end);
    if (t == same) {
      see = job.end(s, head, t);
      same = by_blocks ? see - (head.length - s.tokens) : t + 1;
    }
    const int64_t e = std::max(b, std::min(slot_end, see));
    *begin++ = b;
    *end++ = e;
    pairs += e - b;
  }
  return pairs * job.group;
}

// The columns of a tile at `slot` that rows [row, row + n) see; rows are tokens x group.
inline void row_ranges(const int64_t* begin, const int64_t* end, int64_t row, int64_t n, int64_t group, int64_t slot,
                       int64_t columns, int32_t* row_begin, int32_t* row_end) {
  int64_t t = row / group, j = row % group;
  for (int64_t i = 0; i < n; ++i) {
    row_begin[i] = static_cast<int32_t>(std::clamp<int64_t>(begin[t] - slot, 0, columns));
    row_end[i] = static_cast<int32_t>(std::clamp<int64_t>(end[t] - slot, 0, columns));
    if (++j == group) {
      j = 0;
      ++t;
    }
  }
}

// Divides the sums by the softmax's denominator, or leaves all three for the merge.
void finish(const AttentionJob& job, const AttentionSequence& s, const AttentionItem& item, const float* sums,
            const float* max, const float* total);

// Bytes that an item takes from its thread's workspace, and the item, which says what visible_slots() does. 64 bytes for
// each array cover the alignment.
int64_t streaming_workspace(const AttentionJob& job, const AttentionItem& item);
int64_t streaming_item(Context& ctx, const AttentionJob& job, Sequences seqs, const AttentionItem& item, int thread);
int64_t lane_workspace(const AttentionJob& job, const AttentionItem& item);
int64_t lane_item(Context& ctx, const AttentionJob& job, Sequences seqs, const AttentionItem& item, int thread);

}  // namespace lacuna::cpu

#pragma once

#include <cmath>
#include <memory>
#include <span>

#include "kernels/context.h"

namespace lacuna {

// How a KV page is laid out. A page holds `page_slots` slots of one layer and one KV head:
//   K [page_slots, d] dtype | V [page_slots, d] dtype | k_scale [page_slots] f32 | v_scale f32 |
//   position [page_slots] i32
// dtype is f32, bf16 or int8; the scales exist for int8 only (value = code * scale, a scale per
// token and head). Every part starts 64-byte aligned. K is stored after RoPE.
struct KvLayout {
  DType dtype = DType::kF32;
  int head_dim = 0;
  int page_slots = 32;

  size_t k_offset() const { return 0; }
  size_t v_offset() const { return aligned(kv_part()); }
  size_t k_scale_offset() const { return v_offset() + aligned(kv_part()); }
  size_t v_scale_offset() const { return k_scale_offset() + (dtype == DType::kI8 ? aligned(word_part()) : 0); }
  size_t position_offset() const { return v_scale_offset() + (dtype == DType::kI8 ? aligned(word_part()) : 0); }
  size_t page_bytes() const { return position_offset() + aligned(word_part()); }
  // Bytes that one slot needs: keys, values, scales, position; no padding.
  size_t slot_bytes() const {
    return 2 * static_cast<size_t>(head_dim) * dtype_size(dtype) + (dtype == DType::kI8 ? 8 : 0) + 4;
  }

 private:
  static size_t aligned(size_t b) { return (b + 63) / 64 * 64; }
  size_t kv_part() const { return static_cast<size_t>(page_slots) * head_dim * dtype_size(dtype); }
  size_t word_part() const { return static_cast<size_t>(page_slots) * 4; }
};

// The slots of one layer and KV head: ascending in position, `length` of them, page after page.
struct KvHeadView {
  std::byte* const* pages = nullptr;
  int64_t length = 0;

  const int32_t* positions(const KvLayout& l, int64_t page) const {
    return reinterpret_cast<const int32_t*>(pages[page] + l.position_offset());
  }
  int32_t position(const KvLayout& l, int64_t slot) const {
    return positions(l, slot / l.page_slots)[slot % l.page_slots];
  }
};

// One sequence's share of an attention call. In a causal call its T new tokens are already in the cache: they
// are the last T slots of every head, in order. Heads may differ in length otherwise.
struct AttentionSequence {
  const float* q = nullptr;  // [T, H, d] after RoPE, rows q_stride floats apart
  float* out = nullptr;      // [T, H, d], rows out_stride floats apart
  int64_t tokens = 0;        // T
  int64_t first_position = 0;
  const KvHeadView* heads = nullptr;  // [G]
  float* lse = nullptr;      // [T, H] dense, if wanted: ln of the softmax's denominator, for merge_attention
};

struct AttentionShape {
  int query_heads = 0;  // H; query head h reads KV head h / (H / G)
  int kv_heads = 0;     // G
  float scale = 0;      // usually 1/sqrt(d)
  int64_t window = 0;   // keys with position > query position - window are visible; 0 = all
  int64_t q_stride = 0, out_stride = 0;  // 0 = H * d
  bool causal = true;   // false: every query sees every slot, whatever its position; no window then
  // Causal by blocks: positions are cut into blocks of so many, and a query sees the new tokens of its own block too,
  // whatever their order. 1: causal. No window with others.
  int64_t block = 1;
};

// out = softmax(q K^T * scale, causal) V for every sequence. Query t of a sequence sees slots
// [0, length - T + t] of its head (those inside the window; to the end of its block if shape.block > 1). Softmax in f32. One call serves
// prefill chunks (large T), decode (T = 1, many sequences), and continuation over an evicted cache.
// A sequence's result does not depend on the other sequences or on the number of threads.
void attention(Context& ctx, const KvLayout& layout, const AttentionShape& shape, std::span<const AttentionSequence> seqs);

namespace cpu {
class AttentionRun;
}

// attention() in items, for threads that do other work between them, and planned once for many layers that differ in
// nothing but what the tensors hold. Items hold workspaces of ctx, which no other op may use meanwhile.
class AttentionPlan {
 public:
  AttentionPlan(Context& ctx, const KvLayout& layout, const AttentionShape& shape, std::span<const AttentionSequence> seqs);
  ~AttentionPlan();
  // In the order of the sequences; that from first_item(s) to first_item(s + 1) - 1 are those of s.
  int64_t items() const;
  int64_t first_item(int64_t sequence) const;
  // One item of a layer with seqs of the plan's sizes, on thread `thread` of ctx.pool; reported to lane's trace, where
  // all items of a layer add up to the record of an attention().
  void item(Context& lane, std::span<const AttentionSequence> seqs, int64_t index, int thread);

 private:
  int64_t head_dim_;
  OpRecord record_;                         // if someone listens to ctx
  std::unique_ptr<cpu::AttentionRun> run_;  // null: nothing to do
};

// Writes T new slots of G heads: k and v are [T, G, d] f32, rows `stride` floats apart (0 = G*d).
// Converts to the layout's dtype (int8: scale = amax/127 per token and head, round half to even).
// The pages for slots [length, length + T) of each head exist already; views' length is the old one.
void kv_append(Context& ctx, const KvLayout& layout, const KvHeadView* heads, int kv_heads, const float* k,
               const float* v, int64_t tokens, int64_t first_position, int64_t stride = 0);

// New slots of one of several sequences whose rows follow one another.
struct KvRows {
  const KvHeadView* heads = nullptr;  // as in kv_append
  int64_t tokens = 0, first_position = 0;
};
// Throws if rows [first, first + rows) of all sequences' rows are not there, or there is no place for them.
void check_appended(const char* op, const KvLayout& layout, std::span<const KvRows> sequences, int kv_heads, int64_t first,
                    int64_t rows, const float* k, const float* v);
// kv_append for rows [first, first + rows) of all sequences' rows, so that threads may share them out. k and v are
// row `first`'s.
void kv_append_rows(Context& ctx, const KvLayout& layout, std::span<const KvRows> sequences, int kv_heads, int64_t first,
                    int64_t rows, const float* k, const float* v, int64_t stride);

// Reads slots [begin, end) of a head as f32 rows: k_out, v_out [end-begin, d]; either may be null.
void kv_read(Context& ctx, const KvLayout& layout, const KvHeadView& head, int64_t begin, int64_t end, float* k_out,
             float* v_out);

// Puts together attention over two disjoint sets of slots: out = out e^{lse - l} + other e^{other_lse - l} with
// l = ln(e^lse + e^other_lse), which is attention over both. out, other [rows, d] dense, lse, other_lse [rows]; a
// row is a token and query head. lse becomes l. share [rows], if wanted: e^{lse - l}, the part of a row's
// probability that falls on the first set.
void merge_attention(Context& ctx, int64_t rows, int64_t d, float* out, float* lse, const float* other,
                     const float* other_lse, float* share = nullptr);

// In-place compaction: slot keep[i] of the head moves to slot i (bit-exact copy of K, V, scales and
// position). keep is ascending. Pages past the end are the caller's to free.
void kv_compact(Context& ctx, const KvLayout& layout, const KvHeadView& head, std::span<const int32_t> keep);

// Attention probabilities of a few queries over one KV head's whole row (softmax over all visible
// slots, window included, causal): q [w, r, d] (rows q_stride floats apart) are the r query heads of this
// group for the w last tokens, which are the last w slots. probs [r, w, n] with n = head.length; 0 where
// not visible. f32 whatever the cache's dtype.
void window_attention(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t w, int r,
                      int64_t q_stride, int64_t first_position, float scale, int64_t window, float* probs);

// Column sums of causal attention over ALL queries (observed attention, H2O): sums [r, n] +=
// sum over t of softmax row t of q [T, r, d] (rows q_stride floats apart), the T queries being the last T slots.
// share [T, r] (rows share_stride floats apart), if any, multiplies the rows: what a query left for these slots.
void attention_column_sums(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t tokens,
                           int r, int64_t q_stride, int64_t first_position, float scale, int64_t window, float* sums,
                           const float* share = nullptr, int64_t share_stride = 0);

// Upper triangles T [d, d], packed in groups of rows without the zeros left of them: packed_triangle(d) floats each.
int64_t packed_triangle(int d);
void pack_triangle(const float* t, int d, float* out);  // t is [d, d]; below the diagonal nothing is read

// What n triangles, packed one behind the other, make of values x [count, d]: out[T, x] = x . T x, or |T x|^2 if
// `squares`; f32, rows of out `ld` floats apart. A value's results do not depend on the others.
void triangle_products(Context& ctx, const float* values, int64_t count, int d, const float* triangles, int n,
                       bool squares, float* out, int64_t ld);

}  // namespace lacuna

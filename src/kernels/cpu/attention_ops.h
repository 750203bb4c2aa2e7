// The vector bodies that attention is built from, one table for each ISA level. The drivers
// (attention_cpu.cc, attention_streaming.cc, attention_scores.cc, kv_pages.cc) hold the loops over heads, tiles and pages and
// are compiled once; each table entry does thousands of operations a call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"
#include "tensor/dtype.h"

namespace lacuna::cpu {

// Keys in a tile of the blocked path. The tile's packed K and V (2 * 128 * 64 * 4 B = 64 KB at d = 64)
// stay in L2 (1 MB), one panel of them in L1, and a row block's scores (48 * 128 * 4 B = 24 KB) in L1.
inline constexpr int kKeyTile = 128;
// Query rows whose scores are alive at a time: a multiple of every register tile's row count.
inline constexpr int kRowBlock = 48;
// Vector stores may run past a row's end up to here; row strides are multiples of it.
inline constexpr int kPad = 32;

// Slots whose scores the streaming path holds at most. Rows twice as far apart took so much of L1 that with eight query
// heads lines asked for ahead were gone before their use.
inline constexpr int64_t kStreamTile = 128;

// Rows of a triangle and values that a register tile of triangle_products takes: 4 x 6 vectors of sums, 4
// broadcasts and a vector of values in AVX-512. 96 values of 64 floats are half of L1.
inline constexpr int kTriangleRows = 4;
inline constexpr int kTriangleValues = 96;
// Floats of a packed triangle: [c from the group's first row to d)[kTriangleRows] for every group of rows.
inline constexpr int64_t triangle_size(int d) {
  const int64_t groups = (d + kTriangleRows - 1) / kTriangleRows;
  return kTriangleRows * (groups * d - kTriangleRows * groups * (groups - 1) / 2);
}

// Rows of scores -> unnormalised probabilities, one online-softmax step.
struct SoftmaxStep {
  const float* scores;    // [rows] of stride `ld`, before scaling
  int64_t ld;
  int rows;
  const int32_t* begin;   // [rows] columns [begin, end) are visible
  const int32_t* end;
  int from, to;           // columns that are written to p, all visible ones among them; multiples of kPad
  float scale;            // of the scores, times log2(e)
  float* max;             // [rows] running maximum of scale * score, -inf before the first step
  float* sum;             // [rows] running sum of p
  float* shrink;          // [rows] out: factor for what was accumulated before this step
  void* p;                // [rows] of stride `ld`: f32 (may be `scores`) or bf16, 0 where not visible
  float* digit_scale = nullptr;  // [rows] out, NarrowOps over int8 only
};

// Matrix products of a tile. Operand elements are f32, or bf16 in pairs. The packed operand is made of
// panels of `panel` columns, [k][panel] each (bf16: [k / 2][panel][2]), so that a register tile reads
// it in one stream.
struct TileOps {
  int element;  // bytes of an operand element
  int panel;    // columns of a panel
  // `count` rows of d codes (with a scale a row for int8) -> element rows of stride ld, zero beyond d.
  void (*rows)(DType dtype, const void* codes, const float* scales, int64_t count, int d, void* out, int64_t ld);
  // Element rows [kKeyTile, ld] -> K panels: columns are keys, k runs over d.
  void (*pack_keys)(const void* rows, int64_t ld, int d, void* out);
  // Element rows [kKeyTile, ld] -> V panels: columns are head dimensions, k runs over keys.
  void (*pack_values)(const void* rows, int64_t ld, int d, void* out);
  // c [rows, columns] = a [rows, k] b
  void (*scores)(const void* a, int64_t lda, const void* b, int k, int rows, int columns, float* c, int64_t ldc);
  // c [rows, d] = shrink[row] * c + a [rows, k] b, where a and b start `from` into the key tile.
  void (*values)(const void* a, int64_t lda, const void* b, int from, int k, int rows, int d, const float* shrink,
                 float* c, int64_t ldc);
  void (*softmax)(const SoftmaxStep& step);

  // Elements of a key in the packed panels: pairs fill up an odd d.
  int64_t key_depth(int d) const { return element == 2 ? (d + 1) / 2 * 2 : d; }
};

// Slots that lie behind each other, and where the part to be read later starts that they ask for (null: nowhere).
struct SlotRun {
  const void* codes;
  const float* scales;  // for int8
  int count;
  const void* next;
};

// The streaming path of narrow caches with operands rounded as ActivationType::kBF16 allows: queries and
// probabilities in bf16 pairs, or in two 8-bit digits each. attention_decode_avx512.cc has the errors.
struct NarrowOps {
  bool (*takes)(DType dtype, int rows, int d);
  // Queries [rows, d] of stride ldq -> what `scores` reads, query_bytes long.
  int64_t (*query_bytes)(DType dtype, int rows, int d);
  void (*prepare)(DType dtype, const float* q, int64_t ldq, int rows, int d, void* query);
  // As stream_scores and stream_values below, run by run. The columns of out are in an order of their own until
  // `restore`.
  void (*scores)(DType dtype, const SlotRun* runs, int n, int d, const void* query, int rows, float* scores,
                 int64_t ld);
  // `step.sum` is [rows, 16]: sums that are added up at the end; step.max may be exceeded by 8. step.p is bf16 for bf16
  // codes. For int8 it is weighted by the scales of `values`' runs, which `sum` does not see, and in two digits:
  // step.ld bytes each of hi, then lo, digit_scale[row] * (256 hi + lo), and up to 64 columns are written.
  void (*softmax)(DType dtype, const SoftmaxStep& step, const SlotRun* runs, int n);
  // p and digit_scale as softmax left them, rows kStreamTile columns apart.
  void (*values)(DType dtype, const SlotRun* runs, int n, int d, const void* p, const float* digit_scale, int rows,
                 float* out, int64_t ld_out);
  void (*restore)(DType dtype, float* out, int64_t ld_out, int rows, int d);
};

// Slots that a run of theirs must be a multiple of, unless it is the last.
inline constexpr int kHeadSlots = 8;

// Pairs of slots whose probabilities and values are alive at a time: 4 + 16 KB of the L1 at d = 64.
inline constexpr int kLanePairs = 64;

// Up to sixteen query rows over slots of a bf16 cache, d = 32, 64 or 128, a row in each lane
// (attention_lanes_avx512.cc). All memory is 64-byte aligned.
struct LaneItem {
  int rows;
  float scale;           // of the scores, times log2(e)
  const int32_t* begin;  // [16] a row sees slots [begin, end); nothing beyond `rows`
  const int32_t* end;
  int32_t all_begin, all_end;  // slots that all rows see
  int32_t* q;            // [d / 2][16] words of the queries
  int32_t* p;            // [kLanePairs][16] probabilities of an even slot and the odd one after it
  int32_t* values;       // [kLanePairs][d] their values, likewise
  float *max, *total;    // [16] maximum of scale * score, which may be exceeded by 8, and sum of p
  float* sums;           // [rows] of stride ld; nothing until `begun`
  int64_t ld;
  int pairs = 0;
  bool begun = false;
};
// Where keys and values lie that come next; null: nowhere.
struct LaneAhead {
  const void *keys, *values;
};
struct LaneOps {
  void (*begin)(LaneItem& item, const float* const* rows, int d);
  // `count` slots from `slot` on, as they lie in a page.
  void (*add)(LaneItem& item, const void* keys, const void* values, LaneAhead ahead, int count, int d, int slot);
  void (*end)(LaneItem& item, int d);
  // Rows of the result: sums by total.
  void (*divide)(const LaneItem& item, float* const* out, int d);
};

struct AttentionOps {
  TileOps f32;
  const TileOps* bf16;      // null where the ISA has no bf16 dot product
  const NarrowOps* narrow;  // likewise
  // Likewise: seven or eight rows over int8, in runs of kHeadSlots. Scores and p, as large as those of eight rows, have
  // an order of their own (attention_decode_heads_avx512.cc).
  const NarrowOps* heads;
  const LaneOps* lanes;     // likewise

  // The streaming path (decode): scores[row, i] = q[row] . key[i], for `count` keys as they lie in a
  // page. `next` is where the next part to be read starts (null: nowhere), for prefetching.
  void (*stream_scores)(DType dtype, const void* codes, const float* scales, int count, int d, const float* q,
                        int64_t ldq, int rows, float* scores, int64_t ld, const void* next);
  // out[row] += sum over i of p[row, i] * value[i]. The values' scales are multiplied into p.
  void (*stream_values)(DType dtype, const void* codes, const float* scales, int count, int d, float* p,
                        int64_t ld, int rows, float* out, int64_t ld_out, const void* next);
  // y = x * factor, y += x * factor
  void (*scale_row)(const float* x, float factor, int64_t count, float* y);
  void (*add_row)(const float* x, float factor, int64_t count, float* y);
  // f32 row -> codes; returns the int8 scale (0 for other dtypes).
  float (*encode_row)(const float* x, int d, DType dtype, void* codes);
  // p[i] = 2^(scores[i] * scale - max) for i in [0, count), which may be in place; returns their sum.
  float (*exponentials)(const float* scores, int64_t count, float scale, float max, float* p);
  // sums[i] += 2^(scores[i] * scale - max) * factor
  void (*add_exponentials)(const float* scores, int64_t count, float scale, float max, float factor, float* sums);
  float (*max_of)(const float* x, int64_t count);
  // lacuna::triangle_products for up to kTriangleValues values; `work` is [round_up(d, kTriangleRows),
  // kTriangleValues].
  void (*triangle_products)(const float* values, int count, int d, const float* triangles, int n, bool squares,
                            float* work, float* out, int64_t ld);
};

const AttentionOps& attention_ops_portable();
#if defined(__x86_64__)
const AttentionOps& attention_ops_avx2();
const AttentionOps& attention_ops_avx512();
const AttentionOps& attention_ops_avx512_bf16();
const NarrowOps& attention_narrow_avx512();
const NarrowOps& attention_heads_avx512();
const LaneOps& attention_lanes_avx512();
#endif
const AttentionOps& attention_ops(Isa isa);

}  // namespace lacuna::cpu

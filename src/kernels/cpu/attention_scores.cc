// Attention probabilities that eviction scores are made of: always f32, whatever the cache holds.
#include <algorithm>
#include <functional>
#include <limits>

#include "kernels/cpu/attention_cpu.h"

namespace lacuna::cpu {
namespace {

// Query tokens of one query head that share a pass over the packed keys when the whole sequence asks:
// packing a key tile is a hundredth of what 384 rows do with it.
constexpr int64_t kStatBlock = 384;

// A head's queries against its own keys: rows are read in place, since f32 needs no packing.
struct Rows {
  const KvLayout& layout;
  const KvHeadView& head;
  const TileOps& tile;
  const float* q;
  int64_t tokens, q_stride, first_position, window;

  int64_t ld() const { return round_up(layout.head_dim, kPad); }
  int64_t begin(int64_t from, int64_t t) const { return first_visible(layout, head, from, first_position + t, window); }
  int64_t end(int64_t t) const { return head.length - tokens + t + 1; }
  const float* query(int64_t t, int64_t j) const { return q + t * q_stride + j * layout.head_dim; }
};

struct KeyTile {
  float* unpacked;
  float* keys;
  float* scores;  // [kRowBlock, kKeyTile]
  int64_t* begin;
};

// The same for every thread, and asked for ahead of the loops: memory does not depend on who does what.
KeyTile key_tile(Context& ctx, const Rows& rows, int thread) {
  const int64_t packed = kKeyTile * rows.ld(), scores = kRowBlock * kKeyTile;
  // The first visible slots of a block of tokens stand behind the floats.
  float* base = ctx.workspace<float>(thread, static_cast<size_t>(2 * packed + scores + 2 * kStatBlock));
  return {base, base + packed, base + 2 * packed, reinterpret_cast<int64_t*>(base + 2 * packed + scores)};
}

void reserve(Context& ctx, const Rows& rows) {
  for (int t = 0; t < ctx.pool.size(); ++t) key_tile(ctx, rows, t);
}

void pack(const Rows& rows, const KeyTile& t, int64_t slot, int64_t slot_end) {
  load_tile_rows(rows.tile, rows.layout, rows.head, KvPart::kKeys, slot, slot_end, t.unpacked, rows.ld());
  rows.tile.pack_keys(t.unpacked, rows.ld(), rows.layout.head_dim, t.keys);
}

// scores[i, 0 … columns) of n tokens from t on, one query head.
void score(const Rows& rows, const KeyTile& k, int64_t t, int64_t n, int64_t j, int64_t columns) {
  rows.tile.scores(rows.query(t, j), rows.q_stride, k.keys, rows.layout.head_dim, static_cast<int>(n),
                   static_cast<int>(round_up(columns, kPad)), k.scores, kKeyTile);
}

// Maximum and 1 / (sum of exponentials) of every row of tokens [t0, t1) of one query head.
void row_statistics(Context& ctx, const AttentionOps& ops, const Rows& rows, int64_t t0, int64_t t1, int64_t j,
                    float scale, float* max, float* inverse, int thread) {
  const KeyTile k = key_tile(ctx, rows, thread);
  int64_t lo = 0;
  for (int64_t t = t0; t < t1; ++t) k.begin[t - t0] = lo = rows.begin(lo, t);
  std::fill(max + t0, max + t1, -std::numeric_limits<float>::infinity());
  std::fill(inverse + t0, inverse + t1, 0.0f);
  for (int64_t slot = k.begin[0] / kKeyTile * kKeyTile, last = rows.end(t1 - 1); slot < last; slot += kKeyTile) {
    const int64_t slot_end = std::min(slot + kKeyTile, last);
    pack(rows, k, slot, slot_end);
    for (int64_t t = t0; t < t1; t += kRowBlock) {
      const int64_t n = std::min<int64_t>(kRowBlock, t1 - t);
      if (k.begin[t - t0] >= slot_end || rows.end(t + n - 1) <= slot) continue;
      score(rows, k, t, n, j, slot_end - slot);
      int32_t begin[kRowBlock], end[kRowBlock];
      for (int64_t i = 0; i < n; ++i) {
        begin[i] = static_cast<int32_t>(std::clamp<int64_t>(k.begin[t - t0 + i] - slot, 0, kKeyTile));
        end[i] = static_cast<int32_t>(std::clamp<int64_t>(rows.end(t + i) - slot, 0, kKeyTile));
      }
      float shrink[kRowBlock];
      const auto to = static_cast<int>(round_up(slot_end - slot, kPad));
      ops.f32.softmax({k.scores, kKeyTile, static_cast<int>(n), begin, end, 0, to, scale, max + t, inverse + t, shrink,
                       k.scores});
    }
  }
  for (int64_t t = t0; t < t1; ++t) inverse[t] = 1.0f / inverse[t];
}

}  // namespace

void window_attention(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t w, int r,
                      int64_t q_stride, int64_t first_position, float scale, int64_t window, float* probs,
                      AttentionCounts& counts) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const Rows rows{layout, head, ops.f32, q, w, q_stride, first_position, window};
  const int64_t n = head.length;
  reserve(ctx, rows);
  const int64_t base = rows.begin(0, 0) / kKeyTile * kKeyTile;

  // Raw scores first, a key tile at a time for all w * r rows; then each whole row's softmax in place.
  const auto scores = [&](int64_t index, int thread) {
    const KeyTile k = key_tile(ctx, rows, thread);
    const int64_t slot = base + index * kKeyTile, slot_end = std::min(slot + kKeyTile, n);
    pack(rows, k, slot, slot_end);
    for (int64_t j = 0; j < r; ++j)
      for (int64_t t = 0; t < w; t += kRowBlock) {
        const int64_t m = std::min<int64_t>(kRowBlock, w - t);
        score(rows, k, t, m, j, slot_end - slot);
        for (int64_t i = 0; i < m; ++i)
          std::copy_n(k.scores + i * kKeyTile, slot_end - slot, probs + (j * w + t + i) * n + slot);
      }
  };
  ctx.pool.parallel_for((n - base + kKeyTile - 1) / kKeyTile, std::ref(scores));

  const auto softmax = [&](int64_t index, int) {
    const int64_t t = index % w, begin = rows.begin(base, t), end = rows.end(t);
    float* row = probs + index * n;
    const float max = ops.max_of(row + begin, end - begin) * scale * kLog2e;
    const float sum = ops.exponentials(row + begin, end - begin, scale * kLog2e, max, row + begin);
    ops.scale_row(row + begin, 1.0f / sum, end - begin, row + begin);
    std::fill(row, row + begin, 0.0f);
    std::fill(row + end, row + n, 0.0f);
    counts.pairs.fetch_add(end - begin, std::memory_order_relaxed);
  };
  ctx.pool.parallel_for(r * w, std::ref(softmax));
}

void attention_column_sums(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t tokens,
                           int r, int64_t q_stride, int64_t first_position, float scale, int64_t window, float* sums,
                           const float* share, int64_t share_stride, AttentionCounts& counts) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const Rows rows{layout, head, ops.f32, q, tokens, q_stride, first_position, window};
  const float s = scale * kLog2e;
  const int64_t n = head.length;
  float* max = ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(2 * r * tokens));
  float* inverse = max + r * tokens;
  reserve(ctx, rows);

  const int64_t blocks = (tokens + kStatBlock - 1) / kStatBlock;
  const auto statistics = [&](int64_t index, int thread) {
    const int64_t j = index % r, t0 = (blocks - 1 - index / r) * kStatBlock;
    const int64_t t1 = std::min(tokens, t0 + kStatBlock);
    row_statistics(ctx, ops, rows, t0, t1, j, s, max + j * tokens, inverse + j * tokens, thread);
    for (int64_t t = t0; share && t < t1; ++t) inverse[j * tokens + t] *= share[t * share_stride + j];
  };
  ctx.pool.parallel_for(blocks * r, std::ref(statistics));

  // Each column belongs to one thread, which adds the rows in order.
  const int64_t base = rows.begin(0, 0) / kKeyTile * kKeyTile;
  const auto columns = [&](int64_t index, int thread) {
    const KeyTile k = key_tile(ctx, rows, thread);
    const int64_t slot = base + index * kKeyTile, slot_end = std::min(slot + kKeyTile, n);
    pack(rows, k, slot, slot_end);
    int64_t pairs = 0;
    for (int64_t j = 0; j < r; ++j) {
      int64_t begin = 0;
      for (int64_t t = std::max<int64_t>(0, slot - (n - tokens)); t < tokens; t += kRowBlock) {
        const int64_t m = std::min<int64_t>(kRowBlock, tokens - t);
        begin = rows.begin(begin, t);
        if (begin >= slot_end) break;
        score(rows, k, t, m, j, slot_end - slot);
        int64_t lo = begin;
        for (int64_t i = 0; i < m; ++i) {
          lo = rows.begin(lo, t + i);
          const int64_t from = std::max(slot, lo), to = std::min(slot_end, rows.end(t + i));
          if (from >= to) continue;
          const int64_t row = j * tokens + t + i;
          ops.add_exponentials(k.scores + i * kKeyTile + (from - slot), to - from, s, max[row], inverse[row],
                               sums + j * n + from);
          pairs += to - from;
        }
      }
    }
    counts.pairs.fetch_add(pairs, std::memory_order_relaxed);
  };
  ctx.pool.parallel_for((n - base + kKeyTile - 1) / kKeyTile, std::ref(columns));
}

void triangle_products(Context& ctx, const float* values, int64_t count, int d, const float* triangles, int n,
                       bool squares, float* out, int64_t ld) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const auto work = static_cast<size_t>(round_up(d, kTriangleRows) * kTriangleValues);
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<float>(t, work);
  const auto body = [&](int64_t index, int thread) {
    const int64_t begin = index * kTriangleValues;
    const auto some = static_cast<int>(std::min<int64_t>(kTriangleValues, count - begin));
    ops.triangle_products(values + begin * d, some, d, triangles, n, squares, ctx.workspace<float>(thread, work),
                          out + begin, ld);
  };
  ctx.pool.parallel_for((count + kTriangleValues - 1) / kTriangleValues, std::ref(body));
}

}  // namespace lacuna::cpu

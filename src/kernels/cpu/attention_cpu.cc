#include "kernels/cpu/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace lacuna::cpu {
namespace {

// Query rows (tokens x query heads of a group) of one blocked item. Its packed queries and sums
// (2 * 384 * 64 * 4 B = 192 KB at d = 64) share L2 with the key tile, and packing a tile costs about a
// hundredth of what 384 rows do with it.
constexpr int64_t kBlockRows = 384;
// Up to so many rows the keys and values are used as they lie, without packing: the time to stream
// them covers the arithmetic.
constexpr int64_t kStreamRows = 16;
// Slots whose scores a streaming item holds at a time: one page, so that memory is read in the order it
// lies in (15 % faster than the keys of eight pages before their values), but not fewer than are worth a
// softmax step, nor more than fit in a third of L1 (16 rows * 256 * 4 B = 16 KB).
constexpr int64_t kLeastStreamTile = 32, kWideStreamTile = 128, kStreamTile = 256;
// How far ahead of its use a stretch is asked for at least. Measured: nearer, a read from memory is still on
// its way when it is needed; farther loses more requests than it gains time (bench/NOTES-attention.md).
constexpr int64_t kFetchAhead = 12 * 1024;
// Slots of a chunk where the keys of few queries are split among threads, or so many that the keys are 256 KB: as much
// again of values, 20 us or more against 1 us that an item takes besides. No more than 32 chunks a head, which
// bounds the partial results.
constexpr int64_t kChunkSlots = 1024, kChunkBytes = 256 * 1024;
constexpr int64_t kMaxChunks = 32;
// Query rows that lanes take (ten cost as much as sixteen, more than the streaming path's ten), and rows of a sequence
// that are cut into items of them: more are worth packing keys for.
constexpr int64_t kLeastLaneRows = 13, kLaneRows = 16, kMostLaneRows = 64;
// Slots from the one in use to the one that is asked for.
constexpr int64_t kLanesAhead = 32;
// Slots of such an item that are worth two, so that an odd number of heads divides among two threads.
constexpr int64_t kLeastHalves = 64;
// Elements of a piece of merge_attention: a few microseconds.
constexpr int64_t kMergeElements = 16384;
constexpr float kLn2 = 0.693147180559945309f;

// The work of one thread at a time.
struct Item {
  int64_t sequence, head;
  int64_t token_begin, token_end;
  int64_t slot_begin, slot_end;
  int64_t partial;  // where its unfinished result goes, in floats; -1: it is the only chunk
  int64_t merge;    // which puts it together with the others
  int64_t pairs;    // query rows x visible slots, once it is done
};

// Chunks of one head to be put together: items [first, first + chunks).
struct Merge {
  int64_t first, chunks;
  int64_t left;  // items that are not done
};

struct Job {
  const KvLayout& layout;
  PageMap pages;
  const AttentionShape& shape;
  std::span<const AttentionSequence> sequences;
  const AttentionOps& ops;
  const TileOps& tile;
  const NarrowOps* narrow_ops;  // null: operands stay f32
  const LaneOps* lane_ops;      // null: likewise, or caches that they do not take
  int64_t group;    // query heads to a KV head
  int64_t ld;       // stride of rows of d elements
  int64_t q_stride, out_stride;
  float scale;  // log2(e) included
  Item* items = nullptr;
  const Item* items_end = nullptr;
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
  int64_t rows(const Item& item) const { return (item.token_end - item.token_begin) * group; }
  bool lanes(const Item& item) const { return lane_ops && rows(item) >= kLeastLaneRows && rows(item) <= kLaneRows; }
  bool streams(const Item& item) const { return rows(item) <= kStreamRows && !lanes(item); }
  bool narrow(const Item& item) const {
    return narrow_ops && narrow_ops->takes(layout.dtype, static_cast<int>(rows(item)), d());
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

// The slots each token of an item sees, clipped to the item's: [begin, end), both ascending.
void visible_slots(const Job& job, Item& item, int64_t* begin, int64_t* end) {
  const AttentionSequence& s = job.sequences[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  int64_t lo = item.slot_begin;
  item.pairs = 0;
  int64_t see = 0, same = item.token_begin;  // the end of tokens before `same`
  for (int64_t t = item.token_begin; t < item.token_end; ++t) {
    if (job.shape.window > 0) lo = first_visible(job.layout, head, lo, s.first_position + t, job.shape.window);
    const int64_t b = std::min(lo, item.slot_end);
    if (t == same) {
      see = job.end(s, head, t);
      same = job.shape.block > 1 && job.shape.causal ? see - (head.length - s.tokens) : t + 1;
    }
    const int64_t e = std::max(b, std::min(item.slot_end, see));
    *begin++ = b;
    *end++ = e;
    item.pairs += (e - b) * job.group;
  }
}

// The columns of a tile at `slot` that rows [row, row + n) see; rows are tokens x group.
void row_ranges(const int64_t* begin, const int64_t* end, int64_t row, int64_t n, int64_t group, int64_t slot,
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

// What an item takes from its thread's workspace; 64 bytes for each part cover the alignment.
int64_t workspace_bytes(const Job& job, const Item& item) {
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item), element = job.tile.element;
  if (job.lanes(item))
    return 12 * 64 + kLaneRows * (job.d() * 2 + job.ld * 4 + 16) + kLanePairs * (kLaneRows + job.d()) * 4 + tokens * 16;
  if (job.streams(item)) {
    const auto m = static_cast<int>(rows);
    const int64_t query = job.narrow(item) ? job.narrow_ops->query_bytes(job.layout.dtype, m, job.d()) : 0;
    return 14 * 64 + rows * (2 * job.ld * 4 + kStreamTile * 6 + 160) + query + tokens * 16;
  }
  return 14 * 64 + rows * (job.ld * (element + 4) + 8) + 3 * kKeyTile * job.ld * element + kRowBlock * kKeyTile * 8 +
         kRowBlock * 12 + tokens * 16;
}

// Divides the sums by the softmax's denominator, or leaves all three for the merge.
void finish(const Job& job, const Item& item, const float* sums, const float* max, const float* total) {
  const AttentionSequence& s = job.sequences[static_cast<size_t>(item.sequence)];
  const int64_t rows = job.rows(item);
  if (item.partial >= 0) {
    float* p = job.partials + item.partial;
    std::copy_n(sums, rows * job.ld, p);
    std::copy_n(max, rows, p + rows * job.ld);
    std::copy_n(total, rows, p + rows * (job.ld + 1));
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = item.token_begin + i / job.group, j = i % job.group;
    job.ops.scale_row(sums + i * job.ld, 1.0f / total[i], job.d(), job.output(s, item.head, token) + j * job.d());
    if (float* lse = job.lse(s, item.head, token)) lse[j] = (max[i] + std::log2(total[i])) * kLn2;
  }
}

void blocked_item(Context& ctx, const Job& job, Item& item, int thread) {
  const AttentionSequence& s = job.sequences[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  const TileOps& tile = job.tile;
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item);
  const int64_t d = job.d(), ld = job.ld, element = tile.element;
  Carver carve(ctx.workspace<std::byte>(thread, static_cast<size_t>(workspace_bytes(job, item))));
  auto* q = carve.take<std::byte>(rows * ld * element);
  auto* sums = carve.take<float>(rows * ld);
  auto* max = carve.take<float>(rows);
  auto* total = carve.take<float>(rows);
  auto* begin = carve.take<int64_t>(tokens);
  auto* end = carve.take<int64_t>(tokens);
  auto* unpacked = carve.take<std::byte>(kKeyTile * ld * element);
  auto* keys = carve.take<std::byte>(kKeyTile * ld * element);
  auto* values = carve.take<std::byte>(kKeyTile * ld * element);
  auto* scores = carve.take<float>(kRowBlock * kKeyTile);
  auto* p = element == 4 ? scores : carve.take<float>(kRowBlock * kKeyTile);
  auto* shrink = carve.take<float>(kRowBlock);
  auto* row_begin = carve.take<int32_t>(kRowBlock);
  auto* row_end = carve.take<int32_t>(kRowBlock);

  // Rows are ordered by token, then query head, so that a row block spans few tokens and the
  // diagonal wastes little.
  for (int64_t t = 0; t < tokens; ++t)
    tile.rows(DType::kF32, job.query(s, item.head, item.token_begin + t), nullptr, job.group, job.d(),
              q + t * job.group * ld * element, ld);
  std::fill_n(sums, rows * ld, 0.0f);
  std::fill_n(max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(total, rows, 0.0f);
  visible_slots(job, item, begin, end);

  const int64_t last = end[tokens - 1];
  for (int64_t slot = begin[0] / kKeyTile * kKeyTile; slot < last; slot += kKeyTile) {
    const int64_t slot_end = std::min(slot + kKeyTile, last);
    bool packed = false;
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t n = std::min<int64_t>(kRowBlock, rows - row);
      const int64_t lo = begin[row / job.group], hi = end[(row + n - 1) / job.group];
      if (lo >= slot_end || hi <= slot) continue;
      if (!packed) {
        load_tile_rows(tile, job.layout, head, KvPart::kKeys, slot, slot_end, unpacked, ld);
        tile.pack_keys(unpacked, ld, job.d(), keys);
        load_tile_rows(tile, job.layout, head, KvPart::kValues, slot, slot_end, unpacked, ld);
        tile.pack_values(unpacked, ld, job.d(), values);
        packed = true;
      }
      row_ranges(begin, end, row, n, job.group, slot, kKeyTile, row_begin, row_end);
      const auto from = static_cast<int>(std::max<int64_t>(0, lo - slot) / kPad * kPad);
      const auto to = static_cast<int>(round_up(std::min(slot_end, hi) - slot, kPad));
      const auto m = static_cast<int>(n);
      const std::byte* queries = q + row * ld * element;
      tile.scores(queries, ld, keys + from * tile.key_depth(job.d()) * element, job.d(), m, to - from, scores + from,
                  kKeyTile);
      tile.softmax({scores, kKeyTile, m, row_begin, row_end, from, to, job.scale, max + row, total + row, shrink, p});
      tile.values(p, kKeyTile, values, from, to - from, m, static_cast<int>(d), shrink, sums + row * ld, ld);
    }
  }
  finish(job, item, sums, max, total);
}

// Slots whose scores a streaming item holds at a time, whole pages if they fit. Over int8 with several query rows the
// products decide, and what surrounds them is less for more slots at a time; but what lies between a line's request
// and its use must fit in L1. Over bf16 memory decides, and it wants its own order.
int64_t tile_slots(const Job& job, const Item& item) {
  int64_t slots = kLeastStreamTile;
  if (job.layout.dtype == DType::kI8 && job.narrow(item) && job.rows(item) > 2) {
    const int64_t bytes = job.rows(item) > 4 ? 12 * 1024 : 4 * 1024;  // of keys
    slots = std::clamp(bytes / static_cast<int64_t>(job.pages.row_bytes), kLeastStreamTile, kWideStreamTile);
  }
  slots = slots / kLeastStreamTile * kLeastStreamTile;
  return std::min(round_up(slots, job.layout.page_slots), kStreamTile);
}

// Walks ahead of a streaming item, in the order in which it and the next items, which are most often this thread's
// too, read their pages: the keys of a tile's pages, then their values. (Over pages larger than a tile it is too fast.)
class Ahead {
 public:
  Ahead(const Job& job, const Item& item, int64_t slot) : job_(job) {
    enter(&item, slot);
    // A tile's values are read together, so the last of them must be on its way before the last keys are used.
    const int64_t steps = std::max<int64_t>(job.fetch_steps, tile_pages_ > 1 ? tile_pages_ + 1 : 0);
    for (int64_t i = 0; i < steps; ++i) step();
  }
  // The stretch after the one of the call before; null: nothing follows. Its lines are asked for on the way; its
  // scales lie apart and are few.
  const std::byte* next() {
    if (!item_) return nullptr;
    const std::byte* page = pages_[page_];
    __builtin_prefetch(pages_ + page_ + kPagesAhead);
    const PageMap& map = job_.pages;
    const std::byte* scales = page + map.scales[part_];
    for (uint32_t i = 0; map.scaled && i < map.slots; i += 16) __builtin_prefetch(scales + i * 4);
    const std::byte* codes = page + map.codes[part_];
    step();
    return codes;
  }

 private:
  void enter(const Item* item, int64_t slot) {
    item_ = item;
    const auto slots = job_.pages.slots;
    tile_pages_ = static_cast<uint32_t>(std::max<int64_t>(1, tile_slots(job_, *item) / slots));
    pages_ = job_.sequences[static_cast<size_t>(item->sequence)].heads[item->head].pages;
    part_ = 0;
    page_ = tile_ = static_cast<uint32_t>(slot) / slots;
    end_ = (static_cast<uint32_t>(item->slot_end) + slots - 1) / slots;
    tile_end_ = std::min(end_, (page_ / tile_pages_ + 1) * tile_pages_);
  }
  void step() {
    if (!item_ || ++page_ < tile_end_) return;
    part_ = 1 - part_;
    if (part_ == 1) {
      page_ = tile_;
      return;
    }
    tile_ = page_;
    tile_end_ = std::min(end_, tile_ + tile_pages_);
    if (page_ < end_) return;
    ++item_;
    if (item_ == job_.items_end || !job_.streams(*item_) || item_->slot_begin >= item_->slot_end)
      item_ = nullptr;
    else
      enter(item_, item_->slot_begin);
  }

  // Their addresses are in memory, too: two lines on.
  static constexpr int kPagesAhead = 16;

  const Job& job_;
  const Item* item_;  // null: nothing is left
  const std::byte* const* pages_;
  uint32_t tile_pages_, tile_, tile_end_, end_;  // all in pages
  uint32_t page_, part_;
};

void streaming_item(Context& ctx, const Job& job, Item& item, int thread) {
  const AttentionSequence& s = job.sequences[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item), ld = job.ld;
  Carver carve(ctx.workspace<std::byte>(thread, static_cast<size_t>(workspace_bytes(job, item))));
  auto* q = carve.take<float>(rows * ld);
  auto* sums = carve.take<float>(rows * ld);
  auto* scores = carve.take<float>(rows * kStreamTile);
  auto* max = carve.take<float>(rows);
  auto* total = carve.take<float>(rows);
  auto* shrink = carve.take<float>(rows);
  auto* row_begin = carve.take<int32_t>(rows);
  auto* row_end = carve.take<int32_t>(rows);
  auto* begin = carve.take<int64_t>(tokens);
  auto* end = carve.take<int64_t>(tokens);
  const auto m = static_cast<int>(rows);
  const DType dtype = job.layout.dtype;
  const NarrowOps* narrow = job.narrow(item) ? job.narrow_ops : nullptr;
  auto* narrow_q = carve.take<std::byte>(narrow ? narrow->query_bytes(dtype, m, job.d()) : 0);
  // Probabilities in bf16 pairs lie apart from the scores.
  const bool pairs = narrow && dtype == DType::kBF16;
  auto* narrow_p = carve.take<uint16_t>(pairs ? rows * kStreamTile : 0);
  auto* narrow_total = carve.take<float>(narrow ? rows * 16 : 0);
  auto* largest = carve.take<float>(narrow ? rows * 16 : 0);

  for (int64_t t = 0; t < tokens; ++t)
    job.ops.f32.rows(DType::kF32, job.query(s, item.head, item.token_begin + t), nullptr, job.group, job.d(),
                     q + t * job.group * ld, ld);
  if (narrow) narrow->prepare(dtype, q, ld, m, job.d(), narrow_q);
  std::fill_n(sums, rows * ld, 0.0f);
  std::fill_n(max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(total, rows, 0.0f);
  visible_slots(job, item, begin, end);

  std::fill_n(narrow_total, narrow ? rows * 16 : 0, 0.0f);
  void* p = pairs ? static_cast<void*>(narrow_p) : scores;
  const int64_t tile = tile_slots(job, item);
  const int64_t last = end[tokens - 1];
  const auto shrink_sums = [&] {
    for (int64_t i = 0; i < rows; ++i)
      if (shrink[i] != 1.0f) job.ops.scale_row(sums + i * ld, shrink[i], ld, sums + i * ld);
  };
  Ahead ahead(job, item, begin[0]);
  for (int64_t slot = begin[0], slot_end; slot < last; slot = slot_end) {
    slot_end = std::min(slot / tile * tile + tile, last);
    for (int64_t at = slot; at < slot_end;) {
      const KvStretch k = stretch(job.pages, head, KvPart::kKeys, at, slot_end);
      const auto count = static_cast<int>(k.count);
      const std::byte* next = ahead.next();
      float* to = scores + (at - slot);
      if (narrow)
        narrow->scores(dtype, k.codes, k.scales, count, job.d(), narrow_q, m, to, kStreamTile, next);
      else
        job.ops.stream_scores(dtype, k.codes, k.scales, count, job.d(), q, ld, m, to, kStreamTile, next);
      at += k.count;
    }
    row_ranges(begin, end, 0, rows, job.group, slot, slot_end - slot, row_begin, row_end);
    const auto to = static_cast<int>(round_up(slot_end - slot, kPad));
    SoftmaxStep step{scores, kStreamTile, m, row_begin, row_end, 0, to, job.scale, max, total, shrink, p};
    if (!narrow) {
      job.ops.f32.softmax(step);
      shrink_sums();
      for (int64_t at = slot; at < slot_end;) {
        const KvStretch v = stretch(job.pages, head, KvPart::kValues, at, slot_end);
        const auto count = static_cast<int>(v.count);
        job.ops.stream_values(dtype, v.codes, v.scales, count, job.d(), scores + (at - slot), kStreamTile, m, sums, ld,
                              ahead.next());
        at += v.count;
      }
      continue;
    }
    SlotRun runs[kStreamTile];
    alignas(64) float weights[kStreamTile];
    int n = 0;
    for (int64_t at = slot; at < slot_end; at += runs[n++].count) {
      const KvStretch v = stretch(job.pages, head, KvPart::kValues, at, slot_end);
      runs[n] = {v.codes, static_cast<int>(v.count), ahead.next()};
      if (v.scales) std::copy_n(v.scales, v.count, weights + (at - slot));
    }
    std::fill(weights + (slot_end - slot), weights + to, 0.0f);
    step.sum = narrow_total;
    step.weights = weights;
    step.largest = largest;
    narrow->softmax(dtype, step);
    shrink_sums();
    narrow->values(dtype, runs, n, job.d(), p, kStreamTile, largest, m, sums, ld);
  }
  if (narrow) {
    narrow->restore(dtype, sums, ld, m, job.d());
    for (int64_t i = 0; i < rows; ++i) {
      const float* lanes = narrow_total + i * 16;
      total[i] = std::accumulate(lanes, lanes + 16, 0.0f);
    }
  }
  finish(job, item, sums, max, total);
}

void lane_item(Context& ctx, const Job& job, Item& item, int thread) {
  const AttentionSequence& s = job.sequences[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item), d = job.d();
  Carver carve(ctx.workspace<std::byte>(thread, static_cast<size_t>(workspace_bytes(job, item))));
  auto* begin = carve.take<int64_t>(tokens);
  auto* end = carve.take<int64_t>(tokens);
  auto* row_begin = carve.take<int32_t>(kLaneRows);
  auto* row_end = carve.take<int32_t>(kLaneRows);
  LaneItem lanes{};
  lanes.rows = static_cast<int>(rows);
  lanes.scale = job.scale;
  lanes.begin = row_begin;
  lanes.end = row_end;
  lanes.q = carve.take<int32_t>(d / 2 * kLaneRows);
  lanes.p = carve.take<int32_t>(kLanePairs * kLaneRows);
  lanes.values = carve.take<int32_t>(kLanePairs * d);
  lanes.max = carve.take<float>(kLaneRows);
  lanes.total = carve.take<float>(kLaneRows);
  auto* sums = carve.take<float>(rows * job.ld);
  lanes.sums = item.partial >= 0 ? job.partials + item.partial : sums;
  lanes.ld = job.ld;

  visible_slots(job, item, begin, end);
  const float* q[kLaneRows];
  float* out[kLaneRows];
  int64_t row = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < job.group; ++j, ++row) {
      row_begin[row] = static_cast<int32_t>(begin[t]);
      row_end[row] = static_cast<int32_t>(end[t]);
      q[row] = job.query(s, item.head, item.token_begin + t) + j * d;
      out[row] = job.output(s, item.head, item.token_begin + t) + j * d;
    }
  for (; row < kLaneRows; ++row) row_begin[row] = row_end[row] = 0;
  lanes.all_begin = static_cast<int32_t>(begin[tokens - 1]);
  lanes.all_end = static_cast<int32_t>(end[0]);
  job.lane_ops->begin(lanes, q, job.d());
  const int64_t last = end[tokens - 1];
  const auto part_of = [&](const KvHeadView& h, KvPart part, int64_t at) { return stretch(job.pages, h, part, at, h.length); };
  for (int64_t slot = begin[0]; slot < last;) {
    const KvStretch k = part_of(head, KvPart::kKeys, slot), v = part_of(head, KvPart::kValues, slot);
    const int64_t count = std::min(k.count, last - slot), after = slot + count;
    // Most often this thread's next item begins where this one ends, or with the next head.
    const Item* next = &item + 1;
    const KvHeadView* other = &head;
    int64_t at = slot + kLanesAhead;
    if (at >= head.length && next < job.items_end) {
      other = &job.sequences[static_cast<size_t>(next->sequence)].heads[next->head];
      at += next->slot_begin - head.length;
    }
    LaneAhead ahead{};
    if (at < other->length) ahead = {part_of(*other, KvPart::kKeys, at).codes, part_of(*other, KvPart::kValues, at).codes};
    job.lane_ops->add(lanes, k.codes, v.codes, ahead, static_cast<int>(count), job.d(), static_cast<int>(slot));
    slot = after;
  }
  job.lane_ops->end(lanes, job.d());
  if (item.partial >= 0) {
    std::copy_n(lanes.max, rows, lanes.sums + rows * job.ld);
    std::copy_n(lanes.total, rows, lanes.sums + rows * (job.ld + 1));
    return;
  }
  job.lane_ops->divide(lanes, out, job.d());
  for (int64_t i = 0; s.lse && i < rows; ++i)
    job.lse(s, item.head, item.token_begin + i / job.group)[i % job.group] =
        (lanes.max[i] + std::log2(lanes.total[i])) * kLn2;
}

// Puts the chunks of one head together by their log-sum-exp, in the order of their slots.
void merge_chunks(const Job& job, const Merge& merge) {
  const Item& item = job.items[merge.first];
  const AttentionSequence& s = job.sequences[static_cast<size_t>(item.sequence)];
  const int64_t rows = job.rows(item), ld = job.ld, d = job.d();
  const float* base = job.partials + item.partial;
  const int64_t step = job.partial_size(rows);
  // Weights of rows by chunks, then one over their sum; groups of rows, as a call has no workspace for all.
  constexpr int64_t kRows = 16;
  float weight[kMaxChunks * kRows], top[kRows], all[kRows];
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t n = std::min(kRows, rows - first);
    const float* max = base + rows * ld + first;
    const float* total = max + rows;
    for (int64_t i = 0; i < n; ++i) {
      top[i] = max[i];
      all[i] = 0;
      for (int64_t c = 1; c < merge.chunks; ++c) top[i] = std::max(top[i], max[c * step + i]);
      // A chunk that this row sees nothing of has maximum -inf and no sum.
      for (int64_t c = 0; c < merge.chunks; ++c)
        weight[c * n + i] = total[c * step + i] > 0 ? max[c * step + i] - top[i] : -std::numeric_limits<float>::infinity();
    }
    job.ops.exponentials(weight, merge.chunks * n, 1.0f, 0.0f, weight);
    for (int64_t c = 0; c < merge.chunks; ++c)
      for (int64_t i = 0; i < n; ++i) all[i] += total[c * step + i] * weight[c * n + i];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = item.token_begin + (first + i) / job.group, j = (first + i) % job.group;
      float* out = job.output(s, item.head, token) + j * d;
      if (float* lse = job.lse(s, item.head, token)) lse[j] = (top[i] + std::log2(all[i])) * kLn2;
      const float* sums = base + (first + i) * ld;
      job.ops.scale_row(sums, weight[i] / all[i], d, out);
      for (int64_t c = 1; c < merge.chunks; ++c) job.ops.add_row(sums + c * step, weight[c * n + i] / all[i], d, out);
    }
  }
}

// Lists the items of a call; counts only while `items` is null. The split depends on each sequence
// alone, never on the threads or the other sequences.
struct Plan {
  int64_t items = 0, merges = 0, partials = 0;
  int64_t workspace = 0;  // the most that any item takes
};
Plan plan(const Job& job, Item* items, Merge* merges) {
  Plan n;
  const auto add = [&](const Item& item) {
    if (items) items[n.items] = item;
    ++n.items;
    n.workspace = std::max(n.workspace, workspace_bytes(job, item));
  };
  for (size_t q = 0; q < job.sequences.size(); ++q) {
    const AttentionSequence& s = job.sequences[q];
    if (s.tokens == 0) continue;
    const bool lanes = job.lane_ops && job.group <= kLaneRows && s.tokens * job.group <= kMostLaneRows;
    const int64_t block = std::max<int64_t>(1, (lanes ? kLaneRows : kBlockRows) / job.group),
                  blocks = (s.tokens + block - 1) / block;
    // Late blocks see most keys; they go first so that the threads end together.
    for (int64_t b = blocks - 1; b >= 0; --b)
      for (int64_t g = 0; g < job.shape.kv_heads; ++g) {
        const KvHeadView& head = s.heads[g];
        const int64_t t0 = b * block, t1 = std::min(s.tokens, t0 + block);
        const int64_t end = job.end(s, head, t1 - 1);
        const int64_t begin =
            first_visible(job.layout, head, 0, s.first_position + t0, job.shape.window) / kKeyTile * kKeyTile;
        Item item{static_cast<int64_t>(q), g, t0, t1, begin, end, -1, -1, 0};
        const int64_t least = std::max(kChunkSlots, kChunkBytes / static_cast<int64_t>(job.pages.row_bytes));
        int64_t chunk = round_up(std::max(least, (end - begin) / kMaxChunks), kChunkSlots);
        if (job.lanes(item) && end - begin >= kLeastHalves)
          chunk = std::min(chunk, round_up((end - begin + 1) / 2, kLaneRows));
        if ((blocks > 1 && !job.lanes(item)) || end - begin <= chunk) {
          add(item);
          continue;
        }
        const int64_t chunks = (end - begin + chunk - 1) / chunk;
        if (merges) merges[n.merges] = {n.items, chunks, chunks};
        item.merge = n.merges++;
        for (int64_t c = begin; c < end; c += chunk) {
          item.slot_begin = c;
          item.slot_end = std::min(end, c + chunk);
          item.partial = n.partials;
          n.partials += job.partial_size(job.rows(item));
          add(item);
        }
      }
  }
  return n;
}

}  // namespace

void load_tile_rows(const TileOps& ops, const KvLayout& layout, const KvHeadView& head, KvPart part, int64_t begin,
                    int64_t end, void* rows, int64_t ld) {
  const PageMap pages(layout);
  auto* out = static_cast<std::byte*>(rows);
  const int64_t row = ld * ops.element;
  for (int64_t at = begin; at < end;) {
    const KvStretch s = stretch(pages, head, part, at, end);
    ops.rows(layout.dtype, s.codes, s.scales, s.count, layout.head_dim, out + (at - begin) * row, ld);
    at += s.count;
  }
  std::fill(out + (end - begin) * row, out + kKeyTile * row, std::byte{0});
}

int64_t first_visible(const KvLayout& layout, const KvHeadView& head, int64_t from, int64_t position, int64_t window) {
  if (window <= 0) return from;
  // A few steps are enough from one query to the next; the first query's search halves the rest.
  const int64_t after = position - window;
  for (int i = 0; i < 4; ++i, ++from)
    if (from >= head.length || head.position(layout, from) > after) return from;
  int64_t lo = from, hi = head.length;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (head.position(layout, mid) > after)
      hi = mid;
    else
      lo = mid + 1;
  }
  return lo;
}

void attention(Context& ctx, const KvLayout& layout, const AttentionShape& shape,
               std::span<const AttentionSequence> seqs, AttentionCounts& counts) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const TileOps& tile = ctx.activations == ActivationType::kBF16 && ops.bf16 ? *ops.bf16 : ops.f32;
  const int64_t row = static_cast<int64_t>(shape.query_heads) * layout.head_dim;
  const bool lanes = ctx.activations == ActivationType::kBF16 && layout.dtype == DType::kBF16 &&
                     (layout.head_dim == 32 || layout.head_dim == 64 || layout.head_dim == 128);
  Job job{layout,
          PageMap(layout),
          shape,
          seqs,
          ops,
          tile,
          ctx.activations == ActivationType::kBF16 ? ops.narrow : nullptr,
          lanes ? ops.lanes : nullptr,
          shape.query_heads / shape.kv_heads,
          round_up(layout.head_dim, kPad),
          shape.q_stride ? shape.q_stride : row,
          shape.out_stride ? shape.out_stride : row,
          shape.scale * kLog2e};
  const auto stretch_bytes = static_cast<int64_t>(job.pages.row_bytes * job.pages.slots);
  job.fetch_steps = (kFetchAhead + stretch_bytes - 1) / stretch_bytes;
  const Plan size = plan(job, nullptr, nullptr);
  Carver carve(ctx.workspace<std::byte>(
      ctx.shared_slot(), static_cast<size_t>(192 + size.items * static_cast<int64_t>(sizeof(Item)) +
                                             size.merges * static_cast<int64_t>(sizeof(Merge)) + size.partials * 4)));
  job.items = carve.take<Item>(size.items);
  job.items_end = job.items + size.items;
  auto* merges = carve.take<Merge>(size.merges);
  job.partials = carve.take<float>(size.partials);
  plan(job, job.items, merges);

  // All at once: whichever thread takes an item, memory is the same from call to call.
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<std::byte>(t, static_cast<size_t>(size.workspace));

  const auto run = [&](int64_t index, int thread) {
    Item& item = job.items[index];
    if (job.lanes(item))
      lane_item(ctx, job, item, thread);
    else if (job.streams(item))
      streaming_item(ctx, job, item, thread);
    else
      blocked_item(ctx, job, item, thread);
    // Who is done last puts the chunks together.
    if (item.merge >= 0 && std::atomic_ref(merges[item.merge].left).fetch_sub(1, std::memory_order_acq_rel) == 1)
      merge_chunks(job, merges[item.merge]);
  };
  ctx.pool.parallel_runs(size.items, std::ref(run));
  int64_t pairs = 0;
  for (int64_t i = 0; i < size.items; ++i) pairs += job.items[i].pairs;
  counts.pairs += pairs;
}

void merge_attention(Context& ctx, int64_t rows, int64_t d, float* out, float* lse, const float* other,
                     const float* other_lse, float* share) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const int64_t piece = std::max<int64_t>(1, kMergeElements / d);
  const auto body = [&](int64_t index, int) {
    for (int64_t i = index * piece, end = std::min(rows, i + piece); i < end; ++i) {
      const float top = std::max(lse[i], other_lse[i]);
      const float a = std::exp(lse[i] - top), b = std::exp(other_lse[i] - top);
      ops.scale_row(out + i * d, a / (a + b), d, out + i * d);
      ops.add_row(other + i * d, b / (a + b), d, out + i * d);
      lse[i] = top + std::log(a + b);
      if (share) share[i] = a / (a + b);
    }
  };
  ctx.pool.parallel_for((rows + piece - 1) / piece, std::ref(body));
}

}  // namespace lacuna::cpu

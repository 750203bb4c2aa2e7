// Attention of few query rows over keys and values as they lie in their pages: decode, and blocks of latents with a row
// in each lane.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/attention_items.h"

namespace lacuna::cpu {
namespace {

// Slots whose scores a streaming item holds at a time: one page, so that memory is read in the order it
// lies in (15 % faster than the keys of eight pages before their values), but not fewer than are worth a
// softmax step, nor more than kStreamTile, which fit in a sixth of L1 (16 rows * 128 * 4 B = 8 KB).
constexpr int64_t kLeastStreamTile = 32, kWideStreamTile = 128;
// Slots from the one in use to the one that is asked for.
constexpr int64_t kLanesAhead = 32;

// Slots whose scores a streaming item holds at a time, whole pages if they fit. Over int8 with several query rows the
// products decide, and what surrounds them is less for more slots at a time; but what lies between a line's request
// and its use must fit in L1. Over bf16 memory decides, and it wants its own order.
int64_t tile_slots(const AttentionJob& job, const AttentionItem& item) {
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
  Ahead(const AttentionJob& job, Sequences seqs, const AttentionItem& item, int64_t slot) : job_(job), seqs_(seqs) {
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
  void enter(const AttentionItem* item, int64_t slot) {
    item_ = item;
    const auto slots = job_.pages.slots;
    tile_pages_ = static_cast<uint32_t>(std::max<int64_t>(1, tile_slots(job_, *item) / slots));
    pages_ = seqs_[static_cast<size_t>(item->sequence)].heads[item->head].pages;
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

  const AttentionJob& job_;
  Sequences seqs_;
  const AttentionItem* item_;  // null: nothing is left
  const std::byte* const* pages_;
  uint32_t tile_pages_, tile_, tile_end_, end_;  // all in pages
  uint32_t page_, part_;
};

// Rows of scores and probabilities: where heads lie in lanes, seven take the room of eight, and two vectors more.
int64_t tile_rows(int64_t rows) { return rows == 7 ? 8 : rows; }

}  // namespace

int64_t streaming_workspace(const AttentionJob& job, const AttentionItem& item) {
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item);
  const NarrowOps* narrow = job.narrow(item);
  const int64_t query = narrow ? narrow->query_bytes(job.layout.dtype, static_cast<int>(rows), job.d()) : 0;
  return 16 * 64 + rows * (2 * job.ld * 4 + 160) + tile_rows(rows) * kStreamTile * 6 + query + tokens * 16;
}

int64_t streaming_item(Context& ctx, const AttentionJob& job, Sequences seqs, const AttentionItem& item, int thread) {
  const AttentionSequence& s = seqs[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item), ld = job.ld;
  Carver carve(ctx.workspace<std::byte>(thread, static_cast<size_t>(streaming_workspace(job, item))));
  auto* q = carve.take<float>(rows * ld);
  auto* sums = carve.take<float>(rows * ld);
  auto* scores = carve.take<float>(tile_rows(rows) * kStreamTile + 32);
  auto* max = carve.take<float>(rows);
  auto* total = carve.take<float>(rows);
  auto* shrink = carve.take<float>(rows);
  auto* row_begin = carve.take<int32_t>(rows);
  auto* row_end = carve.take<int32_t>(rows);
  auto* begin = carve.take<int64_t>(tokens);
  auto* end = carve.take<int64_t>(tokens);
  const auto m = static_cast<int>(rows);
  const DType dtype = job.layout.dtype;
  const NarrowOps* narrow = job.narrow(item);
  auto* narrow_q = carve.take<std::byte>(narrow ? narrow->query_bytes(dtype, m, job.d()) : 0);
  // Probabilities in bf16 or digits lie apart from the scores.
  auto* narrow_p = carve.take<uint16_t>(narrow ? tile_rows(rows) * kStreamTile : 0);
  auto* narrow_total = carve.take<float>(narrow ? rows * 16 : 0);
  auto* digit_scale = carve.take<float>(narrow ? rows : 0);

  for (int64_t t = 0; t < tokens; ++t)
    job.ops.f32.rows(DType::kF32, job.query(s, item.head, item.token_begin + t), nullptr, job.group, job.d(),
                     q + t * job.group * ld, ld);
  if (narrow) narrow->prepare(dtype, q, ld, m, job.d(), narrow_q);
  std::fill_n(sums, rows * ld, 0.0f);
  std::fill_n(max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(total, rows, 0.0f);
  const int64_t pairs = visible_slots(job, s, item, begin, end);

  std::fill_n(narrow_total, narrow ? rows * 16 : 0, 0.0f);
  void* p = narrow ? static_cast<void*>(narrow_p) : scores;
  const int64_t tile = tile_slots(job, item);
  const int64_t last = end[tokens - 1];
  const auto shrink_sums = [&] {
    for (int64_t i = 0; i < rows; ++i)
      if (shrink[i] != 1.0f) job.ops.scale_row(sums + i * ld, shrink[i], ld, sums + i * ld);
  };
  Ahead ahead(job, seqs, item, begin[0]);
  SlotRun runs[kStreamTile];
  const auto runs_of = [&](KvPart part, int64_t from, int64_t to) {
    // As stretch() finds them, but with one division for all.
    const PageMap& map = job.pages;
    const auto p = static_cast<size_t>(part);
    const auto first = static_cast<uint32_t>(from);
    auto left = static_cast<uint32_t>(to - from);
    int n = 0;
    for (uint32_t page = first / map.slots, at = first % map.slots; left > 0; ++page, at = 0) {
      const std::byte* base = head.pages[page];
      const uint32_t count = std::min(map.slots - at, left);
      left -= count;
      runs[n++] = {base + map.codes[p] + at * map.row_bytes, reinterpret_cast<const float*>(base + map.scales[p]) + at,
                   static_cast<int>(count), ahead.next()};
    }
    return n;
  };
  int64_t seen = 0;  // columns of the last tile, if all rows saw all of them
  // Runs that begin within a page begin with it in whole steps of kHeadSlots: what comes before is not seen.
  const int64_t step_slots = narrow && narrow == job.head_ops ? kHeadSlots : 1;
  for (int64_t slot = begin[0] / step_slots * step_slots, slot_end; slot < last; slot = slot_end) {
    slot_end = std::min(slot / tile * tile + tile, last);
    const int keys = runs_of(KvPart::kKeys, slot, slot_end);
    if (narrow) {
      narrow->scores(dtype, runs, keys, job.d(), narrow_q, m, scores, kStreamTile);
    } else {
      float* at = scores;
      for (const SlotRun* k = runs; k < runs + keys; at += k++->count)
        job.ops.stream_scores(dtype, k->codes, k->scales, k->count, job.d(), q, ld, m, at, kStreamTile, k->next);
    }
    // Most tiles are seen as the one before.
    const bool all = begin[tokens - 1] <= slot && end[0] >= slot_end;
    if (!all || seen != slot_end - slot) {
      row_ranges(begin, end, 0, rows, job.group, slot, slot_end - slot, row_begin, row_end);
      seen = all ? slot_end - slot : 0;
    }
    const auto to = static_cast<int>(round_up(slot_end - slot, kPad));
    SoftmaxStep step{scores, kStreamTile, m, row_begin, row_end, 0, to, job.scale, max, total, shrink, p};
    if (!narrow) {
      job.ops.f32.softmax(step);
      shrink_sums();
      const int n = runs_of(KvPart::kValues, slot, slot_end);
      float* at = scores;
      for (const SlotRun* v = runs; v < runs + n; at += v++->count)
        job.ops.stream_values(dtype, v->codes, v->scales, v->count, job.d(), at, kStreamTile, m, sums, ld, v->next);
      continue;
    }
    const int n = runs_of(KvPart::kValues, slot, slot_end);
    step.sum = narrow_total;
    step.digit_scale = digit_scale;
    narrow->softmax(dtype, step, runs, n);
    shrink_sums();
    narrow->values(dtype, runs, n, job.d(), p, digit_scale, m, sums, ld);
  }
  if (narrow) {
    narrow->restore(dtype, sums, ld, m, job.d());
    for (int64_t i = 0; i < rows; ++i) {
      const float* lanes = narrow_total + i * 16;
      total[i] = std::accumulate(lanes, lanes + 16, 0.0f);
    }
  }
  finish(job, s, item, sums, max, total);
  return pairs;
}

int64_t lane_workspace(const AttentionJob& job, const AttentionItem& item) {
  const int64_t tokens = item.token_end - item.token_begin;
  return 12 * 64 + kLaneRows * (job.d() * 2 + job.ld * 4 + 16) + kLanePairs * (kLaneRows + job.d()) * 4 + tokens * 16;
}

int64_t lane_item(Context& ctx, const AttentionJob& job, Sequences seqs, const AttentionItem& item, int thread) {
  const AttentionSequence& s = seqs[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item), d = job.d();
  Carver carve(ctx.workspace<std::byte>(thread, static_cast<size_t>(lane_workspace(job, item))));
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

  const int64_t pairs = visible_slots(job, s, item, begin, end);
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
  const auto part_of = [&](const KvHeadView& h, KvPart part, int64_t at) {
    return stretch(job.pages, h, part, at, h.length);
  };
  for (int64_t slot = begin[0]; slot < last;) {
    const KvStretch k = part_of(head, KvPart::kKeys, slot), v = part_of(head, KvPart::kValues, slot);
    const int64_t count = std::min(k.count, last - slot), after = slot + count;
    // In a call of attention() this thread's next item most often begins where this one ends, or with the next head.
    const AttentionItem* next = &item + 1;
    const KvHeadView* other = &head;
    int64_t at = slot + kLanesAhead;
    if (at >= head.length && next < job.items_end) {
      other = &seqs[static_cast<size_t>(next->sequence)].heads[next->head];
      at += next->slot_begin - head.length;
    }
    LaneAhead ahead{};
    if (at < other->length)
      ahead = {part_of(*other, KvPart::kKeys, at).codes, part_of(*other, KvPart::kValues, at).codes};
    job.lane_ops->add(lanes, k.codes, v.codes, ahead, static_cast<int>(count), job.d(), static_cast<int>(slot));
    slot = after;
  }
  job.lane_ops->end(lanes, job.d());
  if (item.partial >= 0) {
    std::copy_n(lanes.max, rows, lanes.sums + rows * job.ld);
    std::copy_n(lanes.total, rows, lanes.sums + rows * (job.ld + 1));
    return pairs;
  }
  job.lane_ops->divide(lanes, out, job.d());
  for (int64_t i = 0; s.lse && i < rows; ++i)
    job.lse(s, item.head, item.token_begin + i / job.group)[i % job.group] =
        (lanes.max[i] + std::log2(lanes.total[i])) * kLn2;
  return pairs;
}

}  // namespace lacuna::cpu

#include "kernels/cpu/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/cpu/attention_items.h"

namespace lacuna::cpu {
namespace {

// Query rows (tokens x query heads of a group) of one blocked item. Its packed queries and sums
// (2 * 384 * 64 * 4 B = 192 KB at d = 64) share L2 with the key tile, and packing a tile costs about a
// hundredth of what 384 rows do with it.
constexpr int64_t kBlockRows = 384;
// How far ahead of its use a stretch is asked for at least. Measured: nearer, a read from memory is still on
// its way when it is needed; farther loses more requests than it gains time (bench/NOTES-attention.md).
constexpr int64_t kFetchAhead = 12 * 1024;
// Slots of a chunk where the keys of few queries are split among threads, or so many that the keys are 256 KB: as much
// again of values, 20 us or more against 1 us that an item takes besides. No more than 32 chunks a head, which
// bounds the partial results.
constexpr int64_t kChunkSlots = 1024, kChunkBytes = 256 * 1024;
constexpr int64_t kMaxChunks = 32;
// Query rows of a sequence that are cut into items of kLaneRows: more are worth packing keys for.
constexpr int64_t kMostLaneRows = 64;
// Slots of such an item that are worth two, if it is the last head of an odd number, which so divides among two threads.
constexpr int64_t kLeastHalves = 64;
// Elements of a piece of merge_attention: a few microseconds.
constexpr int64_t kMergeElements = 16384;

int64_t blocked_workspace(const AttentionJob& job, const AttentionItem& item) {
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item), element = job.tile.element;
  return 14 * 64 + rows * (job.ld * (element + 4) + 8) + 3 * kKeyTile * job.ld * element + kRowBlock * kKeyTile * 8 +
         kRowBlock * 12 + tokens * 16;
}

int64_t blocked_item(Context& ctx, const AttentionJob& job, Sequences seqs, const AttentionItem& item, int thread) {
  const AttentionSequence& s = seqs[static_cast<size_t>(item.sequence)];
  const KvHeadView& head = s.heads[item.head];
  const TileOps& tile = job.tile;
  const int64_t tokens = item.token_end - item.token_begin, rows = job.rows(item);
  const int64_t d = job.d(), ld = job.ld, element = tile.element;
  Carver carve(ctx.workspace<std::byte>(thread, static_cast<size_t>(blocked_workspace(job, item))));
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
  const int64_t pairs = visible_slots(job, s, item, begin, end);

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
  finish(job, s, item, sums, max, total);
  return pairs;
}

// Puts the chunks of one head together by their log-sum-exp, in the order of their slots.
void merge_chunks(const AttentionJob& job, Sequences seqs, const AttentionMerge& merge) {
  const AttentionItem& item = job.items[merge.first];
  const AttentionSequence& s = seqs[static_cast<size_t>(item.sequence)];
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
        weight[c * n + i] =
            total[c * step + i] > 0 ? max[c * step + i] - top[i] : -std::numeric_limits<float>::infinity();
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

int64_t workspace_bytes(const AttentionJob& job, const AttentionItem& item) {
  if (job.lanes(item)) return lane_workspace(job, item);
  return job.streams(item) ? streaming_workspace(job, item) : blocked_workspace(job, item);
}

// Lists the items of a call; counts only while `items` is null. The split depends on each sequence
// alone, never on the threads or the other sequences.
struct Plan {
  int64_t items = 0, merges = 0, partials = 0;
  int64_t workspace = 0;  // the most that any item takes
};
Plan plan(const AttentionJob& job, Sequences seqs, AttentionItem* items, AttentionMerge* merges) {
  Plan n;
  const auto add = [&](const AttentionItem& item) {
    if (items) items[n.items] = item;
    ++n.items;
    n.workspace = std::max(n.workspace, workspace_bytes(job, item));
  };
  for (size_t q = 0; q < seqs.size(); ++q) {
    const AttentionSequence& s = seqs[q];
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
        AttentionItem item{static_cast<int64_t>(q), g, t0, t1, begin, end, -1, -1};
        const int64_t least = std::max(kChunkSlots, kChunkBytes / static_cast<int64_t>(job.pages.row_bytes));
        int64_t chunk = round_up(std::max(least, (end - begin) / kMaxChunks), kChunkSlots);
        const bool last_of_odd = job.shape.kv_heads % 2 == 1 && g + 1 == job.shape.kv_heads;
        if (last_of_odd && job.lanes(item) && end - begin >= kLeastHalves)
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

void finish(const AttentionJob& job, const AttentionSequence& s, const AttentionItem& item, const float* sums,
            const float* max, const float* total) {
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

AttentionRun::AttentionRun(Context& ctx, const KvLayout& layout, const AttentionShape& shape,
                           std::span<const AttentionSequence> seqs)
    : ctx_(&ctx) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const bool pairs = ctx.activations == ActivationType::kBF16 && ops.bf16 && has_fast_bf16_pairs();
  const TileOps& tile = pairs ? *ops.bf16 : ops.f32;
  const int64_t row = static_cast<int64_t>(shape.query_heads) * layout.head_dim;
  const bool lanes = ctx.activations == ActivationType::kBF16 && layout.dtype == DType::kBF16 &&
                     (layout.head_dim == 32 || layout.head_dim == 64 || layout.head_dim == 128);
  const bool heads = ctx.activations == ActivationType::kBF16 && layout.page_slots % kHeadSlots == 0;
  job_ = std::make_unique<AttentionJob>(AttentionJob{
      layout, PageMap(layout), shape, ops, tile, ctx.activations == ActivationType::kBF16 ? ops.narrow : nullptr,
      heads ? ops.heads : nullptr, lanes ? ops.lanes : nullptr, shape.query_heads / shape.kv_heads,
      round_up(layout.head_dim, kPad), shape.q_stride ? shape.q_stride : row, shape.out_stride ? shape.out_stride : row,
      shape.scale * kLog2e});
  AttentionJob& job = *job_;
  const auto stretch_bytes = static_cast<int64_t>(job.pages.row_bytes * job.pages.slots);
  job.fetch_steps = (kFetchAhead + stretch_bytes - 1) / stretch_bytes;
  const Plan size = plan(job, seqs, nullptr, nullptr);
  Carver carve(ctx.workspace<std::byte>(
      ctx.shared_slot(),
      static_cast<size_t>(192 + size.items * static_cast<int64_t>(sizeof(AttentionItem)) +
                          size.merges * static_cast<int64_t>(sizeof(AttentionMerge)) + size.partials * 4)));
  job.items = carve.take<AttentionItem>(size.items);
  job.items_end = job.items + size.items;
  job.merges = carve.take<AttentionMerge>(size.merges);
  job.partials = carve.take<float>(size.partials);
  plan(job, seqs, job.items, job.merges);

  // All at once: whichever thread takes an item, memory is the same from call to call.
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<std::byte>(t, static_cast<size_t>(size.workspace));
}

AttentionRun::~AttentionRun() = default;

int64_t AttentionRun::items() const { return job_->items_end - job_->items; }

int64_t AttentionRun::first_item(int64_t sequence) const {
  const AttentionItem* items = job_->items;
  return std::lower_bound(items, job_->items_end, sequence,
                          [](const AttentionItem& item, int64_t s) { return item.sequence < s; }) -
         items;
}

int64_t AttentionRun::item(std::span<const AttentionSequence> seqs, int64_t index, int thread) {
  const AttentionJob& job = *job_;
  const AttentionItem& item = job.items[index];
  const auto run = job.lanes(item) ? lane_item : job.streams(item) ? streaming_item : blocked_item;
  const int64_t pairs = run(*ctx_, job, seqs, item, thread);
  // Who is done last puts the chunks together, and leaves the count for the next layer's.
  if (item.merge >= 0) {
    AttentionMerge& merge = job.merges[item.merge];
    if (std::atomic_ref(merge.left).fetch_sub(1, std::memory_order_acq_rel) == 1) {
      merge_chunks(job, seqs, merge);
      std::atomic_ref(merge.left).store(merge.chunks, std::memory_order_relaxed);
    }
  }
  return pairs;
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

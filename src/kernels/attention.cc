#include "kernels/attention.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>

#include "base/error.h"
#include "kernels/cpu/attention_cpu.h"
#include "kernels/cpu/kv_pages.h"

namespace lacuna {
namespace {

void check_layout(const char* op, const KvLayout& l) {
  if (l.dtype != DType::kF32 && l.dtype != DType::kBF16 && l.dtype != DType::kI8)
    throw Unsupported("{}: a KV cache of {} cannot be used; expected f32, bf16 or int8", op, dtype_name(l.dtype));
  if (l.head_dim < 1 || l.head_dim > 65536) throw BadInput("{}: head_dim is {}; expected 1 to 65536", op, l.head_dim);
  if (l.page_slots < 1) throw BadInput("{}: page_slots is {}; expected 1 or more", op, l.page_slots);
}

void check_head(const char* op, const KvHeadView& head, int64_t at_least) {
  if (head.length < at_least)
    throw BadInput("{}: a KV head holds {} slots; expected {} or more, for as many new tokens", op, head.length,
                   at_least);
  if (head.length > 0 && !head.pages) throw BadInput("{}: a KV head of {} slots has no pages", op, head.length);
}

void check_positions(const char* op, int64_t first, int64_t tokens) {
  if (tokens < 0) throw BadInput("{}: {} tokens; expected 0 or more", op, tokens);
  if (first < 0 || first > std::numeric_limits<int32_t>::max() - tokens)
    throw BadInput("{}: positions {} to {} do not fit in 31 bits", op, first, first + tokens);
}

// Scale and window of a softmax; a scale that is not a positive number has no maximum to subtract.
void check_softmax(const char* op, float scale, int64_t window) {
  if (!(scale > 0) || scale > std::numeric_limits<float>::max())
    throw BadInput("{}: scale is {}; expected a positive number", op, scale);
  if (window < 0) throw BadInput("{}: window is {}; expected 0 (all) or more", op, window);
}

int64_t check_stride(const char* op, const char* name, int64_t stride, int64_t row) {
  if (stride == 0) return row;
  if (stride < row) throw BadInput("{}: {} is {}; a row has {} elements", op, name, stride, row);
  return stride;
}

// Bytes of the slots from the first that any query sees on, each once.
int64_t kv_bytes(const KvLayout& l, const KvHeadView& head, int64_t first_position, int64_t window, bool values) {
  const int64_t slots = head.length - cpu::first_visible(l, head, 0, first_position, window);
  const int64_t row = l.head_dim * static_cast<int64_t>(dtype_size(l.dtype)) + (l.dtype == DType::kI8 ? 4 : 0);
  return slots * row * (values ? 2 : 1);
}

// Checks a call's operands; its query tokens.
int64_t check_attention(const KvLayout& layout, const AttentionShape& shape, std::span<const AttentionSequence> seqs) {
  constexpr const char* kOp = "attention";
  check_layout(kOp, layout);
  if (shape.kv_heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.kv_heads != 0)
    throw BadInput("{}: {} query heads over {} KV heads; expected a whole number of query heads to a KV head", kOp,
                   shape.query_heads, shape.kv_heads);
  check_softmax(kOp, shape.scale, shape.window);
  if (!shape.causal && shape.window > 0)
    throw BadInput("{}: a window of {} in a call that is not causal; expected 0", kOp, shape.window);
  if (shape.block < 1) throw BadInput("{}: blocks of {} positions; expected 1 or more", kOp, shape.block);
  if (shape.block > 1 && (shape.window > 0 || !shape.causal))
    throw BadInput(
        "{}: blocks of {} positions with a window of {} in a call that is {}causal; expected a causal call "
        "without a window",
        kOp, shape.block, shape.window, shape.causal ? "" : "not ");
  const int64_t row = static_cast<int64_t>(shape.query_heads) * layout.head_dim;
  check_stride(kOp, "q_stride", shape.q_stride, row);
  check_stride(kOp, "out_stride", shape.out_stride, row);
  int64_t tokens = 0;
  for (const AttentionSequence& s : seqs) {
    check_positions(kOp, s.first_position, s.tokens);
    if (s.tokens == 0) continue;
    if (!s.q || !s.out || !s.heads) throw BadInput("{}: a sequence of {} tokens lacks q, out or heads", kOp, s.tokens);
    for (int g = 0; g < shape.kv_heads; ++g) check_head(kOp, s.heads[g], shape.causal ? s.tokens : 1);
    tokens += s.tokens;
  }
  return tokens;
}

// What a call reports, but for its products and time.
OpRecord record_of(const KvLayout& layout, const AttentionShape& shape, std::span<const AttentionSequence> seqs) {
  OpRecord record;
  record.kind = OpKind::kAttention;
  record.k = layout.head_dim;
  for (const AttentionSequence& s : seqs) {
    record.m += s.tokens * shape.query_heads;
    for (int g = 0; g < shape.kv_heads && s.tokens > 0; ++g) {
      record.n = std::max(record.n, s.heads[g].length);
      record.kv_read_bytes += kv_bytes(layout, s.heads[g], s.first_position, shape.window, true);
    }
  }
  record.activation_bytes = 2 * record.m * layout.head_dim * 4;
  return record;
}

}  // namespace

void attention(Context& ctx, const KvLayout& layout, const AttentionShape& shape,
               std::span<const AttentionSequence> seqs) {
  if (check_attention(layout, shape, seqs) == 0) return;
  OpScope scope(ctx, OpKind::kAttention);
  cpu::AttentionRun run(ctx, layout, shape, seqs);
  std::atomic<int64_t> pairs = 0;
  const auto item = [&](int64_t index, int thread) { pairs += run.item(seqs, index, thread); };
  ctx.pool.parallel_runs(run.items(), std::ref(item));
  if (!scope.on()) return;
  scope.record = record_of(layout, shape, seqs);
  scope.record.layer = ctx.layer;
  scope.record.macs = pairs * 2 * layout.head_dim;
}

AttentionPlan::AttentionPlan(Context& ctx, const KvLayout& layout, const AttentionShape& shape,
                             std::span<const AttentionSequence> seqs)
    : head_dim_(layout.head_dim) {
  if (check_attention(layout, shape, seqs) == 0) return;
  if (ctx.trace) record_ = record_of(layout, shape, seqs);
  run_ = std::make_unique<cpu::AttentionRun>(ctx, layout, shape, seqs);
}

AttentionPlan::~AttentionPlan() = default;

int64_t AttentionPlan::items() const { return run_ ? run_->items() : 0; }
int64_t AttentionPlan::first_item(int64_t sequence) const { return run_ ? run_->first_item(sequence) : 0; }

void AttentionPlan::item(Context& lane, std::span<const AttentionSequence> seqs, int64_t index, int thread) {
  OpScope scope(lane, OpKind::kAttention);
  const int64_t pairs = run_->item(seqs, index, thread);
  if (!scope.on()) return;
  // The first item speaks for all but for the products of each.
  if (index == 0) scope.record = record_;
  scope.record.layer = lane.layer;
  scope.record.macs = pairs * 2 * head_dim_;
}

void merge_attention(Context& ctx, int64_t rows, int64_t d, float* out, float* lse, const float* other,
                     const float* other_lse, float* share) {
  if (rows < 0 || d < 1) throw BadInput("merge_attention: {} rows of {} elements", rows, d);
  if (rows == 0) return;
  if (!out || !lse || !other || !other_lse) throw BadInput("merge_attention: {} rows without out, lse or other", rows);
  OpScope scope(ctx, OpKind::kAttention);
  cpu::merge_attention(ctx, rows, d, out, lse, other, other_lse, share);
  scope.record.m = rows;
  scope.record.k = d;
  scope.record.macs = 2 * rows * d;
  scope.record.activation_bytes = (3 * d + 3 + (share != nullptr)) * rows * 4;
}

void kv_append(Context& ctx, const KvLayout& layout, const KvHeadView* heads, int kv_heads, const float* k,
               const float* v, int64_t tokens, int64_t first_position, int64_t stride) {
  const KvRows all{heads, tokens, first_position};
  kv_append_rows(ctx, layout, {&all, 1}, kv_heads, 0, tokens, k, v, stride);
}

void check_appended(const char* op, const KvLayout& layout, std::span<const KvRows> sequences, int kv_heads,
                    int64_t first, int64_t rows, const float* k, const float* v) {
  check_layout(op, layout);
  if (kv_heads < 1) throw BadInput("{}: {} KV heads; expected 1 or more", op, kv_heads);
  int64_t all = 0;
  for (const KvRows& s : sequences) {
    check_positions(op, s.first_position, s.tokens);
    all += s.tokens;
    if (s.tokens == 0) continue;
    if (!s.heads || !k || !v) throw BadInput("{}: {} tokens without heads, k or v", op, s.tokens);
    for (int g = 0; g < kv_heads; ++g)
      if (!s.heads[g].pages) throw BadInput("{}: KV head {} has no pages for {} new tokens", op, g, s.tokens);
  }
  if (first < 0 || rows < 0 || first > all - rows)
    throw BadInput("{}: rows {} to {} of {}", op, first, first + rows, all);
}

void kv_append_rows(Context& ctx, const KvLayout& layout, std::span<const KvRows> sequences, int kv_heads,
                    int64_t first, int64_t tokens, const float* k, const float* v, int64_t stride) {
  constexpr const char* kOp = "kv_append";
  check_appended(kOp, layout, sequences, kv_heads, first, tokens, k, v);
  const int64_t row = static_cast<int64_t>(kv_heads) * layout.head_dim;
  stride = check_stride(kOp, "stride", stride, row);
  if (tokens == 0) return;

  OpScope scope(ctx, OpKind::kKvAppend);
  int64_t done = 0, at = 0;  // rows of this call, of all sequences, before s
  for (const KvRows& s : sequences) {
    const int64_t skip = std::max<int64_t>(0, first - at), n = std::min(s.tokens - skip, tokens - done);
    at += s.tokens;
    if (n <= 0) continue;
    cpu::kv_append(ctx, layout, s.heads, kv_heads, k + done * stride, v + done * stride, skip, n, s.first_position,
                   stride);
    done += n;
  }
  scope.record.m = tokens;
  scope.record.n = kv_heads;
  scope.record.k = layout.head_dim;
  scope.record.activation_bytes = 2 * tokens * row * 4;
  scope.record.kv_write_bytes = tokens * kv_heads * static_cast<int64_t>(layout.slot_bytes());
}

void kv_read(Context& ctx, const KvLayout& layout, const KvHeadView& head, int64_t begin, int64_t end, float* k_out,
             float* v_out) {
  constexpr const char* kOp = "kv_read";
  check_layout(kOp, layout);
  check_head(kOp, head, 0);
  if (begin < 0 || begin > end || end > head.length)
    throw BadInput("{}: slots {} to {} of a KV head that holds {}", kOp, begin, end, head.length);
  if (begin == end || (!k_out && !v_out)) return;

  OpScope scope(ctx, OpKind::kCopy);
  cpu::kv_read(ctx, layout, head, begin, end, k_out, v_out);
  const int64_t parts = (k_out != nullptr) + (v_out != nullptr);
  scope.record.m = end - begin;
  scope.record.k = layout.head_dim;
  scope.record.kv_read_bytes =
      parts * (end - begin) *
      (layout.head_dim * static_cast<int64_t>(dtype_size(layout.dtype)) + (layout.dtype == DType::kI8 ? 4 : 0));
  scope.record.activation_bytes = parts * (end - begin) * layout.head_dim * 4;
}

void kv_compact(Context& ctx, const KvLayout& layout, const KvHeadView& head, std::span<const int32_t> keep) {
  constexpr const char* kOp = "kv_compact";
  check_layout(kOp, layout);
  check_head(kOp, head, 0);
  int64_t before = -1;
  for (const int32_t slot : keep) {
    if (slot <= before || slot >= head.length)
      throw BadInput("{}: slot {} after slot {} in a list for a KV head of {} slots; expected ascending slots", kOp,
                     slot, before, head.length);
    before = slot;
  }

  OpScope scope(ctx, OpKind::kCompact);
  const int64_t bytes = cpu::kv_compact(layout, head, keep) * static_cast<int64_t>(layout.slot_bytes());
  scope.record.m = head.length;
  scope.record.n = static_cast<int64_t>(keep.size());
  scope.record.k = layout.head_dim;
  scope.record.kv_read_bytes = bytes;
  scope.record.kv_write_bytes = bytes;
  scope.record.kv_tokens_kept = static_cast<int64_t>(keep.size());
  scope.record.kv_tokens_evicted = head.length - static_cast<int64_t>(keep.size());
}

namespace {

int64_t check_queries(const char* op, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t tokens,
                      int r, int64_t q_stride, int64_t first_position, float scale, int64_t window, const float* out) {
  check_layout(op, layout);
  check_softmax(op, scale, window);
  check_positions(op, first_position, tokens);
  check_head(op, head, tokens);
  if (r < 1) throw BadInput("{}: {} query heads to a KV head; expected 1 or more", op, r);
  if (tokens > 0 && (!q || !out)) throw BadInput("{}: {} query tokens without q or a place for the result", op, tokens);
  return check_stride(op, "q_stride", q_stride, static_cast<int64_t>(r) * layout.head_dim);
}

void report_scores(OpScope& scope, const KvLayout& layout, const KvHeadView& head, int64_t rows, int64_t first_position,
                   int64_t window, int64_t macs, int64_t out_bytes) {
  if (!scope.on()) return;
  scope.record.m = rows;
  scope.record.n = head.length;
  scope.record.k = layout.head_dim;
  scope.record.macs = macs;
  scope.record.activation_bytes = rows * layout.head_dim * 4 + out_bytes;
  scope.record.kv_read_bytes = kv_bytes(layout, head, first_position, window, false);
}

}  // namespace

void window_attention(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t w, int r,
                      int64_t q_stride, int64_t first_position, float scale, int64_t window, float* probs) {
  q_stride = check_queries("window_attention", layout, head, q, w, r, q_stride, first_position, scale, window, probs);
  if (w == 0) return;
  OpScope scope(ctx, OpKind::kEvictScore);
  cpu::AttentionCounts counts;
  cpu::window_attention(ctx, layout, head, q, w, r, q_stride, first_position, scale, window, probs, counts);
  report_scores(scope, layout, head, w * r, first_position, window, counts.pairs * layout.head_dim,
                w * r * head.length * 4);
}

void attention_column_sums(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t tokens,
                           int r, int64_t q_stride, int64_t first_position, float scale, int64_t window, float* sums,
                           const float* share, int64_t share_stride) {
  q_stride =
      check_queries("attention_column_sums", layout, head, q, tokens, r, q_stride, first_position, scale, window, sums);
  if (share) share_stride = check_stride("attention_column_sums", "share_stride", share_stride, r);
  if (tokens == 0) return;
  OpScope scope(ctx, OpKind::kEvictScore);
  cpu::AttentionCounts counts;
  cpu::attention_column_sums(ctx, layout, head, q, tokens, r, q_stride, first_position, scale, window, sums, share,
                             share_stride, counts);
  // Every product is formed twice: once for the rows' sums, once for the columns'.
  report_scores(scope, layout, head, tokens * r, first_position, window, 2 * counts.pairs * layout.head_dim,
                2 * r * head.length * 4);
}

int64_t packed_triangle(int d) { return cpu::triangle_size(d); }

void pack_triangle(const float* t, int d, float* out) {
  for (int row = 0; row < d; row += cpu::kTriangleRows)
    for (int c = row; c < d; ++c)
      for (int r = row; r < row + cpu::kTriangleRows; ++r) *out++ = r < d && r <= c ? t[int64_t{r} * d + c] : 0.0f;
}

void triangle_products(Context& ctx, const float* values, int64_t count, int d, const float* triangles, int n,
                       bool squares, float* out, int64_t ld) {
  if (!values || !triangles || !out || count < 0 || d < 1 || n < 1 || ld < count)
    throw BadInput("triangle_products: {} values of {} floats, {} triangles, rows of {}; expected memory for each",
                   count, d, n, ld);
  if (count == 0) return;
  OpScope scope(ctx, OpKind::kEvictScore);
  cpu::triangle_products(ctx, values, count, d, triangles, n, squares, out, ld);
  OpRecord& record = scope.record;
  record.m = count;
  record.n = n;
  record.k = d;
  record.macs = count * n * (packed_triangle(d) + d);
  record.weight_bytes = n * packed_triangle(d) * 4;
  record.activation_bytes = count * (d + n) * 4;
}

}  // namespace lacuna

// Attention on the CPU: what attention.cc calls once it has checked the operands.
#pragma once

#include <atomic>
#include <memory>

#include "kernels/attention.h"
#include "kernels/cpu/attention_ops.h"

namespace lacuna::cpu {

// 2^x is what the vectors compute, so scores are scaled by log2(e) as well.
inline constexpr float kLog2e = 1.44269504088896341f;

inline constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

enum class KvPart { kKeys, kValues };

// Where things lie in a page. KvLayout derives its offsets anew at every question; decode asks for
// them every 32 slots, which takes 100 cycles or so.
struct PageMap {
  explicit PageMap(const KvLayout& l)
      : slots(static_cast<uint32_t>(l.page_slots)),
        row_bytes(static_cast<size_t>(l.head_dim) * dtype_size(l.dtype)),
        scaled(l.dtype == DType::kI8),
        codes{l.k_offset(), l.v_offset()},
        scales{l.k_scale_offset(), l.v_scale_offset()} {}
  uint32_t slots;
  size_t row_bytes;
  bool scaled;
  size_t codes[2], scales[2];  // of keys, of values
};

struct KvStretch {
  const std::byte* codes = nullptr;
  const float* scales = nullptr;  // null unless int8
  int64_t count = 0;
};

// The longest stretch from `slot` on that lies in one page and ends before `end`. Slots are fewer than
// 2^32: every one has its own 31-bit position.
inline KvStretch stretch(const PageMap& map, const KvHeadView& head, KvPart part, int64_t slot, int64_t end) {
  const uint32_t page = static_cast<uint32_t>(slot) / map.slots, at = static_cast<uint32_t>(slot) % map.slots;
  const std::byte* base = head.pages[page];
  const auto p = static_cast<size_t>(part);
  KvStretch s;
  s.codes = base + map.codes[p] + at * map.row_bytes;
  if (map.scaled) s.scales = reinterpret_cast<const float*>(base + map.scales[p]) + at;
  s.count = map.slots - at < end - slot ? map.slots - at : end - slot;
  return s;
}

// Slots [begin, end) of a head as kKeyTile element rows of stride ld, zero beyond end - begin.
void load_tile_rows(const TileOps& ops, const KvLayout& layout, const KvHeadView& head, KvPart part, int64_t begin,
                    int64_t end, void* rows, int64_t ld);

// The first slot of a head, from `from` on, that a query at `position` sees through a window (0 = all).
int64_t first_visible(const KvLayout& layout, const KvHeadView& head, int64_t from, int64_t position, int64_t window);

// What was really done; added to by all threads.
struct AttentionCounts {
  std::atomic<int64_t> pairs{0};  // query rows x visible slots
};

struct AttentionJob;

// A call of attention() in items, which threads take in any order. Holds workspaces of the context: nothing else may use
// them while items run. How sequences are cut depends on each alone, never on the threads or the other sequences.
class AttentionRun {
 public:
  AttentionRun(Context& ctx, const KvLayout& layout, const AttentionShape& shape, std::span<const AttentionSequence> seqs);
  ~AttentionRun();
  int64_t items() const;
  int64_t first_item(int64_t sequence) const;  // items are in the order of sequences
  // Item `index` on pool thread `thread`, of sequences like those of the constructor: other tensors and pages, the same
  // sizes. Query rows x visible slots.
  int64_t item(std::span<const AttentionSequence> seqs, int64_t index, int thread);

 private:
  Context* ctx_;
  std::unique_ptr<AttentionJob> job_;
};

void merge_attention(Context& ctx, int64_t rows, int64_t d, float* out, float* lse, const float* other,
                     const float* other_lse, float* share);
void window_attention(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t w, int r,
                      int64_t q_stride, int64_t first_position, float scale, int64_t window, float* probs,
                      AttentionCounts& counts);
void attention_column_sums(Context& ctx, const KvLayout& layout, const KvHeadView& head, const float* q, int64_t tokens,
                           int r, int64_t q_stride, int64_t first_position, float scale, int64_t window, float* sums,
                           const float* share, int64_t share_stride, AttentionCounts& counts);
void triangle_products(Context& ctx, const float* values, int64_t count, int d, const float* triangles, int n,
                       bool squares, float* out, int64_t ld);

}  // namespace lacuna::cpu

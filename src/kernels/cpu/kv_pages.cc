#include "kernels/cpu/kv_pages.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "kernels/cpu/attention_cpu.h"

namespace lacuna::cpu {
namespace {

// Slots a thread handles at a time: 64 * 64 * 4 B * 2 = 32 KB, some microseconds.
constexpr int64_t kSlotBlock = 64;

std::byte* at(int page_slots, const KvHeadView& head, int64_t slot, size_t part, size_t item_bytes) {
  return head.pages[slot / page_slots] + part + static_cast<size_t>(slot % page_slots) * item_bytes;
}

}  // namespace

void kv_append(Context& ctx, const KvLayout& layout, const KvHeadView* heads, int kv_heads, const float* k,
               const float* v, int64_t skip, int64_t tokens, int64_t first_position, int64_t stride) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const int d = layout.head_dim, slots = layout.page_slots;
  const PageMap pages(layout);
  const size_t position_offset = layout.position_offset();
  const int64_t blocks = (tokens + kSlotBlock - 1) / kSlotBlock;
  const auto body = [&](int64_t index, int) {
    const int64_t g = index % kv_heads, t0 = index / kv_heads * kSlotBlock, t1 = std::min(tokens, t0 + kSlotBlock);
    const KvHeadView& head = heads[g];
    // Dividing for each slot would take as long as writing it.
    const int64_t first = head.length + skip + t0;
    int64_t page = first / slots, at = first % slots;
    for (int64_t t = t0; t < t1; ++t) {
      std::byte* base = head.pages[page];
      for (const size_t part : {0, 1}) {
        const float* row = (part == 0 ? k : v) + t * stride + g * d;
        const float scale =
            ops.encode_row(row, d, layout.dtype, base + pages.codes[part] + static_cast<size_t>(at) * pages.row_bytes);
        if (pages.scaled) std::memcpy(base + pages.scales[part] + at * 4, &scale, 4);
      }
      const auto position = static_cast<int32_t>(first_position + skip + t);
      std::memcpy(base + position_offset + at * 4, &position, 4);
      if (++at < slots) continue;
      at = 0;
      ++page;
    }
  };
  ctx.pool.parallel_for(blocks * kv_heads, std::ref(body));
}

void kv_read(Context& ctx, const KvLayout& layout, const KvHeadView& head, int64_t begin, int64_t end, float* k_out,
             float* v_out) {
  const AttentionOps& ops = attention_ops(cpu_isa());
  const int d = layout.head_dim;
  const PageMap pages(layout);
  const auto body = [&](int64_t index, int) {
    const int64_t from = begin + index * kSlotBlock, to = std::min(end, from + kSlotBlock);
    for (const KvPart part : {KvPart::kKeys, KvPart::kValues}) {
      float* out = part == KvPart::kKeys ? k_out : v_out;
      if (!out) continue;
      for (int64_t slot = from; slot < to;) {
        const KvStretch s = stretch(pages, head, part, slot, to);
        ops.f32.rows(layout.dtype, s.codes, s.scales, s.count, d, out + (slot - begin) * d, d);
        slot += s.count;
      }
    }
  };
  ctx.pool.parallel_for((end - begin + kSlotBlock - 1) / kSlotBlock, std::ref(body));
}

int64_t kv_compact(const KvLayout& layout, const KvHeadView& head, std::span<const int32_t> keep) {
  // A slot only ever moves towards the front, past slots that have moved already.
  struct Part {
    size_t offset, bytes;
  };
  const size_t row = static_cast<size_t>(layout.head_dim) * dtype_size(layout.dtype);
  const Part parts[] = {{layout.k_offset(), row},
                        {layout.v_offset(), row},
                        {layout.position_offset(), 4},
                        {layout.k_scale_offset(), 4},
                        {layout.v_scale_offset(), 4}};
  const size_t used = layout.dtype == DType::kI8 ? 5 : 3;
  int64_t moved = 0;
  for (size_t i = 0; i < keep.size(); ++i) {
    const auto to = static_cast<int64_t>(i), from = static_cast<int64_t>(keep[i]);
    if (from == to) continue;
    for (size_t p = 0; p < used; ++p)
      std::memcpy(at(layout.page_slots, head, to, parts[p].offset, parts[p].bytes),
                  at(layout.page_slots, head, from, parts[p].offset, parts[p].bytes), parts[p].bytes);
    ++moved;
  }
  return moved;
}

}  // namespace lacuna::cpu

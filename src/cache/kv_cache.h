// cache: ragged KV cache (lengths differ by layer and head), later recurrent states and snapshots.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/attention.h"

namespace lacuna {

struct KvCacheShape {
  struct Layer {
    int kv_heads = 0;  // 0: a layer without keys and values (a recurrent one)
    int head_dim = 0;
  };
  std::vector<Layer> layers;
  DType dtype = DType::kF32;  // f32, bf16 or int8 (a scale per token and head)
  int page_slots = 32;        // slots a page; the slack of a head is less than one page
};

// Keys and values of one sequence. Every layer and KV head has its own slots, ascending in original
// position; position is not index. Memory is held in pages that are freed the moment they are empty.
// All bytes are charged to MemoryTag::kKv, so a limit on that tag is a hard limit at every moment.
class KvCache {
 public:
  KvCache(MemoryAccount& account, KvCacheShape shape);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) = delete;

  const KvCacheShape& shape() const { return shape_; }
  int layers() const { return static_cast<int>(shape_.layers.size()); }
  int kv_heads(int layer) const { return shape_.layers[static_cast<size_t>(layer)].kv_heads; }
  const KvLayout& layout(int layer) const { return layouts_[static_cast<size_t>(layer)]; }
  int64_t length(int layer, int head) const { return view(layer, head).length; }
  const KvHeadView& view(int layer, int head) const { return views_[static_cast<size_t>(layer)][static_cast<size_t>(head)]; }
  const KvHeadView* views(int layer) const { return views_[static_cast<size_t>(layer)].data(); }

  // Adds `tokens` slots to every head of a layer; k, v [tokens, G, d] f32, rows `stride` floats apart (0 = dense).
  void append(Context& ctx, int layer, const float* k, const float* v, int64_t tokens, int64_t first_position,
              int64_t stride = 0);
  // The same in steps: pages for `tokens` more slots of a layer, and once kv_append_rows has written them, their count.
  void reserve(int layer, int64_t tokens);
  void extend(int layer, int64_t tokens);
  // Physically keeps only the named slots (ascending) of one head, in place, and frees the emptied pages.
  void keep(Context& ctx, int layer, int head, std::span<const int32_t> slots);
  // Gives an empty head `slots` slots whose contents copy(page, first, count) writes, page by page: slots
  // [first, first + count), laid out as layout(layer) says, with positions ascending over all calls.
  void fill(int layer, int head, int64_t slots,
            const std::function<void(std::byte* page, int64_t first, int64_t count)>& copy);
  // Drops every slot from index `length` on; their pages stay if others are to come at once.
  void truncate(int layer, int head, int64_t length, bool keep_pages = false);
  // Frees whole leading pages of a layer in which every position is < `position` (sliding windows).
  void drop_before(int layer, int64_t position);

  // Original positions of a head's slots, ascending.
  std::vector<int32_t> positions(int layer, int head) const;
  // slots[layer][head] = ascending slot indices: a second cache that holds just those, bit for bit.
  KvCache copy(Context& ctx, const std::vector<std::vector<std::vector<int32_t>>>& slots) const;
  KvCache copy(Context& ctx) const;

  int64_t total_slots() const;
  size_t used_bytes() const;       // what the slots need
  size_t allocated_bytes() const;  // what their pages hold: used + slack
  size_t slack_bytes() const { return allocated_bytes() - used_bytes(); }

 private:
  using HeadPages = std::vector<std::byte*>;
  void free_pages(int layer, int head, size_t from);
  void sync(int layer, int head);

  MemoryAccount* account_;
  KvCacheShape shape_;
  std::vector<KvLayout> layouts_;
  std::vector<std::vector<HeadPages>> pages_;      // [layer][head]
  std::vector<std::vector<KvHeadView>> views_;     // [layer][head], pointing into pages_
};

}  // namespace lacuna

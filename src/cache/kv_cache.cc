#include "cache/kv_cache.h"

#include <algorithm>
#include <cstring>

namespace lacuna {

KvCache::KvCache(MemoryAccount& account, KvCacheShape shape) : account_(&account), shape_(std::move(shape)) {
  LACUNA_CHECK(shape_.page_slots > 0);
  for (const auto& layer : shape_.layers) {
    layouts_.push_back(KvLayout{shape_.dtype, layer.head_dim, shape_.page_slots});
    pages_.emplace_back(static_cast<size_t>(layer.kv_heads));
    views_.emplace_back(static_cast<size_t>(layer.kv_heads));
  }
}

KvCache::KvCache(KvCache&& other) noexcept
    : account_(other.account_),
      shape_(std::move(other.shape_)),
      layouts_(std::move(other.layouts_)),
      pages_(std::move(other.pages_)),
      views_(std::move(other.views_)) {
  other.pages_.clear();
  other.views_.clear();
  other.shape_.layers.clear();
}

KvCache::~KvCache() {
  for (size_t l = 0; l < pages_.size(); ++l)
    for (size_t h = 0; h < pages_[l].size(); ++h) free_pages(static_cast<int>(l), static_cast<int>(h), 0);
}

void KvCache::free_pages(int layer, int head, size_t from) {
  HeadPages& pages = pages_[static_cast<size_t>(layer)][static_cast<size_t>(head)];
  const size_t bytes = layout(layer).page_bytes();
  for (size_t p = from; p < pages.size(); ++p) account_->release(MemoryTag::kKv, pages[p], bytes);
  pages.resize(std::min(from, pages.size()));
}

void KvCache::sync(int layer, int head) {
  views_[static_cast<size_t>(layer)][static_cast<size_t>(head)].pages =
      pages_[static_cast<size_t>(layer)][static_cast<size_t>(head)].data();
}

void KvCache::reserve(int layer, int64_t tokens) {
  const KvLayout& l = layout(layer);
  for (int h = 0; h < kv_heads(layer); ++h) {
    HeadPages& pages = pages_[static_cast<size_t>(layer)][static_cast<size_t>(h)];
    const size_t need = static_cast<size_t>((length(layer, h) + tokens + l.page_slots - 1) / l.page_slots);
    pages.reserve(need);
    while (pages.size() < need)
      pages.push_back(static_cast<std::byte*>(account_->allocate(MemoryTag::kKv, l.page_bytes())));
    sync(layer, h);
  }
}

void KvCache::extend(int layer, int64_t tokens) {
  for (KvHeadView& v : views_[static_cast<size_t>(layer)]) v.length += tokens;
}

void KvCache::append(Context& ctx, int layer, const float* k, const float* v, int64_t tokens, int64_t first_position,
                     int64_t stride) {
  reserve(layer, tokens);
  kv_append(ctx, layout(layer), views(layer), kv_heads(layer), k, v, tokens, first_position, stride);
  extend(layer, tokens);
}

void KvCache::fill(int layer, int head, int64_t slots,
                   const std::function<void(std::byte* page, int64_t first, int64_t count)>& copy) {
  LACUNA_CHECK(length(layer, head) == 0);
  const KvLayout& l = layout(layer);
  HeadPages& pages = pages_[static_cast<size_t>(layer)][static_cast<size_t>(head)];
  for (int64_t first = 0; first < slots; first += l.page_slots) {
    pages.push_back(static_cast<std::byte*>(account_->allocate(MemoryTag::kKv, l.page_bytes())));
    copy(pages.back(), first, std::min<int64_t>(l.page_slots, slots - first));
  }
  views_[static_cast<size_t>(layer)][static_cast<size_t>(head)].length = slots;
  sync(layer, head);
}

void KvCache::keep(Context& ctx, int layer, int head, std::span<const int32_t> slots) {
  const int64_t old_length = length(layer, head);
  LACUNA_CHECK(static_cast<int64_t>(slots.size()) <= old_length);
  if (static_cast<int64_t>(slots.size()) == old_length) return;
  kv_compact(ctx, layout(layer), view(layer, head), slots);
  truncate(layer, head, static_cast<int64_t>(slots.size()));
}

void KvCache::truncate(int layer, int head, int64_t length, bool keep_pages) {
  KvHeadView& v = views_[static_cast<size_t>(layer)][static_cast<size_t>(head)];
  LACUNA_CHECK(length >= 0 && length <= v.length);
  v.length = length;
  if (keep_pages) return;
  const int page_slots = layout(layer).page_slots;
  free_pages(layer, head, static_cast<size_t>((length + page_slots - 1) / page_slots));
  sync(layer, head);
}

void KvCache::drop_before(int layer, int64_t position) {
  const KvLayout& l = layout(layer);
  for (int h = 0; h < kv_heads(layer); ++h) {
    KvHeadView& v = views_[static_cast<size_t>(layer)][static_cast<size_t>(h)];
    HeadPages& pages = pages_[static_cast<size_t>(layer)][static_cast<size_t>(h)];
    size_t drop = 0;
    // A page is free to go when its last slot is out of reach and it is not the page being filled.
    while (static_cast<int64_t>(drop + 1) * l.page_slots < v.length &&
           v.positions(l, static_cast<int64_t>(drop))[l.page_slots - 1] < position)
      ++drop;
    if (!drop) continue;
    for (size_t p = 0; p < drop; ++p) account_->release(MemoryTag::kKv, pages[p], l.page_bytes());
    pages.erase(pages.begin(), pages.begin() + static_cast<std::ptrdiff_t>(drop));
    v.length -= static_cast<int64_t>(drop) * l.page_slots;
    sync(layer, h);
  }
}

std::vector<int32_t> KvCache::positions(int layer, int head) const {
  const KvHeadView& v = view(layer, head);
  std::vector<int32_t> out(static_cast<size_t>(v.length));
  for (int64_t i = 0; i < v.length; ++i) out[static_cast<size_t>(i)] = v.position(layout(layer), i);
  return out;
}

KvCache KvCache::copy(Context& ctx, const std::vector<std::vector<std::vector<int32_t>>>& slots) const {
  KvCache out(*account_, shape_);
  for (int layer = 0; layer < layers(); ++layer) {
    const KvLayout& l = layout(layer);
    const size_t row = static_cast<size_t>(l.head_dim) * dtype_size(l.dtype);
    for (int h = 0; h < kv_heads(layer); ++h) {
      const auto& keep = slots[static_cast<size_t>(layer)][static_cast<size_t>(h)];
      HeadPages& pages = out.pages_[static_cast<size_t>(layer)][static_cast<size_t>(h)];
      const KvHeadView& from = view(layer, h);
      const auto move = [&](size_t offset, size_t bytes, int64_t source, int64_t target) {
        std::memcpy(pages[static_cast<size_t>(target / l.page_slots)] + offset + static_cast<size_t>(target % l.page_slots) * bytes,
                    from.pages[source / l.page_slots] + offset + static_cast<size_t>(source % l.page_slots) * bytes, bytes);
      };
      for (size_t i = 0; i < keep.size(); ++i) {
        LACUNA_CHECK(keep[i] >= 0 && keep[i] < from.length);
        if (i % static_cast<size_t>(l.page_slots) == 0)
          pages.push_back(static_cast<std::byte*>(account_->allocate(MemoryTag::kKv, l.page_bytes())));
        const int64_t target = static_cast<int64_t>(i);
        move(l.k_offset(), row, keep[i], target);
        move(l.v_offset(), row, keep[i], target);
        if (l.dtype == DType::kI8) {
          move(l.k_scale_offset(), 4, keep[i], target);
          move(l.v_scale_offset(), 4, keep[i], target);
        }
        move(l.position_offset(), 4, keep[i], target);
      }
      out.views_[static_cast<size_t>(layer)][static_cast<size_t>(h)].length = static_cast<int64_t>(keep.size());
      out.sync(layer, h);
    }
  }
  return out;
}

KvCache KvCache::copy(Context& ctx) const {
  std::vector<std::vector<std::vector<int32_t>>> all(static_cast<size_t>(layers()));
  for (int layer = 0; layer < layers(); ++layer)
    for (int h = 0; h < kv_heads(layer); ++h) {
      std::vector<int32_t> slots(static_cast<size_t>(length(layer, h)));
      for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int32_t>(i);
      all[static_cast<size_t>(layer)].push_back(std::move(slots));
    }
  return copy(ctx, all);
}

int64_t KvCache::total_slots() const {
  int64_t n = 0;
  for (const auto& layer : views_)
    for (const auto& v : layer) n += v.length;
  return n;
}

size_t KvCache::used_bytes() const {
  size_t bytes = 0;
  for (int layer = 0; layer < layers(); ++layer)
    for (const auto& v : views_[static_cast<size_t>(layer)])
      bytes += static_cast<size_t>(v.length) * layout(layer).slot_bytes();
  return bytes;
}

size_t KvCache::allocated_bytes() const {
  size_t bytes = 0;
  for (int layer = 0; layer < layers(); ++layer)
    for (const auto& pages : pages_[static_cast<size_t>(layer)]) bytes += pages.size() * layout(layer).page_bytes();
  return bytes;
}

}  // namespace lacuna

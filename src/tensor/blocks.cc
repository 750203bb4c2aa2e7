#include "tensor/blocks.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace lacuna {
namespace {

constexpr size_t kAlignment = 64;  // one cache line, one AVX-512 register
constexpr size_t kHugePage = size_t{2} << 20;
// Blocks of a slab: below, malloc keeps them together anyway; above, a slab's end would be wasted.
constexpr size_t kLeastPooled = size_t{1} << 10, kMostPooled = size_t{128} << 10;

size_t rounded(size_t bytes, size_t to = kAlignment) { return (bytes + to - 1) / to * to; }

void* huge(size_t bytes) {
  void* data = std::aligned_alloc(kHugePage, rounded(bytes, kHugePage));
  // Advice: where the system has no huge page, small ones serve. A block's end keeps small pages, so that
  // no more is resident than is used.
  if (data) ::madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return data;
}

// Starts a slab; blocks of one size follow.
struct Slab {
  struct Free {
    Free* next;
  };
  size_t block;
  size_t used = 0;   // blocks handed out
  size_t fresh = 0;  // blocks that never were; the others are on the list
  Free* free = nullptr;
  Slab* before = nullptr;  // in its size's list of slabs that have room
  Slab* after = nullptr;

  size_t capacity() const { return (kHugePage - first()) / block; }
  static constexpr size_t first() { return 64; }
  bool full() const { return !free && fresh == capacity(); }
};
static_assert(sizeof(Slab) <= 64);

// Few sizes are alive at a time: one a KV layout.
class Slabs {
 public:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    Size& size = size_of(bytes);
    if (!size.room) {
      void* data = spare_ ? std::exchange(spare_, nullptr) : huge(kHugePage);
      if (!data) return nullptr;
      size.room = new (data) Slab{bytes};
    }
    Slab* slab = size.room;
    void* block = slab->free;
    if (slab->free)
      slab->free = slab->free->next;
    else
      block = reinterpret_cast<std::byte*>(slab) + Slab::first() + slab->fresh++ * bytes;
    ++slab->used;
    if (slab->full()) unlink(size, slab);
    return block;
  }

  void give(void* block, size_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    auto* slab = reinterpret_cast<Slab*>(reinterpret_cast<uintptr_t>(block) / kHugePage * kHugePage);
    Size& size = size_of(bytes);
    const bool was_full = slab->full();
    slab->free = new (block) Slab::Free{slab->free};
    if (was_full) link(size, slab);
    if (--slab->used > 0) return;
    unlink(size, slab);
    // One stays, for whatever size comes next: to give one back and get another, cleared, takes some 50 us.
    std::free(spare_);
    spare_ = slab;
  }

 private:
  struct Size {
    size_t bytes;
    Slab* room = nullptr;
  };
  Size& size_of(size_t bytes) {
    for (Size& s : sizes_)
      if (s.bytes == bytes) return s;
    return sizes_.emplace_back(Size{bytes});
  }
  static void link(Size& size, Slab* slab) {
    slab->before = nullptr;
    slab->after = size.room;
    if (size.room) size.room->before = slab;
    size.room = slab;
  }
  static void unlink(Size& size, Slab* slab) {
    (slab->before ? slab->before->after : size.room) = slab->after;
    if (slab->after) slab->after->before = slab->before;
    slab->before = slab->after = nullptr;
  }

  std::mutex mutex_;
  std::vector<Size> sizes_;
  void* spare_ = nullptr;
};

Slabs& slabs() {
  // Never destroyed: a cache may outlive every static object.
  static auto* s = new Slabs;
  return *s;
}

// A slab would hide from the sanitizer what is read past a block or after its release.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kPools = false;
#else
constexpr bool kPools = true;
#endif
bool pooled(size_t bytes) { return kPools && bytes >= kLeastPooled && bytes <= kMostPooled; }

}  // namespace

void* take_block(size_t bytes) {
  if (pooled(bytes)) return slabs().take(rounded(bytes));
  if (bytes >= kHugePage) return huge(bytes);
  return std::aligned_alloc(kAlignment, rounded(bytes ? bytes : 1));
}

void give_block(void* block, size_t bytes) noexcept {
  if (block && pooled(bytes))
    slabs().give(block, rounded(bytes));
  else
    std::free(block);
}

}  // namespace lacuna

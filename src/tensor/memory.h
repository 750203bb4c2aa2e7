#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

namespace lacuna {

// What a block of memory is for. Every byte the engine reports comes from these counters.
enum class MemoryTag : uint8_t { kWeights, kKv, kState, kActivations, kScratch };
inline constexpr int kMemoryTags = 5;
std::string_view memory_tag_name(MemoryTag tag);

// Counts bytes by tag and refuses what exceeds a tag's hard limit. Thread-safe.
class MemoryAccount {
 public:
  // 0 = no limit.
  void set_limit(MemoryTag tag, size_t bytes) { at(tag).limit.store(bytes); }
  // Bytes over all tags that may be allocated here (mapped files excluded); 0 = no limit. Keeps a
  // request beyond the machine's memory an error instead of a kill.
  void set_total_limit(size_t bytes) { total_limit_.store(bytes); }
  // What the limit leaves; nothing: no limit.
  std::optional<size_t> room() const {
    const size_t limit = total_limit_.load(), taken = total_.load();
    return limit ? std::optional(limit - std::min(limit, taken)) : std::nullopt;
  }
  size_t limit(MemoryTag tag) const { return at(tag).limit.load(); }
  size_t now(MemoryTag tag) const { return at(tag).now.load(); }
  size_t peak(MemoryTag tag) const { return at(tag).peak.load(); }
  void reset_peak(MemoryTag tag) { at(tag).peak.store(at(tag).now.load()); }

  // 64-byte aligned, uninitialised. Throws OutOfMemory that names tag, request, use and limit.
  void* allocate(MemoryTag tag, size_t bytes);
  void release(MemoryTag tag, void* data, size_t bytes) noexcept;
  // For memory that someone else provides (a mapped file): counted, never allocated here.
  void count_external(MemoryTag tag, int64_t bytes);

 private:
  struct Counter {
    std::atomic<size_t> now{0}, peak{0}, limit{0};
  };
  Counter& at(MemoryTag tag) { return counters_[static_cast<size_t>(tag)]; }
  const Counter& at(MemoryTag tag) const { return counters_[static_cast<size_t>(tag)]; }
  void charge(MemoryTag tag, size_t bytes);
  void charge_total(MemoryTag tag, size_t bytes);
  std::atomic<size_t> total_{0}, total_limit_{0};
  std::array<Counter, kMemoryTags> counters_;
};

// Owns one allocation from an account; moves, never copies. The account must outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(MemoryAccount& account, MemoryTag tag, size_t bytes)
      : account_(&account), tag_(tag), bytes_(bytes), data_(bytes ? account.allocate(tag, bytes) : nullptr) {}
  ~Buffer() { reset(); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer(std::move(other)).swap(*this);
    return *this;
  }

  template <typename T = std::byte>
  T* as() const { return static_cast<T*>(data_); }
  size_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }
  void reset() {
    if (data_) account_->release(tag_, data_, bytes_);
    data_ = nullptr;
    bytes_ = 0;
  }
  // Grows to at least `bytes` without keeping the contents; never shrinks.
  void ensure(MemoryAccount& account, MemoryTag tag, size_t bytes) {
    if (bytes <= bytes_) return;
    reset();  // first, so that old and new never stand beside each other
    *this = Buffer(account, tag, bytes);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(account_, other.account_);
    std::swap(tag_, other.tag_);
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
  }
  MemoryAccount* account_ = nullptr;
  MemoryTag tag_ = MemoryTag::kScratch;
  size_t bytes_ = 0;
  void* data_ = nullptr;
};

}  // namespace lacuna

#include "tensor/memory.h"

#include "base/error.h"
#include "tensor/blocks.h"

namespace lacuna {

std::string_view memory_tag_name(MemoryTag tag) {
  switch (tag) {
    case MemoryTag::kWeights: return "weights";
    case MemoryTag::kKv: return "kv";
    case MemoryTag::kState: return "state";
    case MemoryTag::kActivations: return "activations";
    case MemoryTag::kScratch: return "scratch";
  }
  return "?";
}

void MemoryAccount::charge(MemoryTag tag, size_t bytes) {
  Counter& c = at(tag);
  const size_t limit = c.limit.load();
  size_t now = c.now.load();
  do {
    if (limit && (bytes > limit || now > limit - bytes))
      throw OutOfMemory("{} memory: {} bytes were asked for with {} in use; the limit is {} bytes",
                        memory_tag_name(tag), bytes, now, limit);
  } while (!c.now.compare_exchange_weak(now, now + bytes));
  size_t peak = c.peak.load();
  while (peak < now + bytes && !c.peak.compare_exchange_weak(peak, now + bytes)) {
  }
}

void MemoryAccount::charge_total(MemoryTag tag, size_t bytes) {
  const size_t limit = total_limit_.load();
  const size_t before = total_.fetch_add(bytes);
  if (limit && (bytes > limit || before > limit - bytes)) {
    total_.fetch_sub(bytes);
    throw OutOfMemory("{} memory: {} bytes were asked for with {} allocated in all; the limit is {} bytes",
                      memory_tag_name(tag), bytes, before, limit);
  }
}

void* MemoryAccount::allocate(MemoryTag tag, size_t bytes) {
  if (bytes > (size_t{1} << 47))
    throw OutOfMemory("{} memory: {} bytes were asked for, more than any machine addresses", memory_tag_name(tag), bytes);
  charge_total(tag, bytes);
  try {
    charge(tag, bytes);
  } catch (...) {
    total_.fetch_sub(bytes);
    throw;
  }
  void* data = take_block(bytes);
  if (!data) {
    at(tag).now.fetch_sub(bytes);
    total_.fetch_sub(bytes);
    throw OutOfMemory("{} memory: the system refused {} bytes ({} in use)", memory_tag_name(tag), bytes, now(tag));
  }
  return data;
}

void MemoryAccount::release(MemoryTag tag, void* data, size_t bytes) noexcept {
  give_block(data, bytes);
  at(tag).now.fetch_sub(bytes);
  total_.fetch_sub(bytes);
}

void MemoryAccount::count_external(MemoryTag tag, int64_t bytes) {
  if (bytes >= 0)
    charge(tag, static_cast<size_t>(bytes));
  else
    at(tag).now.fetch_sub(static_cast<size_t>(-bytes));
}

}  // namespace lacuna

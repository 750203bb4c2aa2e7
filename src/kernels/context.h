// kernels: an op a header (what it computes, shapes, units); cpu/ holds the bodies.
// Ops check their operands, run the body for the context's device and report to the trace.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <vector>

#include "base/threads.h"
#include "tensor/memory.h"
#include "tensor/tensor.h"
#include "trace/trace.h"

namespace lacuna {

// Precision of matrix-product operands. The residual stream, norms, softmax and all accumulators
// are f32 in either case; kBF16 rounds the activation operand of products to bf16.
enum class ActivationType : uint8_t { kF32, kBF16 };

// Named activation buffers of a forward pass; each holds as many rows as the largest call so far.
enum class ActivationSlot : uint8_t {
  kHidden, kNormed, kQuery, kRawQuery, kKey, kValue, kMixed, kGate, kUp, kCos, kSin, kLogits,
  kExpertIn, kExpertOut,  // rows of one expert's tokens
  kSinkMixed, kLse,       // attention's share from sinks, and logarithms of both shares' denominators
  kBranch, kDecay,        // one branch of a parallel layer; log decays
  kSpikeCounts, kSpikeRows, kSpikeValues,
  kCount
};

// Bytes behind a thread's workspace, since those of two threads often lie side by side: a core's prefetcher that asks
// for the next lines takes them from the core that writes them.
inline constexpr size_t kBetweenWorkspaces = 4096;

// What an op needs besides its operands: threads, memory, and who listens. One per running engine;
// not thread-safe (ops run one after another and are parallel inside).
struct Context {
  explicit Context(MemoryAccount& m, int threads = 0) : memory(m), pool(threads), scratch(pool.size() + 1) {}

  MemoryAccount& memory;
  ThreadPool pool;
  ActivationType activations = ActivationType::kBF16;
  TraceSink* trace = nullptr;  // nullptr: the ledger is off
  int32_t layer = -1;          // set by the model around a layer, copied into records
  // Set: ops are as long as from the end of the one before, so that the clock is read once for each.
  std::chrono::steady_clock::time_point* last_op = nullptr;

  // Reusable workspace, tag kScratch. Slot pool.size() is shared (whole-op workspace, e.g. a packed
  // activation panel); slots 0 … pool.size()-1 belong to the thread of that index.
  // The pointer is valid until the same slot is asked for again.
  template <typename T>
  T* workspace(int slot, size_t elements) {
    scratch[static_cast<size_t>(slot)].ensure(memory, MemoryTag::kScratch, elements * sizeof(T) + kBetweenWorkspaces);
    return scratch[static_cast<size_t>(slot)].template as<T>();
  }
  // Like workspace(), tag kActivations: valid until the same slot is asked for a larger size.
  float* activation(ActivationSlot slot, size_t elements) {
    Buffer& buffer = activation_buffers[static_cast<size_t>(slot)];
    buffer.ensure(memory, MemoryTag::kActivations, elements * sizeof(float));
    return buffer.as<float>();
  }
  int shared_slot() const { return static_cast<int>(scratch.size()) - 1; }

  std::vector<Buffer> scratch;
  std::array<Buffer, static_cast<size_t>(ActivationSlot::kCount)> activation_buffers;
};

// Times an op and reports it, if anyone listens.
class OpScope {
 public:
  OpScope(Context& ctx, OpKind kind) : ctx_(ctx) {
    if (!ctx_.trace) return;
    record.kind = kind;
    record.layer = ctx_.layer;
    start_ = ctx_.last_op ? *ctx_.last_op : std::chrono::steady_clock::now();
  }
  ~OpScope() {
    if (!ctx_.trace) return;
    const auto end = std::chrono::steady_clock::now();
    record.duration_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(end - start_).count();
    if (ctx_.last_op) *ctx_.last_op = end;
    ctx_.trace->record(record);
  }
  bool on() const { return ctx_.trace != nullptr; }
  OpRecord record;

 private:
  Context& ctx_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace lacuna

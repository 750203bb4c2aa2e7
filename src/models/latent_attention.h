#pragma once

#include <span>
#include <vector>

#include "cache/kv_cache.h"
#include "kernels/lanes.h"
#include "models/rope_table.h"

namespace lacuna {

// What a stack of layers may take for panels of its weights (LinearWeight::panels): what the last-level cache of a
// small machine holds beside its other users.
inline constexpr size_t kPanelBytes = size_t{16} << 20;

// Consecutive rows of one sequence in one sweep over the weights.
struct LatentPart {
  KvCache* kv = nullptr;  // what the rows see before them, and are appended to; null: they see only each other
  int64_t rows = 0;
  int64_t first_position = 0;  // of the first row; the slots of kv
};

// The rows [first_row, first_row + rows) of a call, part after part.
struct LatentChunk {
  int64_t first_row = 0, rows = 0;
  std::vector<LatentPart> parts;
};

// Cuts a call into chunks of at most `most` rows, between blocks of positions; rows without a cache stay together.
std::vector<LatentChunk> cut_into_chunks(std::span<const LatentPart> parts, int64_t block, int64_t most);

// What a call appended to caches goes again when it ends: beyond the rows to keep if it was committed, else all of it.
class AppendGuard {
 public:
  AppendGuard() = default;
  AppendGuard(const AppendGuard&) = delete;
  AppendGuard& operator=(const AppendGuard&) = delete;
  ~AppendGuard();
  void watch(KvCache& kv, int64_t length, int64_t keep) { entries_.push_back({&kv, length, keep}); }
  void commit() { committed_ = true; }

 private:
  struct Entry {
    KvCache* kv;
    int64_t length, keep;
  };
  std::vector<Entry> entries_;
  bool committed_ = false;
};

// Softmax attention with as many key as query heads, causal by blocks of positions, over the fused products
// [q | k | v] of many sequences. One for a stack of layers: it holds the rotary table and the buffers.
class LatentAttention {
 public:
  enum class Pairs : uint8_t { kHalves, kNeighbours };  // which elements RoPE turns together
  // RoPE turns the first rope_dim elements of a head (kHalves: all head_dim).
  LatentAttention(const RopeConfig& rope, Pairs pairs, int rope_dim, int heads, int head_dim, int64_t block);

  // Angles and memory for a chunk's layers. `layout` is that of all caches; rows without one are held in it as well,
  // from layer to layer. Uses the activation slots kCos and kSin.
  void begin(Context& ctx, const LatentChunk& chunk, const KvLayout& layout);
  // Says which layer's rows append() is called for from now on, until attend().
  void enter(int layer, const LatentChunk& chunk);
  // Turns k, and q where it is wanted, of `rows` rows of the chunk from `first` on, and puts k and v where the layer's
  // keys and values go; qkv [rows, 3 * H * d] is the first's. Threads may share out the rows.
  void append(Context& ctx, int64_t first, int64_t rows, float* qkv, bool queries) const;
  // The layer, once all rows are appended: mixed [rows, H * d] of qkv; null: nobody reads it.
  void attend(Context& ctx, const LatentChunk& chunk, const float* qkv, float* mixed);

  int64_t width() const { return int64_t{heads_} * head_dim_; }

 private:
  RopeTable rope_;
  Pairs pairs_;
  int rope_dim_, heads_, head_dim_;
  int64_t block_;
  const float *cos_ = nullptr, *sin_ = nullptr;  // of the chunk's rows
  // Keys and values of parts without a cache, of one layer: pages, and a view a part and head.
  Buffer pages_;
  std::vector<std::byte*> page_list_;
  std::vector<KvHeadView> views_;
  KvLayout layout_;
  int layer_ = 0;
  std::vector<KvRows> rows_;  // of the parts, in this layer
  std::vector<AttentionSequence> sequences_;
};

}  // namespace lacuna

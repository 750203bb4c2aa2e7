#pragma once

#include <functional>
#include <span>
#include <vector>

#include "cache/kv_cache.h"
#include "kernels/lanes.h"
#include "kernels/layer_norm.h"
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
  // RoPE turns the first rope_dim elements of a head (kHalves: all head_dim). row_weights: that a layer multiplies a row
  // with.
  LatentAttention(const RopeConfig& rope, Pairs pairs, int rope_dim, int layers, int heads, int head_dim, int64_t block,
                  int64_t row_weights);

  // Where the activations of some rows lie: in buffers of a context, which hold `held` rows, from row `at` on. Those of a
  // whole chunk in run()'s context must have been asked for before run().
  struct Place {
    Context& home;
    int64_t held = 0, at = 0;
    float* rows(ActivationSlot slot, int64_t width) const {
      return home.activation(slot, static_cast<size_t>(held * width)) + at * width;
    }
  };
  // A step of a stack of layers over rows [first, first + rows) of a chunk: step 0 ends with append() to layer 0, step i
  // with what makes layer i's keys and values of layer i - 1's results, and the last step needs no layer of its own.
  using Step = std::function<void(Context& ctx, int step, int64_t first, int64_t rows, const Place& place)>;
  // The chunk through `steps` steps with the attention of layer i between steps i and i + 1, from kQuery [rows, 3 * H * d]
  // to kMixed [rows, H * d]. `layout` is that of all caches; rows without one are held in it as well, from layer to layer.
  // With lanes a step sees a few rows at a time, on one thread; those of sequences that go apart lie in the lane's own
  // buffers, since a core's prefetcher takes what follows its rows from the core that has them. Uses the slots kCos and
  // kSin.
  void run(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, int steps, const Step& step, Lanes* lanes);
  // Turns k, and q where it is wanted, of `rows` rows of the chunk from `first` on, and puts k and v where the layer's
  // keys and values go; qkv is the first's. Threads may share out the rows.
  void append(Context& ctx, int layer, int64_t first, int64_t rows, float* qkv, bool queries) const;
  // The same after the norms of each head of q and k, of which k's stay where they are.
  void append(Context& ctx, int layer, int64_t first, int64_t rows, float* qkv, bool queries, const LayerNorm& q_norm,
              const LayerNorm& k_norm) const;

  int64_t width() const { return int64_t{heads_} * head_dim_; }

 private:
  void begin(Context& ctx, const LatentChunk& chunk, const KvLayout& layout);
  void place(const LatentChunk& chunk, int64_t first, int64_t rows, const Place& place);
  struct Division {
    double lateness = 0, work = 0;
  };
  class Pace {
   public:
    bool apart(const Division& d);
    void took(bool apart, double ns, const Division& d);

   private:
    double ns_[2] = {0, 0};  // a unit of work, together and apart; 0: not tried yet
    int calls_ = 0;
  };
  Division divide(const LatentChunk& chunk, const AttentionPlan& plan, int64_t threads);
  template <class T>
  std::span<const T> of_layer(const std::vector<T>& all, int64_t layer) const {
    return std::span<const T>(all).subspan(static_cast<size_t>(layer) * parts_, parts_);
  }

  RopeTable rope_;
  Pairs pairs_;
  int rope_dim_, layers_, heads_, head_dim_;
  int64_t block_, row_weights_;
  const float *cos_ = nullptr, *sin_ = nullptr;  // of the chunk's rows
  // Keys and values of parts without a cache, of one layer.
  Buffer pages_;
  std::vector<std::byte*> page_list_;
  KvLayout layout_;
  // Of the chunk's parts, layer after layer: what is appended to, what is attended to, and the heads of both.
  size_t parts_ = 0;
  std::vector<KvRows> rows_;
  std::vector<AttentionSequence> sequences_;
  std::vector<KvHeadView> before_, after_;
  std::vector<Lanes::Piece> pieces_;
  Pace pace_;
};

}  // namespace lacuna

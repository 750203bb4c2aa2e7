#pragma once

#include <cstdint>
#include <map>
#include <span>

#include "formats/rope.h"
#include "kernels/context.h"

namespace lacuna {

// Cosines and sines of rotary embedding by position, in blocks of positions that are filled when one of them is first
// used, and shared by all layers. Angles are formed in f32, as the references form them.
class RopeTable {
 public:
  RopeTable(const RopeConfig& config, int head_dim, int64_t max_position);

  // cos, sin [count, d/2] for positions first … first + count - 1 of a sequence of `sequence_length`
  // positions in all (which only dynamic scaling looks at). Valid until the next call.
  struct Rows {
    const float* cos;
    const float* sin;
  };
  Rows rows(Context& ctx, int64_t first, int64_t count, int64_t sequence_length);

  std::span<const float> inv_freq() const { return base_.inv_freq; }
  float factor() const { return base_.attention_factor; }

 private:
  static constexpr int64_t kBlock = 1024;
  // cos [kBlock, d/2], then sin, of positions index * kBlock, …
  const float* block(Context& ctx, int64_t index);
  static void fill(const RopeFrequencies& f, int64_t first, int64_t count, float* cos, float* sin);

  RopeConfig config_;
  int head_dim_;
  int64_t max_position_;
  RopeFrequencies base_;
  std::map<int64_t, Buffer> blocks_;
  Buffer gathered_;  // rows of several blocks, or of a dynamically scaled sequence
};

}  // namespace lacuna

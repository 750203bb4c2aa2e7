#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "formats/rope.h"
#include "kernels/context.h"

namespace lacuna {

// Cosines and sines of rotary embedding by position, grown as positions are used and shared by all
// layers. Angles are formed in f32, as the references form them.
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
  void grow(Context& ctx, int64_t positions);
  static void fill(const RopeFrequencies& f, int64_t first, int64_t count, float* cos, float* sin);

  RopeConfig config_;
  int head_dim_;
  int64_t max_position_;
  RopeFrequencies base_;
  int64_t filled_ = 0;
  Buffer cos_, sin_, far_;  // far_: rows of a dynamically scaled sequence
};

}  // namespace lacuna

#pragma once

#include <cstdint>
#include <vector>

#include "kernels/context.h"

namespace lacuna {

struct RecurrentShape {
  struct Layer {
    int heads = 0;  // states; 0: a layer without a recurrent state
    int key_dim = 0;
    int value_dim = 0;
  };
  std::vector<Layer> layers;
};

// Recurrent states of one sequence: S [heads, key_dim, value_dim] f32 for every layer that has one, zero
// at first. Its size does not depend on the tokens read. Bytes are charged to MemoryTag::kState.
class RecurrentState {
 public:
  RecurrentState() = default;  // no layers
  RecurrentState(MemoryAccount& account, RecurrentShape shape);

  const RecurrentShape& shape() const { return shape_; }
  bool has(int layer) const { return layer < static_cast<int>(offsets_.size()) && shape_.layers[static_cast<size_t>(layer)].heads > 0; }
  float* at(int layer);              // [heads, key_dim, value_dim]
  const float* at(int layer) const;
  int64_t elements(int layer) const;
  size_t bytes() const { return buffer_.bytes(); }
  // A second state with the same contents: what keeps a prefix for reuse.
  RecurrentState copy(MemoryAccount& account) const;

 private:
  RecurrentShape shape_;
  std::vector<int64_t> offsets_;  // of each layer's state, in floats
  Buffer buffer_;
};

}  // namespace lacuna

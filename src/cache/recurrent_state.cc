#include "cache/recurrent_state.h"

#include <cstring>

#include "base/error.h"

namespace lacuna {

RecurrentState::RecurrentState(MemoryAccount& account, RecurrentShape shape) : shape_(std::move(shape)) {
  int64_t total = 0;
  for (size_t i = 0; i < shape_.layers.size(); ++i) {
    offsets_.push_back(total);
    total += elements(static_cast<int>(i));
  }
  buffer_ = Buffer(account, MemoryTag::kState, static_cast<size_t>(total) * sizeof(float));
  if (total) std::memset(buffer_.as<float>(), 0, buffer_.bytes());
}

float* RecurrentState::at(int layer) {
  LACUNA_CHECK(has(layer));
  return buffer_.as<float>() + offsets_[static_cast<size_t>(layer)];
}

const float* RecurrentState::at(int layer) const {
  LACUNA_CHECK(has(layer));
  return buffer_.as<float>() + offsets_[static_cast<size_t>(layer)];
}

int64_t RecurrentState::elements(int layer) const {
  const RecurrentShape::Layer& l = shape_.layers[static_cast<size_t>(layer)];
  return int64_t{l.heads} * l.key_dim * l.value_dim;
}

RecurrentState RecurrentState::copy(MemoryAccount& account) const {
  RecurrentState other(account, shape_);
  if (bytes()) std::memcpy(other.buffer_.as<float>(), buffer_.as<float>(), bytes());
  return other;
}

}  // namespace lacuna

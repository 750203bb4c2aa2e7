#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"

namespace lacuna {

// A small generator whose stream is the same on every platform and compiler (the standard library
// fixes its engines but not its distributions): splitmix64, Steele et al. 2014.
class EvalRandom {
 public:
  explicit EvalRandom(uint64_t seed) : state_(seed) {}
  // A stream of its own for every combination of keys, so that prompt i is the same prompt whatever
  // else was generated before it.
  EvalRandom(std::initializer_list<uint64_t> keys) : state_(0x6c6163756e61ull) {
    for (uint64_t key : keys) {
      state_ ^= key;
      state_ = next();
    }
  }

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  // Uniform in [0, bound); multiply-shift, whose bias of bound / 2^64 is far below any sample here.
  int64_t below(int64_t bound) {
    LACUNA_CHECK(bound > 0);
    return static_cast<int64_t>((static_cast<unsigned __int128>(next()) * static_cast<uint64_t>(bound)) >> 64);
  }
  // Uniform in [low, high], both included.
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[static_cast<size_t>(below(static_cast<int64_t>(i)))]);
  }
  template <typename T>
  const T& pick(const std::vector<T>& items) {
    return items[static_cast<size_t>(below(static_cast<int64_t>(items.size())))];
  }
  // `count` different items in random order.
  template <typename T>
  std::vector<T> sample(const std::vector<T>& items, size_t count) {
    LACUNA_CHECK(count <= items.size());
    std::vector<T> pool = items;
    for (size_t i = 0; i < count; ++i) std::swap(pool[i], pool[i + static_cast<size_t>(below(static_cast<int64_t>(pool.size() - i)))]);
    pool.resize(count);
    return pool;
  }

 private:
  uint64_t state_;
};

// FNV-1a: names as keys of a random stream.
inline uint64_t hash_name(std::string_view name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : name) h = (h ^ c) * 0x100000001b3ull;
  return h;
}

}  // namespace lacuna

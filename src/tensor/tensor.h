#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/error.h"
#include "tensor/dtype.h"

namespace lacuna {

// A view of a dense row-major array; owns nothing.
struct Tensor {
  static constexpr int kMaxRank = 5;
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};

  Tensor() = default;
  Tensor(const void* d, DType t, std::initializer_list<int64_t> s) : data(d), dtype(t), rank(static_cast<int>(s.size())) {
    LACUNA_CHECK(s.size() <= kMaxRank);
    int i = 0;
    for (int64_t x : s) shape[i++] = x;
  }

  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  size_t bytes() const { return static_cast<size_t>(elements()) * dtype_size(dtype); }
  explicit operator bool() const { return data != nullptr; }
  template <typename T>
  const T* as() const { return static_cast<const T*>(data); }
  std::string shape_string() const {  // "[8192, 384]"
    std::string s = "[";
    for (int i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
  }
};

}  // namespace lacuna

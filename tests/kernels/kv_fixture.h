// What the kernel tests share: instruction sets, random values, an engine to run ops in; and KV heads made by hand, with
// the values that their codes stand for, which attention is checked against. Nothing here calls the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/isa.h"

namespace lacuna::testing {

inline std::vector<Isa> isa_levels() {
  std::vector<Isa> levels;
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) levels.push_back(static_cast<Isa>(i));
  return levels;
}

inline std::vector<float> normals(size_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& f : x) f = normal(rng);
  return x;
}

struct Engine {
  explicit Engine(int threads = 2, ActivationType activations = ActivationType::kF32) : ctx(memory, threads) {
    ctx.activations = activations;
  }
  MemoryAccount memory;
  Context ctx;
};

// One head's pages, and its decoded contents.
class Head {
 public:
  Head(const KvLayout& layout, int64_t capacity) : layout_(layout) {
    const auto count = static_cast<size_t>((capacity + layout.page_slots - 1) / layout.page_slots);
    bytes_.resize(count);
    for (auto& page : bytes_) {
      // Unused slots hold NaN: whatever reads them shows.
      page.assign(layout.page_bytes() + 64, std::byte{0xff});
      auto address = reinterpret_cast<uintptr_t>(page.data());
      pages_.push_back(page.data() + (64 - address % 64) % 64);
    }
  }

  KvHeadView view() const { return {pages_.data(), length_}; }
  int64_t length() const { return length_; }
  int32_t position(int64_t i) const { return positions[static_cast<size_t>(i)]; }

  // Encodes one slot by the layout's definition.
  void push(const float* k_row, const float* v_row, int32_t position) {
    put(k_row, layout_.k_offset(), layout_.k_scale_offset(), k);
    put(v_row, layout_.v_offset(), layout_.v_scale_offset(), v);
    std::memcpy(at(layout_.position_offset(), 4), &position, 4);
    positions.push_back(position);
    ++length_;
  }

  // The bytes of a slot, in the order K, V, position, scales; also of one behind those pushed.
  std::vector<std::byte> slot_bytes(int64_t slot) const {
    std::vector<std::byte> out;
    const size_t row = static_cast<size_t>(layout_.head_dim) * dtype_size(layout_.dtype);
    const auto add = [&](size_t part, size_t bytes) {
      const std::byte* p = pages_[static_cast<size_t>(slot / layout_.page_slots)] + part +
                           static_cast<size_t>(slot % layout_.page_slots) * bytes;
      out.insert(out.end(), p, p + bytes);
    };
    add(layout_.k_offset(), row);
    add(layout_.v_offset(), row);
    add(layout_.position_offset(), 4);
    if (layout_.dtype == DType::kI8) {
      add(layout_.k_scale_offset(), 4);
      add(layout_.v_scale_offset(), 4);
    }
    return out;
  }

  std::vector<double> k, v;  // [length, d]
  std::vector<int32_t> positions;

 private:
  std::byte* at(size_t part, size_t bytes) const {
    return pages_[static_cast<size_t>(length_ / layout_.page_slots)] + part +
           static_cast<size_t>(length_ % layout_.page_slots) * bytes;
  }
  void put(const float* x, size_t part, size_t scale_part, std::vector<double>& decoded) {
    const auto d = static_cast<size_t>(layout_.head_dim);
    std::byte* out = at(part, d * dtype_size(layout_.dtype));
    float scale = 0;
    if (layout_.dtype == DType::kI8) {
      for (size_t i = 0; i < d; ++i) scale = std::max(scale, std::fabs(x[i]) / 127.0f);
      std::memcpy(at(scale_part, 4), &scale, 4);
    }
    for (size_t i = 0; i < d; ++i) {
      if (layout_.dtype == DType::kF32) {
        std::memcpy(out + 4 * i, x + i, 4);
        decoded.push_back(x[i]);
      } else if (layout_.dtype == DType::kBF16) {
        const BF16 code = to_bf16(x[i]);
        std::memcpy(out + 2 * i, &code, 2);
        decoded.push_back(to_float(code));
      } else {
        // A subnormal scale is too coarse for |code| <= 127 to follow from its definition.
        const float q = scale > 0 ? std::clamp(std::nearbyint(x[i] / scale), -127.0f, 127.0f) : 0;
        const auto code = static_cast<int8_t>(q);
        std::memcpy(out + i, &code, 1);
        decoded.push_back(static_cast<double>(code) * scale);
      }
    }
  }

  KvLayout layout_;
  std::vector<std::vector<std::byte>> bytes_;
  std::vector<std::byte*> pages_;
  int64_t length_ = 0;
};

// `old` slots at random increasing positions below `first_position`, then `tokens` new ones from there.
inline Head random_head(const KvLayout& layout, int64_t old, int64_t tokens, int64_t first_position, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> positions(static_cast<size_t>(first_position));
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int32_t>(i);
  std::shuffle(positions.begin(), positions.end(), rng);
  positions.resize(static_cast<size_t>(old));
  std::sort(positions.begin(), positions.end());
  for (int64_t t = 0; t < tokens; ++t) positions.push_back(static_cast<int32_t>(first_position + t));

  Head head(layout, old + tokens);
  const auto d = static_cast<size_t>(layout.head_dim);
  const std::vector<float> k = normals(positions.size() * d, seed + 1), v = normals(positions.size() * d, seed + 2);
  for (size_t i = 0; i < positions.size(); ++i) head.push(&k[i * d], &v[i * d], positions[i]);
  return head;
}

// Softmax rows of queries q [tokens, d], rows `stride` apart, in double: [tokens, length].
inline std::vector<double> exact_rows(const Head& head, int d, const float* q, int64_t tokens, int64_t stride,
                                      int64_t first_position, double scale, int64_t window) {
  const int64_t n = head.length();
  std::vector<double> rows(static_cast<size_t>(tokens * n), 0.0);
  for (int64_t t = 0; t < tokens; ++t) {
    double* row = &rows[static_cast<size_t>(t * n)];
    double max = -1e300, sum = 0;
    const auto seen = [&](int64_t i) {
      return i <= n - tokens + t && (window == 0 || head.position(i) > first_position + t - window);
    };
    for (int64_t i = 0; i < n; ++i) {
      if (!seen(i)) continue;
      for (int c = 0; c < d; ++c) row[i] += q[t * stride + c] * head.k[static_cast<size_t>(i * d + c)];
      row[i] *= scale;
      max = std::max(max, row[i]);
    }
    for (int64_t i = 0; i < n; ++i)
      if (seen(i)) sum += row[i] = std::exp(row[i] - max);
    for (int64_t i = 0; i < n; ++i) row[i] /= sum;
  }
  return rows;
}

// Attention of one sequence in double: [tokens, H, d].
inline std::vector<double> exact_attention(const std::vector<Head>& heads, int d, int group, const float* q,
                                           int64_t tokens, int64_t first_position, double scale, int64_t window) {
  const auto kv_heads = static_cast<int64_t>(heads.size()), stride = kv_heads * group * d;
  std::vector<double> out(static_cast<size_t>(tokens * stride), 0.0);
  for (int64_t h = 0; h < kv_heads * group; ++h) {
    const Head& head = heads[static_cast<size_t>(h / group)];
    const auto rows = exact_rows(head, d, q + h * d, tokens, stride, first_position, scale, window);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < head.length(); ++i)
        for (int c = 0; c < d; ++c)
          out[static_cast<size_t>(t * stride + h * d + c)] +=
              rows[static_cast<size_t>(t * head.length() + i)] * head.v[static_cast<size_t>(i * d + c)];
  }
  return out;
}

inline double max_error(const std::vector<float>& got, const std::vector<double>& expected) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double e = std::fabs(got[i] - expected[i]);
    if (!(e <= worst)) worst = e;  // NaN too
    if (std::isnan(e)) return e;
  }
  return worst;
}

}  // namespace lacuna::testing

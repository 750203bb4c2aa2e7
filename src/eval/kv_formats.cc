#include "eval/kv_formats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace lacuna {
namespace {

constexpr int kGroup = 32;

int bits_of(KvFormat format) {
  switch (format) {
    case KvFormat::kInt4: return 4;
    case KvFormat::kInt3: return 3;
    default: return 2;
  }
}

// To f16's 11 significant bits, half to even; scales and minima never leave f16's exponents.
float round_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((u + 0xfffu + ((u >> 13) & 1u)) & ~0x1fffu);
}

// One row of keys or values of a slot, read and written as f32.
struct SlotRow {
  std::byte* data;
  DType dtype;
  float get(int i) const {
    if (dtype == DType::kF32) return reinterpret_cast<const float*>(data)[i];
    return to_float(reinterpret_cast<const BF16*>(data)[i]);
  }
  void set(int i, float x) const {
    if (dtype == DType::kF32) reinterpret_cast<float*>(data)[i] = x;
    else reinterpret_cast<BF16*>(data)[i] = to_bf16(x);
  }
};

SlotRow row_of(const KvLayout& l, const KvHeadView& head, int64_t slot, bool values) {
  std::byte* page = head.pages[slot / l.page_slots];
  const size_t bytes = static_cast<size_t>(l.head_dim) * dtype_size(l.dtype);
  return {page + (values ? l.v_offset() : l.k_offset()) + static_cast<size_t>(slot % l.page_slots) * bytes, l.dtype};
}

void round_int8(const SlotRow& row, int d) {
  float top = 0;
  for (int i = 0; i < d; ++i) top = std::max(top, std::fabs(row.get(i)));
  const float scale = top / 127.0f;
  for (int i = 0; i < d; ++i) row.set(i, scale > 0 ? std::nearbyint(row.get(i) / scale) * scale : 0.0f);
}

// count values reached through get and set, as one group.
template <typename Get, typename Set>
void round_group(int64_t count, int bits, Get&& get, Set&& set) {
  float low = get(0), high = get(0);
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, get(i));
    high = std::max(high, get(i));
  }
  const float levels = static_cast<float>((1 << bits) - 1);
  const float minimum = round_f16(low), scale = round_f16((high - low) / levels);
  for (int64_t i = 0; i < count; ++i) {
    const float code = scale > 0 ? std::clamp(std::nearbyint((get(i) - minimum) / scale), 0.0f, levels) : 0.0f;
    set(i, minimum + code * scale);
  }
}

}  // namespace

KvFormat parse_kv_format(std::string_view name) {
  for (KvFormat f : {KvFormat::kInt8, KvFormat::kInt4, KvFormat::kInt3, KvFormat::kInt2})
    if (name == kv_format_name(f)) return f;
  throw BadInput("there is no KV format \"{}\"; known: int8, int4, int3, int2", name);
}

std::string_view kv_format_name(KvFormat format) {
  switch (format) {
    case KvFormat::kNative: return "";
    case KvFormat::kInt8: return "int8";
    case KvFormat::kInt4: return "int4";
    case KvFormat::kInt3: return "int3";
    case KvFormat::kInt2: return "int2";
  }
  return "";
}

void round_to_format(KvCache& cache, KvFormat format) {
  if (format == KvFormat::kNative) return;
  if (cache.shape().dtype != DType::kF32 && cache.shape().dtype != DType::kBF16)
    throw BadInput("KV formats are compared on an f32 or bf16 cache, this one is {}", dtype_name(cache.shape().dtype));
  for (int layer = 0; layer < cache.layers(); ++layer) {
    const KvLayout& l = cache.layout(layer);
    const int d = l.head_dim;
    for (int h = 0; h < cache.kv_heads(layer); ++h) {
      const KvHeadView& head = cache.view(layer, h);
      if (format == KvFormat::kInt8) {
        for (int64_t s = 0; s < head.length; ++s)
          for (bool values : {false, true}) round_int8(row_of(l, head, s, values), d);
        continue;
      }
      const int bits = bits_of(format);
      for (int64_t first = 0; first < head.length; first += kGroup) {
        const int64_t slots = std::min<int64_t>(kGroup, head.length - first);
        for (int c = 0; c < d; ++c)
          round_group(slots, bits, [&](int64_t i) { return row_of(l, head, first + i, false).get(c); },
                      [&](int64_t i, float x) { row_of(l, head, first + i, false).set(c, x); });
      }
      for (int64_t s = 0; s < head.length; ++s) {
        const SlotRow row = row_of(l, head, s, true);
        for (int first = 0; first < d; first += kGroup)
          round_group(std::min(kGroup, d - first), bits, [&](int64_t i) { return row.get(first + static_cast<int>(i)); },
                      [&](int64_t i, float x) { row.set(first + static_cast<int>(i), x); });
      }
    }
  }
}

size_t format_bytes(const KvCache& cache, KvFormat format) {
  if (format == KvFormat::kNative) return cache.used_bytes();
  size_t bytes = 0;
  for (int layer = 0; layer < cache.layers(); ++layer) {
    const size_t d = static_cast<size_t>(cache.layout(layer).head_dim);
    for (int h = 0; h < cache.kv_heads(layer); ++h) {
      const size_t slots = static_cast<size_t>(cache.length(layer, h));
      if (format == KvFormat::kInt8) {
        bytes += slots * KvLayout{DType::kI8, static_cast<int>(d)}.slot_bytes();
        continue;
      }
      const size_t codes = (2 * d * static_cast<size_t>(bits_of(format)) + 7) / 8;
      const size_t key_groups = (slots + kGroup - 1) / kGroup * d, value_groups = slots * ((d + kGroup - 1) / kGroup);
      bytes += slots * (codes + sizeof(int32_t)) + (key_groups + value_groups) * 4;
    }
  }
  return bytes;
}

}  // namespace lacuna

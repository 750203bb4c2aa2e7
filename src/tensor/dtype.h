// tensor: dtype, shape, Tensor (a view), Buffer (owns memory, tagged by what it is for).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lacuna {

enum class DType : uint8_t { kF32, kF16, kBF16, kI8, kU8, kI16, kI32, kI64, kF64, kBool, kU16, kU32, kU64 };

// Bytes of one element.
size_t dtype_size(DType dtype);
// "f32", "bf16", …
std::string_view dtype_name(DType dtype);

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float to_float(BF16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
float to_float(F16 x);

// Round to nearest even; NaN stays NaN.
inline BF16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BF16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return BF16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
// Round to nearest even, beyond 65504 to infinity; NaN stays NaN.
F16 to_f16(float x);

}  // namespace lacuna

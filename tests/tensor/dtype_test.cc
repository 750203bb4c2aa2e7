#include "tensor/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace lacuna {
namespace {

TEST(F16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const F16 x{static_cast<uint16_t>(bits)};
    const float f = to_float(x);
    if (std::isnan(f))
      EXPECT_TRUE(std::isnan(to_float(to_f16(f)))) << bits;
    else
      EXPECT_EQ(to_f16(f).bits, x.bits) << bits;
  }
}

// Between two neighbours: the nearer one, and the even one from the middle.
TEST(F16, RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7bffu; ++bits) {
    const float low = to_float(F16{static_cast<uint16_t>(bits)}), high = to_float(F16{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;  // exact: f32 has 13 more bits
    const uint32_t even = bits & 1 ? bits + 1 : bits;
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      ASSERT_EQ(to_f16(s * middle).bits, sign | even) << bits;
      ASSERT_EQ(to_f16(s * std::nextafter(middle, low)).bits, sign | bits) << bits;
      ASSERT_EQ(to_f16(s * std::nextafter(middle, high)).bits, sign | (bits + 1)) << bits;
    }
  }
  EXPECT_EQ(to_f16(65519.996f).bits, 0x7bff);
  EXPECT_EQ(to_f16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_f16(-1e30f).bits, 0xfc00);
  EXPECT_EQ(to_f16(std::numeric_limits<float>::infinity()).bits, 0x7c00);
  EXPECT_EQ(to_f16(std::numeric_limits<float>::denorm_min()).bits, 0);
}

}  // namespace
}  // namespace lacuna

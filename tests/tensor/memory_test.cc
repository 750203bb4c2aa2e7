#include "tensor/memory.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "tensor/dtype.h"

namespace lacuna {
namespace {

TEST(MemoryAccount, CountsByTagAndKeepsPeaks) {
  MemoryAccount account;
  {
    Buffer a(account, MemoryTag::kKv, 1000);
    Buffer b(account, MemoryTag::kScratch, 64);
    EXPECT_EQ(account.now(MemoryTag::kKv), 1000u);
    Buffer moved = std::move(a);
    EXPECT_FALSE(a);
    EXPECT_EQ(account.now(MemoryTag::kKv), 1000u);
  }
  EXPECT_EQ(account.now(MemoryTag::kKv), 0u);
  EXPECT_EQ(account.peak(MemoryTag::kKv), 1000u);
  EXPECT_EQ(account.peak(MemoryTag::kScratch), 64u);
}

TEST(MemoryAccount, LimitIsHardAndNamed) {
  MemoryAccount account;
  account.set_limit(MemoryTag::kKv, 1000);
  Buffer a(account, MemoryTag::kKv, 600);
  try {
    Buffer b(account, MemoryTag::kKv, 401);
    FAIL() << "the limit let 1001 bytes through";
  } catch (const OutOfMemory& e) {
    const std::string what = e.what();
    for (const char* part : {"kv", "401", "600", "1000"}) EXPECT_NE(what.find(part), std::string::npos) << what;
  }
  Buffer c(account, MemoryTag::kKv, 400);  // the failed request left nothing behind
  EXPECT_EQ(account.peak(MemoryTag::kKv), 1000u);
}

TEST(MemoryAccount, TotalLimitSpansTags) {
  MemoryAccount account;
  account.set_total_limit(1000);
  Buffer a(account, MemoryTag::kKv, 600);
  EXPECT_THROW(Buffer(account, MemoryTag::kScratch, 500), OutOfMemory);
  EXPECT_EQ(account.now(MemoryTag::kScratch), 0u);
  Buffer b(account, MemoryTag::kScratch, 400);
}

TEST(MemoryAccount, AbsurdRequestIsAnError) {
  MemoryAccount account;
  EXPECT_THROW(Buffer(account, MemoryTag::kKv, size_t{1} << 60), OutOfMemory);
}

TEST(DType, Bf16RoundsToNearestEven) {
  EXPECT_EQ(to_bf16(1.0f).bits, 0x3f80);
  EXPECT_EQ(to_bf16(1.00390625f).bits, 0x3f80);   // halfway, even below
  EXPECT_EQ(to_bf16(1.01171875f).bits, 0x3f82);   // halfway, even above
  EXPECT_TRUE(std::isnan(to_float(to_bf16(NAN))));
  EXPECT_TRUE(std::isinf(to_float(to_bf16(3.4e38f))));
}

TEST(DType, F16CoversSubnormalsAndSpecials) {
  EXPECT_EQ(to_float(F16{0x3c00}), 1.0f);
  EXPECT_EQ(to_float(F16{0x0001}), std::ldexp(1.0f, -24));
  EXPECT_EQ(to_float(F16{0x83ff}), -std::ldexp(1023.0f, -24));
  EXPECT_EQ(to_float(F16{0x7bff}), 65504.0f);
  EXPECT_TRUE(std::isinf(to_float(F16{0xfc00})));
  EXPECT_TRUE(std::isnan(to_float(F16{0x7e01})));
}

}  // namespace
}  // namespace lacuna

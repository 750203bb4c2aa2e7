#include "models/rope_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace lacuna {
namespace {

constexpr int kDim = 8;

void expect_rows(RopeTable& table, Context& ctx, int64_t first, int64_t count) {
  SCOPED_TRACE(std::to_string(count) + " from " + std::to_string(first));
  const RopeTable::Rows rows = table.rows(ctx, first, count, first + count);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kDim / 2; ++j) {
      const double angle = static_cast<float>(first + i) * table.inv_freq()[static_cast<size_t>(j)];
      ASSERT_EQ(rows.cos[i * kDim / 2 + j], static_cast<float>(std::cos(angle))) << i << " " << j;
      ASSERT_EQ(rows.sin[i * kDim / 2 + j], static_cast<float>(std::sin(angle))) << i << " " << j;
    }
}

// Near and far, in any order, within blocks of the table, at their ends and over several.
TEST(RopeTable, IsTheSameInWhateverOrderPositionsAreUsed) {
  for (const int threads : {1, 3}) {
    MemoryAccount memory;
    Context ctx(memory, threads);
    RopeTable table(RopeConfig{}, kDim, std::numeric_limits<int32_t>::max());
    for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {1023, 1}, {1023, 2}, {700, 3000}, {262143, 1}, {262143, 5},
                                       {5, 12}, {4096, 1024}, {1 << 30, 3}, {1024, 1}, {2047, 4096}})
      expect_rows(table, ctx, first, count);
  }
}

// A state that was saved far in costs one block, not all positions before it.
TEST(RopeTable, FarPositionsCostNoMoreThanNearOnes) {
  const auto bytes = [](int64_t first) {
    MemoryAccount memory;
    Context ctx(memory, 1);
    RopeTable table(RopeConfig{}, kDim, std::numeric_limits<int32_t>::max());
    table.rows(ctx, first, 1, first + 1);
    return memory.now(MemoryTag::kActivations);
  };
  EXPECT_EQ(bytes(1 << 24), bytes(0));
}

}  // namespace
}  // namespace lacuna

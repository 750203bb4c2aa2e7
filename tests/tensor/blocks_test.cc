#include "tensor/blocks.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace lacuna {
namespace {

TEST(Blocks, AreAlignedApartAndReused) {
  EXPECT_TRUE(rc::check([] {
    struct Block {
      unsigned char* data;
      size_t bytes;
      unsigned char mark;
    };
    std::vector<Block> held;
    const auto intact = [](const Block& b) {
      for (size_t i = 0; i < b.bytes; ++i)
        if (b.data[i] != b.mark) return false;
      return true;
    };
    const auto steps = *rc::gen::inRange(1, 400);
    for (int i = 0; i < steps; ++i) {
      if (!held.empty() && *rc::gen::inRange(0, 3) == 0) {
        const auto at = *rc::gen::inRange<size_t>(0, held.size());
        RC_ASSERT(intact(held[at]));
        give_block(held[at].data, held[at].bytes);
        held[at] = held.back();
        held.pop_back();
        continue;
      }
      const size_t bytes = *rc::gen::element<size_t>(0, 1, 1023, 1024, 4736, 4700, 131072, 131073, 3 << 20);
      auto* data = static_cast<unsigned char*>(take_block(bytes));
      RC_ASSERT(data != nullptr);
      RC_ASSERT(reinterpret_cast<uintptr_t>(data) % 64 == 0u);
      held.push_back({data, bytes, static_cast<unsigned char>(i)});
      std::memset(data, held.back().mark, bytes);
    }
    for (const Block& b : held) {
      RC_ASSERT(intact(b));
      give_block(b.data, b.bytes);
    }
  }));
}

}  // namespace
}  // namespace lacuna

#include "kernels/machine.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "kernels/cpu/isa.h"

namespace lacuna {
namespace {

TEST(Machine, RatesArePlausibleOnEveryLevel) {
  MemoryAccount memory;
  Context ctx(memory);
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (isa > detected_isa()) continue;
    ScopedIsa scoped(isa);
    const MachineLimits limits = measure_machine(ctx, 0.06, size_t{8} << 20);
    EXPECT_EQ(limits.isa.rfind(isa_name(isa), 0), 0u) << limits.isa;
    EXPECT_GT(limits.read_bytes_per_s, 1e8);
    EXPECT_LT(limits.read_bytes_per_s, 1e14);
    EXPECT_GT(limits.f32_flops_per_s, 1e8);
    EXPECT_LT(limits.f32_flops_per_s, 1e15);
    EXPECT_GT(limits.bf16_flops_per_s, 1e8);
    EXPECT_EQ(limits.int8_ops_per_s > 0, isa >= Isa::kAvx512);
  }
}

TEST(Machine, GivesItsBufferBack) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  measure_machine(ctx, 0.02, size_t{2} << 20);
  EXPECT_EQ(memory.now(MemoryTag::kScratch), 0u);
  EXPECT_EQ(memory.peak(MemoryTag::kScratch), size_t{2} << 20);
}

TEST(Machine, RefusesWhatCannotBeMeasured) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  EXPECT_THROW(measure_machine(ctx, 0.0), BadInput);
  EXPECT_THROW(measure_machine(ctx, 0.1, 4096), BadInput);
}

}  // namespace
}  // namespace lacuna

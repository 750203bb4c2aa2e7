#pragma once

#include <string>

#include "kernels/context.h"

namespace lacuna {

// What this machine can do, measured now on the context's threads: the limits that every printed
// rate stands beside.
struct MachineLimits {
  double read_bytes_per_s = 0;    // streaming read over a buffer several times the last-level cache
  double f32_flops_per_s = 0;     // fused multiply-adds in registers, f32, widest vectors (2 flops each)
  double bf16_flops_per_s = 0;    // bf16 pair dot products with f32 accumulation; = f32 path where absent
  double int8_ops_per_s = 0;      // int8 quad dot products (VNNI); 0 where absent
  std::string isa;                // "avx512_bf16+vnni", "avx2", …
};

// Takes about `seconds` in all. buffer_bytes is the working set of the read test.
MachineLimits measure_machine(Context& ctx, double seconds = 0.6, size_t buffer_bytes = size_t{256} << 20);

}  // namespace lacuna

// What the kernel benchmarks share: one engine, a clock that neighbours do not stretch, and the machine's limits.
#pragma once

#include <time.h>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "kernels/machine.h"

namespace lacuna {

// LACUNA_BENCH_THREADS threads; 0 or unset = every core this process may use.
struct Bench {
  static int threads() {
    const char* wish = std::getenv("LACUNA_BENCH_THREADS");
    return wish ? std::max(0, std::atoi(wish)) : 0;
  }
  MemoryAccount memory;
  Context ctx{memory, threads()};
};
inline Bench& bench() {
  static Bench b;
  return b;
}

// Seconds. With one thread its own processor time, which other processes do not stretch.
inline double now() {
  timespec t;
  clock_gettime(bench().ctx.pool.size() > 1 ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Of a benchmark's calls.
template <typename Call>
double median_seconds(benchmark::State& state, const Call& call) {
  std::vector<double> seconds;
  for (auto _ : state) {
    const double start = now();
    call();
    seconds.push_back(now() - start);
  }
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<int64_t>(seconds.size() / 2), seconds.end());
  return seconds[seconds.size() / 2];
}

// Measured again for every benchmark: the best of several short looks, one of which the neighbours leave alone.
inline MachineLimits limits() {
  MachineLimits best;
  for (int i = 0; i < 24; ++i) {
    const MachineLimits m = measure_machine(bench().ctx, 0.02, size_t{64} << 20);
    best.read_bytes_per_s = std::max(best.read_bytes_per_s, m.read_bytes_per_s);
    best.f32_flops_per_s = std::max(best.f32_flops_per_s, m.f32_flops_per_s);
    best.bf16_flops_per_s = std::max(best.bf16_flops_per_s, m.bf16_flops_per_s);
  }
  return best;
}

}  // namespace lacuna

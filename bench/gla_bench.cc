// Gated linear attention against the machine: FLOP/s of prefill and GB/s of decode, each beside the limit
// measured in the same run. Rates are of the median call. LACUNA_BENCH_THREADS as in attention_bench.cc.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "bench.h"
#include "kernels/gla.h"

namespace lacuna {
namespace {

struct Last : TraceSink {
  void record(const OpRecord& r) override { last = r; }
  OpRecord last;
};

// `count` sequences of T tokens each.
struct Operands {
  Operands(const GlaShape& s, int64_t count, int64_t tokens) : shape(s) {
    std::minstd_rand random(1);
    const auto fill = [&](std::vector<float>& x, int64_t n, float scale, float shift) {
      x.resize(static_cast<size_t>(n));
      for (float& f : x) f = scale * (static_cast<float>(random() % 4001) / 2000.0f - 1.0f) + shift;
    };
    const int64_t q_row = int64_t{s.query_heads} * s.key_dim, k_row = int64_t{s.kv_heads} * s.key_dim,
                  v_row = int64_t{s.kv_heads} * s.value_dim, o_row = int64_t{s.query_heads} * s.value_dim;
    fill(q, count * tokens * q_row, 1, 0);
    fill(k, count * tokens * k_row, 1, 0);
    fill(v, count * tokens * v_row, 1, 0);
    fill(g, count * tokens * k_row, 0.03f, -0.04f);  // as trained gates start: 0.96 a token
    fill(state, count * k_row * s.value_dim, 1, 0);
    out.resize(static_cast<size_t>(count * tokens * o_row));
    for (int64_t i = 0; i < count; ++i)
      sequences.push_back({&q[static_cast<size_t>(i * tokens * q_row)], &k[static_cast<size_t>(i * tokens * k_row)],
                           &v[static_cast<size_t>(i * tokens * v_row)], &g[static_cast<size_t>(i * tokens * k_row)],
                           &out[static_cast<size_t>(i * tokens * o_row)], tokens,
                           &state[static_cast<size_t>(i * k_row * s.value_dim)]});
  }
  GlaShape shape;
  std::vector<float> q, k, v, g, state, out;
  std::vector<GlaSequence> sequences;
};

// Median seconds of a call and what it reported.
double time_call(benchmark::State& state, Operands& x, OpRecord* report) {
  Last trace;
  bench().ctx.trace = &trace;
  const double median = median_seconds(state, [&] { gated_linear_attention(bench().ctx, x.shape, x.sequences); });
  bench().ctx.trace = nullptr;
  *report = trace.last;
  return median;
}

GlaShape shape_of(int64_t group, int64_t kv_heads, int64_t d) {
  return {static_cast<int>(group * kv_heads), static_cast<int>(kv_heads), static_cast<int>(d), static_cast<int>(d),
          1.0f / std::sqrt(static_cast<float>(d))};
}

// Arguments: sequences, tokens, group, KV heads, d.
void gla_prefill(benchmark::State& state) {
  Operands x(shape_of(state.range(2), state.range(3), state.range(4)), state.range(0), state.range(1));
  const MachineLimits limit = limits();
  OpRecord report;
  const double seconds = time_call(state, x, &report);
  const double flops = 2.0 * static_cast<double>(report.macs) / seconds;
  state.counters["GFLOP/s"] = flops / 1e9;
  state.counters["share"] = flops / limit.f32_flops_per_s;
  state.counters["ns/token"] = 1e9 * seconds / static_cast<double>(report.m);
}

// Arguments: sequences, tokens, group, KV heads, d. Bytes are the states', read and written.
void gla_decode(benchmark::State& state) {
  Operands x(shape_of(state.range(2), state.range(3), state.range(4)), state.range(0), state.range(1));
  const MachineLimits limit = limits();
  OpRecord report;
  const double seconds = time_call(state, x, &report);
  const double bytes = static_cast<double>(report.state_bytes) / seconds;
  state.counters["GB/s"] = bytes / 1e9;
  state.counters["share"] = bytes / limit.read_bytes_per_s;
  state.counters["GFLOP/s"] = 2e-9 * static_cast<double>(report.macs) / seconds;
  state.counters["us"] = 1e6 * seconds;
}

BENCHMARK(gla_prefill)
    ->Args({1, 512, 7, 4, 128})
    ->Args({1, 4096, 7, 4, 128})
    ->Args({1, 512, 1, 4, 128})
    ->Args({1, 512, 1, 28, 128})
    ->Args({1, 512, 3, 2, 64})
    ->Args({8, 64, 7, 4, 128})
    ->UseRealTime();
// 128 MB of states and a 7B layer's single sequence.
BENCHMARK(gla_decode)
    ->Args({512, 1, 7, 4, 128})
    ->Args({512, 1, 1, 4, 128})
    ->Args({4096, 1, 3, 2, 64})
    ->Args({512, 2, 7, 4, 128})
    ->Args({1, 1, 7, 4, 128})
    ->UseRealTime();

}  // namespace
}  // namespace lacuna

// Attention against the machine: FLOP/s of prefill and GB/s of decode, each beside the limit measured
// in the same run. Rates are of the median call, so that another process's burst doesn't move them.
// LACUNA_BENCH_THREADS sets the threads (default: all cores). With 1 the clock is the thread's own
// processor time: on a machine that others use, the only one that repeats.
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "bench.h"
#include "cache/kv_cache.h"
#include "kernels/cpu/machine_bodies.h"
#include "kernels/elementwise.h"

namespace lacuna {
namespace {

std::vector<float> random_floats(int64_t n) {
  std::minstd_rand random(1);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& f : x) f = static_cast<float>(random() % 4001) / 1000.0f - 2.0f;
  return x;
}

// One sequence of `slots` slots in one layer.
KvCache filled_cache(DType dtype, int kv_heads, int d, int64_t slots) {
  KvCacheShape shape;
  shape.layers = {{kv_heads, d}};
  shape.dtype = dtype;
  KvCache cache(bench().memory, shape);
  const int64_t step = 512;
  const auto rows = random_floats(step * kv_heads * d);
  for (int64_t t = 0; t < slots; t += step)
    cache.append(bench().ctx, 0, rows.data(), rows.data(), std::min(step, slots - t), t);
  return cache;
}

// What the kernel reports of its last call: rates count what was really done.
struct Last : TraceSink {
  void record(const OpRecord& r) override { last = r; }
  OpRecord last;
};

void show_flops(benchmark::State& state, double seconds, double flops, double peak) {
  state.counters["ms"] = seconds * 1e3;
  state.counters["GFLOP/s"] = flops / seconds / 1e9;
  state.counters["of_peak_%"] = 100 * flops / seconds / peak;
}

void show_bytes(benchmark::State& state, double seconds, double bytes, double limit) {
  state.counters["us"] = seconds * 1e6;
  state.counters["GB/s"] = bytes / seconds / 1e9;
  state.counters["of_read_%"] = 100 * bytes / seconds / limit;
}

// Arguments: cache dtype, activations, T new tokens, slots, group, KV heads, d, window.
void prefill(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto dtype = static_cast<DType>(state.range(0));
  ctx.activations = static_cast<ActivationType>(state.range(1));
  const int64_t tokens = state.range(2), slots = state.range(3);
  const int group = static_cast<int>(state.range(4)), kv_heads = static_cast<int>(state.range(5));
  const int d = static_cast<int>(state.range(6));
  const KvCache cache = filled_cache(dtype, kv_heads, d, slots);
  const auto q = random_floats(tokens * group * kv_heads * d);
  std::vector<float> out(q.size());
  const AttentionShape shape{group * kv_heads, kv_heads, 1.0f / std::sqrt(static_cast<float>(d)), state.range(7)};
  const AttentionSequence sequence{q.data(), out.data(), tokens, slots - tokens, cache.views(0)};
  const MachineLimits limit = limits();
  Last trace;
  ctx.trace = &trace;
  const double seconds = median_seconds(state, [&] { attention(ctx, cache.layout(0), shape, {&sequence, 1}); });
  ctx.trace = nullptr;
  const bool pairs = ctx.activations == ActivationType::kBF16;
  show_flops(state, seconds, 2.0 * static_cast<double>(trace.last.macs),
             pairs ? limit.bf16_flops_per_s : limit.f32_flops_per_s);
  state.SetLabel(std::string(dtype_name(dtype)) + (pairs ? " cache, bf16" : " cache, f32"));
}

// One pass over a buffer on the bench's own clock, which measure_machine's wall clock is not when another
// process takes the core. Pieces as measure_machine cuts them.
double read_rate(const Buffer& buffer) {
  constexpr size_t kPiece = size_t{1} << 20;
  const auto body = cpu::machine_bodies().read;
  static std::atomic<float> sink;
  const double start = now();
  bench().ctx.pool.parallel_for(static_cast<int64_t>(buffer.bytes() / kPiece), [&](int64_t i, int) {
    sink = body(buffer.as<char>() + static_cast<size_t>(i) * kPiece, kPiece);
  });
  const double seconds = now() - start;
  return static_cast<double>(buffer.bytes()) / seconds;
}

// Arguments: cache dtype, sequences, slots, group, KV heads, d. Calls with operands in f32 and in bf16 take
// turns with looks at the memory, and the best of each counts: neighbours take memory by the second.
void decode(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto dtype = static_cast<DType>(state.range(0));
  const int64_t count = state.range(1), slots = state.range(2);
  const int group = static_cast<int>(state.range(3)), kv_heads = static_cast<int>(state.range(4));
  const int d = static_cast<int>(state.range(5));
  std::vector<KvCache> caches;
  for (int64_t i = 0; i < count; ++i) caches.push_back(filled_cache(dtype, kv_heads, d, slots));
  const int64_t row = static_cast<int64_t>(group) * kv_heads * d;
  const auto q = random_floats(count * row);
  std::vector<float> out(q.size());
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < count; ++i)
    sequences.push_back({&q[static_cast<size_t>(i * row)], &out[static_cast<size_t>(i * row)], 1, slots - 1,
                         caches[static_cast<size_t>(i)].views(0)});
  const AttentionShape shape{group * kv_heads, kv_heads, 1.0f / std::sqrt(static_cast<float>(d))};
  Buffer memory(bench().memory, MemoryTag::kScratch, size_t{128} << 20);
  std::memset(memory.as<char>(), 1, memory.bytes());
  Last trace;
  ctx.trace = &trace;
  double limit = 0, best[2] = {1e9, 1e9};
  for (auto _ : state) {
    limit = std::max(limit, read_rate(memory));
    for (const ActivationType operands : {ActivationType::kF32, ActivationType::kBF16}) {
      ctx.activations = operands;
      const double start = now();
      attention(ctx, caches[0].layout(0), shape, sequences);
      double& b = best[static_cast<int>(operands)];
      b = std::min(b, now() - start);
    }
  }
  ctx.trace = nullptr;
  ctx.activations = ActivationType::kBF16;
  const auto bytes = static_cast<double>(trace.last.kv_read_bytes);
  show_bytes(state, best[1], bytes, limit);
  state.counters["f32_GB/s"] = bytes / best[0] / 1e9;
  state.counters["read_GB/s"] = limit / 1e9;
  state.SetLabel(std::string(dtype_name(dtype)) + " cache");
}

// Arguments: cache dtype, slots, window rows, group, d.
void window_scores(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto dtype = static_cast<DType>(state.range(0));
  const int64_t slots = state.range(1), w = state.range(2);
  const int group = static_cast<int>(state.range(3)), d = static_cast<int>(state.range(4));
  const KvCache cache = filled_cache(dtype, 1, d, slots);
  const auto q = random_floats(w * group * d);
  std::vector<float> probs(static_cast<size_t>(w * group * slots));
  const MachineLimits limit = limits();
  const double seconds = median_seconds(state, [&] {
    window_attention(ctx, cache.layout(0), cache.view(0, 0), q.data(), w, group, 0, slots - w, 0.125f, 0, probs.data());
  });
  show_flops(state, seconds, 2.0 * static_cast<double>(w * group * slots * d), limit.f32_flops_per_s);
}

// Arguments: cache dtype, tokens, group, d.
void column_sums(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto dtype = static_cast<DType>(state.range(0));
  const int64_t tokens = state.range(1);
  const int group = static_cast<int>(state.range(2)), d = static_cast<int>(state.range(3));
  const KvCache cache = filled_cache(dtype, 1, d, tokens);
  const auto q = random_floats(tokens * group * d);
  std::vector<float> sums(static_cast<size_t>(tokens * group));
  const MachineLimits limit = limits();
  Last trace;
  ctx.trace = &trace;
  const double seconds = median_seconds(state, [&] {
    attention_column_sums(ctx, cache.layout(0), cache.view(0, 0), q.data(), tokens, group, 0, 0, 0.125f, 0, sums.data());
  });
  ctx.trace = nullptr;
  show_flops(state, seconds, 2.0 * static_cast<double>(trace.last.macs), limit.f32_flops_per_s);
}

// Arguments: cache dtype, tokens, KV heads, d.
void append(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto dtype = static_cast<DType>(state.range(0));
  const int64_t tokens = state.range(1);
  const int kv_heads = static_cast<int>(state.range(2)), d = static_cast<int>(state.range(3));
  const KvCache cache = filled_cache(dtype, kv_heads, d, tokens);
  const auto rows = random_floats(tokens * kv_heads * d);
  std::vector<KvHeadView> views(cache.views(0), cache.views(0) + kv_heads);
  for (KvHeadView& v : views) v.length = 0;
  const MachineLimits limit = limits();
  Last trace;
  ctx.trace = &trace;
  const double seconds = median_seconds(
      state, [&] { kv_append(ctx, cache.layout(0), views.data(), kv_heads, rows.data(), rows.data(), tokens, 0); });
  ctx.trace = nullptr;
  show_bytes(state, seconds, static_cast<double>(trace.last.activation_bytes + trace.last.kv_write_bytes),
             limit.read_bytes_per_s);
}

enum class Elementwise { kRmsNorm, kSiluMul, kRope };

// Arguments: op, rows, row elements.
void elementwise(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto op = static_cast<Elementwise>(state.range(0));
  const int64_t m = state.range(1), n = state.range(2);
  auto x = random_floats(m * n);
  auto y = x;
  const auto table = random_floats(m * 32);
  const MachineLimits limit = limits();
  Last trace;
  ctx.trace = &trace;
  const double seconds = median_seconds(state, [&] {
    if (op == Elementwise::kRmsNorm) rms_norm(ctx, x.data(), m, n, y.data(), 1e-6f, y.data());
    if (op == Elementwise::kSiluMul) silu_mul(ctx, x.data(), y.data(), m, n, y.data());
    if (op == Elementwise::kRope) rope(ctx, x.data(), m, n / 64, 64, table.data(), table.data());
  });
  ctx.trace = nullptr;
  show_bytes(state, seconds, static_cast<double>(trace.last.activation_bytes), limit.read_bytes_per_s);
  state.SetLabel(op == Elementwise::kRmsNorm ? "rms_norm" : op == Elementwise::kSiluMul ? "silu_mul" : "rope");
}

constexpr int64_t kF32 = static_cast<int64_t>(DType::kF32), kBF16 = static_cast<int64_t>(DType::kBF16),
                  kI8 = static_cast<int64_t>(DType::kI8);

void prefill_cases(benchmark::internal::Benchmark* b) {
  for (const int64_t activations : {0, 1}) {
    for (const int64_t cache : {kF32, kBF16, kI8}) b->Args({cache, activations, 512, 8192, 3, 2, 64, 0});
    b->Args({kBF16, activations, 8192, 8192, 3, 2, 64, 0});
    b->Args({kBF16, activations, 2048, 8192, 3, 2, 64, 512});
    b->Args({kBF16, activations, 512, 4096, 4, 2, 128, 0});
    b->Args({kBF16, activations, 32, 8192, 3, 2, 64, 0});
  }
}
void decode_cases(benchmark::internal::Benchmark* b) {
  // Each about 128 MB, four times the last-level cache.
  for (const int64_t d : {64, 128})
    for (const int64_t group : {1, 3, 4, 7, 8}) {
      b->Args({kF32, 512 / d, 16384, group, 2, d});
      b->Args({kBF16, 1024 / d, 16384, group, 2, d});
      b->Args({kI8, 2048 / d, 16384, group, 2, d});
    }
  b->Args({kBF16, 128, 2048, 3, 2, 64});
  b->Args({kI8, 1024, 500, 3, 2, 64});
}

BENCHMARK(prefill)->Apply(prefill_cases)->UseRealTime();
BENCHMARK(decode)->Apply(decode_cases)->Iterations(20);
BENCHMARK(window_scores)->Args({kBF16, 8192, 32, 3, 64})->Args({kF32, 8192, 32, 3, 64})->UseRealTime();
BENCHMARK(column_sums)->Args({kBF16, 4096, 3, 64})->UseRealTime();
BENCHMARK(append)->Args({kF32, 8192, 2, 64})->Args({kBF16, 8192, 2, 64})->Args({kI8, 8192, 2, 64})->UseRealTime();
BENCHMARK(elementwise)
    ->Args({0, 4096, 384})
    ->Args({1, 4096, 1024})
    ->Args({2, 4096, 384})
    ->Args({0, 1, 384})
    ->UseRealTime();

}  // namespace
}  // namespace lacuna

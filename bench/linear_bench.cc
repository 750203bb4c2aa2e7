// The matrix product against the machine: GB/s of weights and TFLOP/s, each beside the limit measured
// in the same run. Rates are of the median call, so that another process's burst doesn't move them.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/linear.h"
#include "kernels/machine.h"

namespace lacuna {
namespace {

struct Bench {
  MemoryAccount memory;
  Context ctx{memory};
};
Bench& bench() {
  static Bench b;
  return b;
}

// Measured again for every benchmark: what neighbours leave of the machine changes by the minute.
MachineLimits limits() { return measure_machine(bench().ctx, 0.4); }

// Random codes of any dtype that stay finite and normal.
Buffer random_weights(DType dtype, int64_t n, int64_t k) {
  const size_t bytes = static_cast<size_t>(n * k) * dtype_size(dtype);
  Buffer b(bench().memory, MemoryTag::kWeights, bytes);
  std::minstd_rand random(1);
  std::vector<std::byte> pattern(size_t{1} << 16);
  for (size_t i = 0; i < pattern.size() / dtype_size(dtype); ++i) {
    const float x = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
    const BF16 bf16 = to_bf16(x);
    const F16 f16{static_cast<uint16_t>(0x3800 | random() % 0x400)};
    const int8_t code = static_cast<int8_t>(random() % 255 - 127);
    const void* value = dtype == DType::kF32    ? static_cast<const void*>(&x)
                        : dtype == DType::kBF16 ? static_cast<const void*>(&bf16)
                        : dtype == DType::kF16  ? static_cast<const void*>(&f16)
                                                : static_cast<const void*>(&code);
    std::memcpy(pattern.data() + i * dtype_size(dtype), value, dtype_size(dtype));
  }
  for (size_t at = 0; at < bytes; at += pattern.size())
    std::memcpy(b.as<std::byte>() + at, pattern.data(), std::min(pattern.size(), bytes - at));
  return b;
}

// Arguments: weight dtype, activations, M, N, K.
void linear_bench(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const DType dtype = static_cast<DType>(state.range(0));
  ctx.activations = static_cast<ActivationType>(state.range(1));
  const int64_t m = state.range(2), n = state.range(3), k = state.range(4);
  const Buffer weights = random_weights(dtype, n, k);
  const std::vector<float> scale(static_cast<size_t>(n), 0.01f), x(static_cast<size_t>(m * k), 0.5f);
  std::vector<float> y(static_cast<size_t>(m * n));
  const LinearWeight w{Tensor(weights.as<std::byte>(), dtype, {n, k}), dtype == DType::kI8 ? scale.data() : nullptr};
  const MachineLimits limit = limits();

  std::vector<double> seconds;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    linear(ctx, w, x.data(), m, y.data());
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  const double median = seconds[seconds.size() / 2];
  const double bytes = static_cast<double>(w.weight.bytes()), flops = 2.0 * static_cast<double>(m * n * k);
  // f32 and f16 weights multiply in f32 whatever the activations are.
  const bool pairs = ctx.activations == ActivationType::kBF16 && dtype != DType::kF32 && dtype != DType::kF16;
  const double peak = pairs ? limit.bf16_flops_per_s : limit.f32_flops_per_s;
  state.counters["us"] = median * 1e6;
  state.counters["GB/s"] = bytes / median / 1e9;
  state.counters["of_read_%"] = 100 * bytes / median / limit.read_bytes_per_s;
  state.counters["GFLOP/s"] = flops / median / 1e9;
  state.counters["of_peak_%"] = 100 * flops / median / peak;
  state.SetLabel(std::string(dtype_name(dtype)) + (ctx.activations == ActivationType::kBF16 ? " x bf16" : " x f32"));
}

constexpr int64_t kF32 = static_cast<int64_t>(DType::kF32), kF16 = static_cast<int64_t>(DType::kF16),
                  kBf16 = static_cast<int64_t>(DType::kBF16), kI8 = static_cast<int64_t>(DType::kI8);
constexpr int64_t kXF32 = static_cast<int64_t>(ActivationType::kF32),
                  kXBf16 = static_cast<int64_t>(ActivationType::kBF16);

// Weights several times the last-level cache: the rate of decoding a large model.
BENCHMARK(linear_bench)
    ->Name("linear/stream")
    ->ArgNames({"w", "x", "m", "n", "k"})
    ->ArgsProduct({{kF32}, {kXF32}, {1, 4, 8, 16, 32}, {16384}, {4096}})
    ->ArgsProduct({{kF16}, {kXF32}, {1, 8}, {32768}, {4096}})
    ->ArgsProduct({{kBf16}, {kXF32, kXBf16}, {1, 4, 8, 16, 32}, {32768}, {4096}})
    ->ArgsProduct({{kI8}, {kXF32, kXBf16}, {1, 4, 8, 16, 32}, {65536}, {4096}})
    ->Unit(benchmark::kMicrosecond)
    ->MinTime(0.3);

// Prefill of layers the size of Qwen3-0.6B and of a 7B model.
BENCHMARK(linear_bench)
    ->Name("linear/prefill")
    ->ArgNames({"w", "x", "m", "n", "k"})
    ->ArgsProduct({{kF32, kF16}, {kXF32}, {512}, {1024, 3072}, {1024}})
    ->ArgsProduct({{kBf16, kI8}, {kXF32, kXBf16}, {512}, {1024, 3072}, {1024}})
    ->ArgsProduct({{kF32}, {kXF32}, {512}, {4864}, {896}})
    ->ArgsProduct({{kBf16, kI8}, {kXBf16}, {512}, {4864}, {896}})
    ->ArgsProduct({{kF32}, {kXF32}, {512}, {896}, {4864}})
    ->ArgsProduct({{kBf16, kI8}, {kXBf16}, {512}, {896}, {4864}})
    ->Unit(benchmark::kMicrosecond)
    ->MinTime(0.3);

// The shipped small model: one token, a decode batch, a prefill chunk, the vocabulary.
BENCHMARK(linear_bench)
    ->Name("linear/small_model")
    ->ArgNames({"w", "x", "m", "n", "k"})
    ->ArgsProduct({{kF32}, {kXF32}, {1, 8, 80, 512}, {128, 384, 1024, 8192}, {384}})
    ->ArgsProduct({{kBf16, kI8}, {kXBf16}, {1, 8, 80, 512}, {128, 384, 1024, 8192}, {384}})
    ->Unit(benchmark::kMicrosecond)
    ->MinTime(0.1);

// The limits themselves, as rates a second.
void machine_bench(benchmark::State& state) {
  MachineLimits limit;
  for (auto _ : state) limit = measure_machine(bench().ctx, 1.0);
  state.counters["read_GB/s"] = limit.read_bytes_per_s / 1e9;
  state.counters["f32_GFLOP/s"] = limit.f32_flops_per_s / 1e9;
  state.counters["bf16_GFLOP/s"] = limit.bf16_flops_per_s / 1e9;
  state.counters["int8_GOP/s"] = limit.int8_ops_per_s / 1e9;
  state.SetLabel(limit.isa);
}
BENCHMARK(machine_bench)->Name("machine")->Iterations(1)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace lacuna

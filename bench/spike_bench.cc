// Spike-coded products: the dense integer product (VNNI) against the event-driven one over silent inputs, each
// beside the memory rate and the int8 rate measured in the same run. One thread, on its own clock: what the neighbours
// take of the cores does not count, what they take of the memory still does, so rates are of the best quarter's
// last call (of the calls sorted by time, a quarter were as fast).
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/machine.h"
#include "kernels/spike_linear.h"

namespace lacuna {
namespace {

struct Bench {
  MemoryAccount memory;
  Context ctx{memory, 1};
};
Bench& bench() {
  static Bench b;
  return b;
}

double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// The best of all looks so far: a neighbour's burst makes a look low, nothing makes one high.
MachineLimits limits() {
  static MachineLimits best;
  const MachineLimits now = measure_machine(bench().ctx, 0.3);
  best.read_bytes_per_s = std::max(best.read_bytes_per_s, now.read_bytes_per_s);
  best.int8_ops_per_s = std::max(best.int8_ops_per_s, now.int8_ops_per_s);
  return best;
}

struct Ledger : TraceSink {
  void record(const OpRecord& r) override { last = r; }
  OpRecord last;
};

// Counts of a Gaussian at k = 3, `silent` of 100 inputs forced to 0 (0: as the Gaussian gives them, 10.6 %).
struct Input {
  std::vector<int32_t> counts;
  std::vector<SpikeRow> rows;
  Input(int64_t m, int64_t k, int silent, uint32_t seed)
      : counts(static_cast<size_t>(m * k)), rows(static_cast<size_t>(m)) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, 3 / std::sqrt(2 / 3.14159265358979323846));
    std::uniform_int_distribution<int> percent(0, 99);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t i = r * k; i < (r + 1) * k; ++i) {
        int32_t s = static_cast<int32_t>(std::nearbyint(normal(random)));
        while (silent > 0 && s == 0) s = static_cast<int32_t>(std::nearbyint(normal(random)));
        if (percent(random) < silent) s = 0;
        const int32_t magnitude = std::abs(s);
        SpikeRow& row = rows[static_cast<size_t>(r)];
        counts[static_cast<size_t>(i)] = s;
        row.threshold = 1;
        row.most = std::max(row.most, magnitude);
        row.total += magnitude;
        row.spikes += std::popcount(static_cast<uint32_t>(magnitude));
        row.silent += s == 0;
      }
  }
};

// Arguments: arithmetic, M, N, K, percent of silent inputs, inputs a scale.
void spike_bench(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const auto arithmetic = static_cast<SpikeArithmetic>(state.range(0));
  const int64_t m = state.range(1), n = state.range(2), k = state.range(3), group = state.range(5) ? state.range(5) : k;
  // Other inputs are silent from call to call, as from token to token: what one call leaves in the caches is not
  // what the next one needs.
  constexpr size_t kInputs = 64;
  std::vector<Input> inputs;
  for (uint32_t seed = 1; seed <= kInputs; ++seed) inputs.emplace_back(m, k, static_cast<int>(state.range(4)), seed);
  std::vector<int8_t> codes(static_cast<size_t>(n * k));
  std::minstd_rand random(2);
  for (int8_t& c : codes) c = static_cast<int8_t>(random() % 255 - 127);
  const std::vector<float> scales(static_cast<size_t>(n * ((k + group - 1) / group)), 0.01f);
  const PackedSpikeWeight w =
      pack_spike_weight(ctx, Tensor(codes.data(), DType::kI8, {n, k}), scales.data(), group, nullptr, arithmetic);
  codes = {};
  std::vector<float> y(static_cast<size_t>(m * n));
  const auto batch = [&](size_t i) {
    return SpikeBatch{inputs[i % kInputs].counts.data(), inputs[i % kInputs].rows.data(), m, k};
  };
  Ledger ledger;
  ctx.trace = &ledger;
  spike_linear(ctx, w.view, batch(0), y.data());
  ctx.trace = nullptr;
  const MachineLimits limit = limits();
  std::vector<double> seconds;
  for (auto _ : state) {
    const double start = thread_seconds();
    spike_linear(ctx, w.view, batch(seconds.size()), y.data());
    seconds.push_back(thread_seconds() - start);
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 4, seconds.end());
  const double quarter = seconds[seconds.size() / 4];
  state.counters["us"] = quarter * 1e6;
  state.counters["best_us"] = *std::min_element(seconds.begin(), seconds.end()) * 1e6;
  state.counters["GB/s"] = static_cast<double>(ledger.last.weight_bytes) / quarter / 1e9;
  state.counters["of_read_%"] = 100 * static_cast<double>(ledger.last.weight_bytes) / quarter / limit.read_bytes_per_s;
  if (arithmetic == SpikeArithmetic::kEvent)
    state.counters["Gadd/s"] = static_cast<double>(ledger.last.synaptic_ops) / quarter / 1e9;
  else
    state.counters["of_int8_%"] =
        limit.int8_ops_per_s > 0 ? 200 * static_cast<double>(m * n * k) / quarter / limit.int8_ops_per_s : 0;
  state.SetLabel(std::string(spike_arithmetic_name(arithmetic)));
}

constexpr int64_t kInteger = static_cast<int64_t>(SpikeArithmetic::kInteger),
                  kEvent = static_cast<int64_t>(SpikeArithmetic::kEvent),
                  kFake = static_cast<int64_t>(SpikeArithmetic::kFake);

// Weights of 128 MB, four times the last-level cache: decoding a large model.
BENCHMARK(spike_bench)
    ->Name("spike/stream")
    ->ArgNames({"a", "m", "n", "k", "silent", "group"})
    ->ArgsProduct({{kInteger}, {1, 4}, {32768}, {4096}, {0}, {0, 128}})
    ->ArgsProduct({{kEvent}, {1, 4}, {32768}, {4096}, {0, 25, 50, 75, 90, 99}, {0}})
    ->ArgsProduct({{kEvent}, {1}, {32768}, {4096}, {0, 50, 90}, {128}})
    ->ArgsProduct({{kFake}, {1}, {32768}, {4096}, {0}, {0}})
    ->Unit(benchmark::kMicrosecond)
    ->MinTime(0.3);

// 1 MB: a layer of a small model, which stays in the caches.
BENCHMARK(spike_bench)
    ->Name("spike/cached")
    ->ArgNames({"a", "m", "n", "k", "silent", "group"})
    ->ArgsProduct({{kInteger}, {1, 4, 64}, {1024}, {1024}, {0}, {0}})
    ->ArgsProduct({{kEvent}, {1, 4, 64}, {1024}, {1024}, {0, 25, 50, 75, 90, 99}, {0}})
    ->Unit(benchmark::kMicrosecond)
    ->MinTime(0.1);

// The neuron itself.
void neuron_bench(benchmark::State& state) {
  Context& ctx = bench().ctx;
  const int64_t m = state.range(0), k = state.range(1);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(m * k));
  for (float& v : x) v = normal(random);
  std::vector<int32_t> counts(x.size());
  std::vector<SpikeRow> rows(static_cast<size_t>(m));
  for (auto _ : state) fire_neurons(ctx, x.data(), m, k, 3, counts.data(), rows.data());
  state.counters["inputs/s"] =
      benchmark::Counter(static_cast<double>(m * k), benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(neuron_bench)
    ->Name("spike/neuron")
    ->ArgNames({"m", "k"})
    ->ArgsProduct({{1, 512}, {1024, 4096}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lacuna

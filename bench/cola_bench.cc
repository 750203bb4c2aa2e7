// Cola DLM against the machine: sweeps over the DiT's weights, and decodes, with the time that the binding limit
// (bytes of weights, caches and logits at the measured bandwidth, or operations at the measured rate) allows, beside the
// time taken. LACUNA_COLA_MODEL names a checkpoint (scripts/make_random_model.py --arch cola); without it nothing runs.
// LACUNA_BENCH_THREADS as in attention_bench.cc.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "bench.h"
#include "models/cola.h"

namespace lacuna {
namespace {

std::vector<float> normals(int64_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& f : x) f = normal(random);
  return x;
}

// One at a time: as stored, or int8.
ColaModel* model_of(bool int8) {
  static std::unique_ptr<ColaModel> model;
  static int held = -1;
  const char* dir = std::getenv("LACUNA_COLA_MODEL");
  if (!dir || !*dir) return nullptr;
  if (held != int8) {
    model.reset();
    LoadOptions options;
    options.weights = int8 ? WeightMode::kInt8 : WeightMode::kStored;
    options.check_finite = false;
    model = ColaModel::load(bench().ctx, dir, options);
    held = int8;
  }
  return model.get();
}

// Median of the calls, and what the ledger says of one.
template <class Call>
void measure(benchmark::State& state, const Call& call) {
  OpTotals totals;
  call();  // buffers, page cache
  bench().ctx.trace = &totals;
  call();
  bench().ctx.trace = nullptr;
  const double taken = median_seconds(state, call);
  const MachineLimits limit = limits();
  const OpTotals::Sum sum = totals.total();
  // Activations stay in caches and are not counted, but for what leaves them (logits): a decode's own business.
  const double bytes = static_cast<double>(sum.weight_bytes + sum.kv_read_bytes + sum.kv_write_bytes);
  const double by_bytes = bytes / limit.read_bytes_per_s;
  const double by_flops = 2 * static_cast<double>(sum.macs) / limit.bf16_flops_per_s;
  state.counters["ms"] = 1e3 * taken;
  state.counters["limit_ms"] = 1e3 * std::max(by_bytes, by_flops);
  state.counters["share"] = std::max(by_bytes, by_flops) / taken;
  state.counters["GB/s"] = bytes / taken / 1e9;
  state.counters["of_GB/s"] = limit.read_bytes_per_s / 1e9;
  state.counters["GFLOP/s"] = 2e-9 * static_cast<double>(sum.macs) / taken;
  state.counters["of_GFLOP/s"] = limit.bf16_flops_per_s / 1e9;
  const double all = static_cast<double>(sum.duration_ns);
  state.counters["gemm"] = static_cast<double>(totals.of(OpKind::kGemm).duration_ns) / all;
  state.counters["attn"] = static_cast<double>(totals.of(OpKind::kAttention).duration_ns) / all;
  state.counters["act"] = static_cast<double>(totals.of(OpKind::kActivation).duration_ns) / all;
  state.counters["norm"] = static_cast<double>(totals.of(OpKind::kNorm).duration_ns) / all;
  state.counters["rope"] = static_cast<double>(totals.of(OpKind::kRope).duration_ns) / all;
  state.counters["kv"] = static_cast<double>(totals.of(OpKind::kKvAppend).duration_ns) / all;
  state.counters["ops"] = 1e-6 * all;
}

// Arguments: int8, sequences, latents of history, unconditional rows too, latents committed before the block.
void cola_velocity(benchmark::State& state) {
  ColaModel* model = model_of(state.range(0) != 0);
  if (!model) return state.SkipWithError("LACUNA_COLA_MODEL names no checkpoint");
  Context& ctx = bench().ctx;
  const int64_t sequences = state.range(1), history = state.range(2), block = model->config().dit.block,
                latent = model->config().latent_dim();
  const bool both = state.range(3) != 0;
  const int64_t clean = state.range(4);
  const TimestepTable table = model->make_timesteps(ctx, std::vector<float>{500, 0});
  std::vector<ColaState> states;
  std::vector<LatentRows> rows;
  for (int64_t i = 0; i < sequences; ++i) {
    states.push_back(model->new_state(ctx.memory, {DType::kBF16}));
    if (history > 0) {
      const std::vector<int32_t> at(static_cast<size_t>(history), 1);
      const std::vector<LatentRows> prefix = {{&states.back(), history, history}};
      model->velocity(ctx, table, at, normals(history * latent).data(), prefix, nullptr);
    }
  }
  for (ColaState& s : states) rows.push_back({&s, clean + block, 0});
  for (int64_t i = 0; both && i < sequences; ++i) rows.push_back({nullptr, block, 0});
  int64_t m = 0;
  for (const LatentRows& r : rows) m += r.rows;
  const std::vector<float> x = normals(m * latent);
  std::vector<float> v(x.size());
  const std::vector<int32_t> at(static_cast<size_t>(m));
  state.counters["M"] = static_cast<double>(m);
  measure(state, [&] { model->velocity(ctx, table, at, x.data(), rows, v.data()); });
}

// Arguments: int8, sequences, latents of history.
void cola_decode(benchmark::State& state) {
  ColaModel* model = model_of(state.range(0) != 0);
  if (!model) return state.SkipWithError("LACUNA_COLA_MODEL names no checkpoint");
  Context& ctx = bench().ctx;
  const int64_t sequences = state.range(1), history = state.range(2), block = model->config().dit.block,
                latent = model->config().latent_dim();
  std::vector<ColaState> states;
  std::vector<LatentRows> rows;
  for (int64_t i = 0; i < sequences; ++i) {
    states.push_back(model->new_state(ctx.memory, {DType::kBF16}));
    const std::vector<LatentRows> prefix = {{&states.back(), history, history}};
    if (history > 0) model->decode(ctx, normals(history * latent).data(), prefix, nullptr);
  }
  for (ColaState& s : states) rows.push_back({&s, block, 0});
  const std::vector<float> z = normals(sequences * block * latent);
  std::vector<float> logits(static_cast<size_t>(sequences * block * model->config().vae.vocab));
  state.counters["M"] = static_cast<double>(sequences * block);
  measure(state, [&] { model->decode(ctx, z.data(), rows, logits.data()); });
}

// Arguments: int8, latents of one call that only appends.
void cola_prefill(benchmark::State& state) {
  ColaModel* model = model_of(state.range(0) != 0);
  if (!model) return state.SkipWithError("LACUNA_COLA_MODEL names no checkpoint");
  Context& ctx = bench().ctx;
  const int64_t n = state.range(1), latent = model->config().latent_dim();
  const TimestepTable table = model->make_timesteps(ctx, std::vector<float>{0});
  ColaState s = model->new_state(ctx.memory, {DType::kBF16});
  const std::vector<LatentRows> rows = {{&s, n, 0}};
  const std::vector<float> x = normals(n * latent);
  const std::vector<int32_t> at(static_cast<size_t>(n));
  state.counters["M"] = static_cast<double>(n);
  measure(state, [&] { model->velocity(ctx, table, at, x.data(), rows, nullptr); });
}

// Arguments: int8, timesteps.
void cola_timesteps(benchmark::State& state) {
  ColaModel* model = model_of(state.range(0) != 0);
  if (!model) return state.SkipWithError("LACUNA_COLA_MODEL names no checkpoint");
  std::vector<float> t;
  for (int64_t i = 0; i < state.range(1); ++i) t.push_back(1000 - 10 * static_cast<float>(i));
  state.counters["M"] = static_cast<double>(t.size());
  measure(state, [&] { benchmark::DoNotOptimize(model->make_timesteps(bench().ctx, t)); });
}

BENCHMARK(cola_velocity)
    ->Args({0, 1, 256, 0, 0})
    ->Args({0, 1, 256, 1, 0})
    ->Args({0, 1, 256, 1, 16})
    ->Args({0, 2, 256, 1, 0})
    ->Args({0, 4, 256, 1, 0})
    ->Args({0, 1, 4096, 1, 0})
    ->Unit(benchmark::kMillisecond)->Iterations(7)->UseRealTime();
BENCHMARK(cola_decode)->Args({0, 1, 256})->Args({0, 4, 256})->Unit(benchmark::kMillisecond)->Iterations(7)->UseRealTime();
BENCHMARK(cola_prefill)->Args({0, 512})->Unit(benchmark::kMillisecond)->Iterations(3)->UseRealTime();
BENCHMARK(cola_timesteps)->Args({0, 17})->Unit(benchmark::kMillisecond)->Iterations(5)->UseRealTime();
BENCHMARK(cola_velocity)
    ->Args({1, 1, 256, 0, 0})
    ->Args({1, 1, 256, 1, 0})
    ->Args({1, 2, 256, 1, 0})
    ->Args({1, 4, 256, 1, 0})
    ->Args({1, 16, 256, 1, 0})
    ->Unit(benchmark::kMillisecond)->Iterations(7)->UseRealTime();
BENCHMARK(cola_decode)->Args({1, 1, 256})->Unit(benchmark::kMillisecond)->Iterations(7)->UseRealTime();

}  // namespace
}  // namespace lacuna

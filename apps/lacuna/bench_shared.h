// What lacuna bench measures with, whatever the kind of model.
#pragma once

#include "cli.h"

namespace lacuna::cli {

struct Spread {
  double median = 0, low = 0, high = 0;
};
Spread spread_of(std::vector<double> values);
nlohmann::json spread_json(const Spread& spread);
double per_second(double amount, double seconds);

// Random ids: what the tokens say changes neither the work nor the bytes.
std::vector<int32_t> random_ids(int64_t count, int64_t vocab);

// The better of three measurements: whoever shares the machine can only make a limit look lower than it
// is, and a share of the limit then looks better than it is.
MachineLimits best_limits(Context& ctx);
nlohmann::json limits_json(const MachineLimits& limits);

// What is asked of either kind of model.
struct BenchRun {
  EngineOptions engine;
  std::vector<int64_t> lengths, batches;
  int64_t tokens = 32, repeats = 3;
  bool json = false, quiet = false;
};

struct DiffusionBenchOptions {
  DiffusionOptions diffusion;
  std::vector<int> steps;
  std::vector<float> guidance;
  std::vector<const CLI::Option*> options;  // all of them
  // The grid; the single --steps and --guidance where there is none.
  std::vector<DiffusionParams> settings() const;
};
void add_diffusion_bench_options(CLI::App& app, DiffusionBenchOptions& options, EngineOptions& engine);

// What the generation of a batch took after its prompts were read: by the kernels' own counts.
struct GenerationCost {
  int64_t length = 0, batch = 0, tokens = 0;  // tokens of all sequences together
  Spread seconds;
  double prefill_seconds = 0;
  int64_t passes = 0;  // over the weights: decode steps, or sweeps of the DiT
  int64_t blocks = 0;  // of all sequences; 0: autoregressive
  std::vector<OpTotals> phases;  // decode; or the DiT, then the VAE's decoder
  size_t cache_bytes = 0;        // of all sequences at the end

  double bytes() const;  // weights, keys and values, states read; not activations
  double flops() const;  // two a multiply-accumulate
  // The least time these bytes and operations take on the machine, operator by operator, and the share of it in which
  // operations and not bytes decide.
  struct Floor {
    double seconds = 0, flop_share = 0;
    const char* binds() const { return flop_share > 0.5 ? "FLOP" : "bandwidth"; }
  };
  Floor floor(double read_bytes_per_s, double flops_per_s) const;
};
// `batch` sequences of `length` random tokens, `tokens` new ones each; the median of `repeats` after one to warm up.
GenerationCost measure_generation(Engine& engine, const DiffusionParams& params, int64_t length, int64_t batch, int64_t tokens, int64_t repeats,
                                  const std::function<void()>& progress);

int bench_diffusion(const BenchRun& run, const DiffusionBenchOptions& options);
int bench_contrast(const BenchRun& run, const std::vector<std::string>& models, const DiffusionBenchOptions& options);

}  // namespace lacuna::cli

#include "bench_shared.h"

#include <algorithm>
#include <chrono>

#include "eval/random.h"
#include "models/forward.h"

namespace lacuna::cli {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double read_bytes(const OpTotals::Sum& s) { return static_cast<double>(s.weight_bytes + s.kv_read_bytes + s.state_bytes); }
double flops_of(const OpTotals::Sum& s) { return 2 * static_cast<double>(s.macs); }

// One run; everything but the times is the same in each.
double generate_autoregressive(Engine& e, const std::vector<int32_t>& ids, int64_t tokens, GenerationCost& cost) {
  Model& model = *e.model;
  std::vector<float> logits(static_cast<size_t>(model.info().vocab * cost.batch));
  std::vector<SequenceState> states;
  states.reserve(static_cast<size_t>(cost.batch));
  states.push_back(model.new_state(e.memory, e.kv));
  auto start = Clock::now();
  prefill(e.ctx, model, states[0], ids, nullptr, e.prefill, logits.data());
  cost.prefill_seconds = seconds_since(start);
  while (static_cast<int64_t>(states.size()) < cost.batch) states.push_back(states[0].copy(e.ctx));
  std::vector<SequenceState*> rows;
  for (SequenceState& state : states) rows.push_back(&state);
  const std::vector<int32_t> next(states.size(), ids[0]);
  cost.phases.assign(1, {});
  e.ctx.trace = &cost.phases[0];
  start = Clock::now();
  for (int64_t i = 0; i < tokens; ++i) {
    if (interrupted()) break;
    decode_step(e.ctx, model, rows, next, logits.data());
  }
  const double seconds = seconds_since(start);
  e.ctx.trace = nullptr;
  if (interrupted()) throw Cancelled("stopped during decode");
  cost.tokens = tokens * cost.batch;
  cost.passes = tokens;
  cost.cache_bytes = 0;
  for (const SequenceState& state : states) cost.cache_bytes += state.kv.allocated_bytes() + state.recurrent.bytes();
  return seconds;
}

double generate_diffusion(Engine& e, const DiffusionParams& params, const std::vector<int32_t>& ids, int64_t tokens, GenerationCost& cost) {
  BlockDiffusionGenerator generator(e.ctx, *e.any.diffusion, nullptr, {}, e.kv, params);
  std::vector<GenerateRequest> requests(static_cast<size_t>(cost.batch));
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt = ids;
    requests[i].sampling.max_new_tokens = tokens;
    requests[i].sampling.seed = i;
  }
  cost.cache_bytes = 0;
  for (const GenerateResult& r : generator.generate(requests, {.cancelled = interrupted})) cost.cache_bytes += r.kv_bytes;
  const GenerateStats& stats = generator.stats();
  cost.prefill_seconds = stats.diffusion->encode_seconds + stats.diffusion->prefill_seconds;
  cost.tokens = stats.decode_tokens;
  cost.passes = stats.diffusion->sweeps;
  cost.blocks = stats.diffusion->blocks;
  cost.phases = {stats.diffusion->denoise_ops, stats.diffusion->vae_ops};
  return stats.decode_seconds;
}

}  // namespace

Spread spread_of(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  return {(v[(n - 1) / 2] + v[n / 2]) / 2, v.front(), v.back()};
}

nlohmann::json spread_json(const Spread& s) { return {{"median", s.median}, {"min", s.low}, {"max", s.high}}; }

double per_second(double amount, double seconds) { return seconds > 0 ? amount / seconds : 0; }

std::vector<int32_t> random_ids(int64_t count, int64_t vocab) {
  EvalRandom random(7);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(vocab));
  return ids;
}

MachineLimits best_limits(Context& ctx) {
  MachineLimits best = measure_machine(ctx);
  for (int i = 0; i < 2; ++i) {
    const MachineLimits again = measure_machine(ctx);
    best.read_bytes_per_s = std::max(best.read_bytes_per_s, again.read_bytes_per_s);
    best.f32_flops_per_s = std::max(best.f32_flops_per_s, again.f32_flops_per_s);
    best.bf16_flops_per_s = std::max(best.bf16_flops_per_s, again.bf16_flops_per_s);
    best.int8_ops_per_s = std::max(best.int8_ops_per_s, again.int8_ops_per_s);
  }
  return best;
}

nlohmann::json limits_json(const MachineLimits& limits) {
  return {{"read_bytes_per_second", limits.read_bytes_per_s},
          {"f32_flops_per_second", limits.f32_flops_per_s},
          {"bf16_flops_per_second", limits.bf16_flops_per_s},
          {"int8_ops_per_second", limits.int8_ops_per_s},
          {"isa", limits.isa}};
}

void add_diffusion_bench_options(CLI::App& app, DiffusionBenchOptions& o, EngineOptions& engine) {
  add_diffusion_options(app, o.diffusion, engine);
  o.options = o.diffusion.options;
  o.options.push_back(app.add_option("--steps-grid", o.steps, "Block diffusion: each of these instead of --steps")->delimiter(',')->check(CLI::Range(1, 1000)));
  o.options.push_back(app.add_option("--guidance-grid", o.guidance, "Block diffusion: each of these instead of --guidance")->delimiter(','));
}

std::vector<DiffusionParams> DiffusionBenchOptions::settings() const {
  const DiffusionParams base = diffusion.open();
  std::vector<DiffusionParams> out;
  for (int s : steps.empty() ? std::vector<int>{base.steps} : steps)
    for (float g : guidance.empty() ? std::vector<float>{base.guidance} : guidance) {
      out.push_back(base);
      out.back().steps = s;
      out.back().guidance = g;
      validate(out.back());
    }
  return out;
}

double GenerationCost::bytes() const {
  double sum = 0;
  for (const OpTotals& p : phases) sum += read_bytes(p.total());
  return sum;
}

double GenerationCost::flops() const {
  double sum = 0;
  for (const OpTotals& p : phases) sum += flops_of(p.total());
  return sum;
}

GenerationCost::Floor GenerationCost::floor(double read_bytes_per_s, double flops_per_s) const {
  Floor out;
  double by_flops = 0;
  for (const OpTotals& p : phases)
    for (size_t kind = 0; kind < static_cast<size_t>(OpKind::kCount); ++kind) {
      const OpTotals::Sum& sum = p.of(static_cast<OpKind>(kind));
      const double read = per_second(read_bytes(sum), read_bytes_per_s), compute = per_second(flops_of(sum), flops_per_s);
      out.seconds += std::max(read, compute);
      if (compute > read) by_flops += compute;
    }
  out.flop_share = per_second(by_flops, out.seconds);
  return out;
}

GenerationCost measure_generation(Engine& engine, const DiffusionParams& params, int64_t length, int64_t batch, int64_t tokens, int64_t repeats,
                                  const std::function<void()>& progress) {
  GenerationCost cost;
  cost.length = length;
  cost.batch = batch;
  const std::vector<int32_t> ids = random_ids(length, engine.any.vocab());
  std::vector<double> seconds;
  for (int64_t i = 0; i <= repeats; ++i) {
    progress();
    const double s = engine.model ? generate_autoregressive(engine, ids, tokens, cost) : generate_diffusion(engine, params, ids, tokens, cost);
    if (i > 0) seconds.push_back(s);  // the first is the warm-up
  }
  cost.seconds = spread_of(std::move(seconds));
  return cost;
}

}  // namespace lacuna::cli

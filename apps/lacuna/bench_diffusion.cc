// lacuna bench of a block-diffusion model, and its contrast with an autoregressive one.
#include <filesystem>

#include <fmt/ranges.h>

#include "bench_shared.h"
#include "eval/report.h"

namespace lacuna::cli {
namespace {

// What products are held against: operands of bf16 or f32.
double flops_limit(const Engine& engine, const MachineLimits& limits) {
  return engine.ctx.activations == ActivationType::kBF16 ? std::max(limits.bf16_flops_per_s, limits.f32_flops_per_s) : limits.f32_flops_per_s;
}

struct Row {
  std::string name;  // the model's, or the setting's
  GenerationCost cost;
  size_t flops_model = 0;  // whose limit of operations applies
};

double a_token(const GenerationCost& c, double amount) { return per_second(amount, static_cast<double>(c.tokens)); }

nlohmann::json row_json(const Row& row, double read_limit, double flop_limit) {
  const GenerationCost& c = row.cost;
  const GenerationCost::Floor floor = c.floor(read_limit, flop_limit);
  nlohmann::json out = {{"length", c.length}, {"batch", c.batch}, {"name", row.name}, {"tokens", c.tokens}, {"seconds", spread_json(c.seconds)},
                        {"prefill_seconds", c.prefill_seconds},
                        {"tokens_per_second", per_second(static_cast<double>(c.tokens), c.seconds.median)}, {"passes", c.passes},
                        {"tokens_per_pass", per_second(static_cast<double>(c.tokens), static_cast<double>(c.passes))},
                        {"bytes_per_token", a_token(c, c.bytes())}, {"flops_per_token", a_token(c, c.flops())},
                        {"flops_per_byte", per_second(c.flops(), c.bytes())},
                        {"floor_seconds_per_token", a_token(c, floor.seconds)}, {"binds", floor.binds()}, {"flop_bound_share", floor.flop_share},
                        {"share_of_floor", per_second(floor.seconds, c.seconds.median)}, {"cache_bytes", c.cache_bytes}};
  if (c.blocks > 0) out["passes_per_block"] = per_second(static_cast<double>(c.passes * c.batch), static_cast<double>(c.blocks));
  for (size_t p = 0; p < c.phases.size(); ++p) {
    const OpTotals::Sum sum = c.phases[p].total();
    out["phases"].push_back({{"name", c.blocks == 0 ? "decode" : p == 0 ? "dit" : "vae_decoder"}, {"weight_bytes", sum.weight_bytes},
                             {"kv_read_bytes", sum.kv_read_bytes}, {"macs", sum.macs}, {"kernel_seconds", static_cast<double>(sum.duration_ns) * 1e-9}});
  }
  return out;
}

const std::vector<std::string> kHead = {"tokens/s",     "passes a block", "tokens a pass", "MB read a token", "MFLOP a token", "FLOP a byte",
                                        "GB/s",         "GFLOP/s",        "what binds",    "floor, µs a token", "reached %", "cache"};

std::vector<std::string> cells(const Row& row, double read_limit, double flop_limit) {
  const GenerationCost& c = row.cost;
  const GenerationCost::Floor floor = c.floor(read_limit, flop_limit);
  const auto tokens = static_cast<double>(c.tokens);
  return {fmt::format("{:.1f}", per_second(tokens, c.seconds.median)),
          c.blocks > 0 ? fmt::format("{:.1f}", static_cast<double>(c.passes * c.batch) / static_cast<double>(c.blocks)) : "",
          fmt::format("{:.2f}", per_second(tokens, static_cast<double>(c.passes))),
          fmt::format("{:.2f}", a_token(c, c.bytes()) / 1e6),
          fmt::format("{:.1f}", a_token(c, c.flops()) / 1e6),
          fmt::format("{:.1f}", per_second(c.flops(), c.bytes())),
          fmt::format("{:.1f}", per_second(c.bytes(), c.seconds.median) / 1e9),
          fmt::format("{:.1f}", per_second(c.flops(), c.seconds.median) / 1e9),
          floor.binds(),
          fmt::format("{:.1f}", a_token(c, floor.seconds) * 1e6),
          fmt::format("{:.0f}", 100 * per_second(floor.seconds, c.seconds.median)),
          human_bytes(static_cast<double>(c.cache_bytes))};
}

std::string model_name(const std::string& dir) {
  const auto path = std::filesystem::path(dir).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

std::string limits_line(const MachineLimits& l) {
  return fmt::format("limits measured now: {:.1f} GB/s read, {:.0f} GFLOP/s f32, {:.0f} bf16\n", l.read_bytes_per_s / 1e9, l.f32_flops_per_s / 1e9,
                     l.bf16_flops_per_s / 1e9);
}

std::string describe(const Engine& e, const std::string& dir) {
  return fmt::format("{} ({}): {:.1f} M parameters in {}; activations {}, KV {}; {} thread(s)\n", model_name(dir), e.any.architecture(),
                     static_cast<double>(e.any.parameters()) / 1e6, human_bytes(static_cast<double>(e.any.weight_bytes())),
                     e.ctx.activations == ActivationType::kBF16 ? "bf16" : "f32", dtype_name(e.kv.dtype), e.ctx.pool.size());
}

constexpr const char* kNotes =
    "\nBytes are weights, keys and values read, as the kernels counted them, over all tokens of the batch; the floor is the least time they and\n"
    "the operations take at the measured limits, operator by operator; what binds is what most of the floor comes from.\n";

nlohmann::json model_json(const Engine& e, const std::string& dir) {
  nlohmann::json out = {{"name", model_name(dir)}, {"architecture", e.any.architecture()}, {"parameters", e.any.parameters()},
                        {"weight_bytes", e.any.weight_bytes()}, {"activations", e.ctx.activations == ActivationType::kBF16 ? "bf16" : "f32"},
                        {"kv_dtype", dtype_name(e.kv.dtype)}, {"threads", e.ctx.pool.size()}};
  if (e.any.diffusion) {
    const ColaInfo& i = e.any.diffusion->info();
    out["dit_parameters"] = i.dit_parameters;
    out["vae_parameters"] = i.vae_parameters;
    out["velocity_bytes"] = i.velocity_bytes;
    out["decode_bytes"] = i.decode_bytes;
    out["timestep_bytes"] = i.timestep_bytes;
    out["block"] = i.config.dit.block;
  }
  return out;
}

void check_positions(const Engine& e, const BenchRun& run) {
  for (int64_t length : run.lengths)
    if (e.model && length + run.tokens + 1 > e.model->info().max_positions)
      throw BadInput("{} tokens and {} decoded ones pass the model's {} positions", length, run.tokens, e.model->info().max_positions);
}

std::string setting_name(const DiffusionParams& p) { return fmt::format("{} steps, guidance {:g}", p.steps, p.guidance); }

}  // namespace

int bench_diffusion(const BenchRun& run, const DiffusionBenchOptions& options) {
  const std::vector<DiffusionParams> settings = options.settings();
  Engine engine(run.engine, Takes::kAny);
  std::vector<Row> rows;
  Progress progress("measuring", "runs", 1, !run.quiet);
  const auto total = static_cast<int64_t>(run.lengths.size() * run.batches.size() * settings.size()) * (run.repeats + 1);
  int64_t done = 0;
  for (int64_t length : run.lengths)
    for (int64_t batch : run.batches)
      for (const DiffusionParams& p : settings) {
        const auto tick = [&] { progress.update(done++, total, fmt::format("{} tokens, batch {}, {}", length, batch, setting_name(p))); };
        rows.push_back({setting_name(p), measure_generation(engine, p, length, batch, run.tokens, run.repeats, tick)});
      }
  progress.finish();
  const size_t resident = peak_rss();
  const nlohmann::json memory = memory_json(engine.memory);
  const MachineLimits limits = best_limits(engine.ctx);
  const double flops = flops_limit(engine, limits);
  if (run.json) {
    nlohmann::json out = {{"kind", "bench_diffusion"}, {"model", model_json(engine, run.engine.model_dir)}, {"new_tokens", run.tokens},
                          {"repeats", run.repeats}, {"limits", limits_json(limits)}, {"memory", memory}, {"peak_rss_bytes", resident}};
    for (const Row& row : rows) out["cells"].push_back(row_json(row, limits.read_bytes_per_s, flops));
    print_out(out.dump(2) + "\n");
    return 0;
  }
  std::vector<std::vector<std::string>> table = {{"prompt, batch, setting"}};
  table[0].insert(table[0].end(), kHead.begin(), kHead.end());
  for (const Row& row : rows) {
    auto& line = table.emplace_back(std::vector<std::string>{fmt::format("{}, {}, {}", row.cost.length, row.cost.batch, row.name)});
    const auto own = cells(row, limits.read_bytes_per_s, flops);
    line.insert(line.end(), own.begin(), own.end());
  }
  const ColaInfo& i = engine.any.diffusion->info();
  print_out(describe(engine, run.engine.model_dir) +
            fmt::format("a pass of the DiT reads {}, the VAE's decoder {}; adaptive norms of all timesteps {}, once\n",
                        human_bytes(static_cast<double>(i.velocity_bytes)), human_bytes(static_cast<double>(i.decode_bytes)),
                        human_bytes(static_cast<double>(i.timestep_bytes))) +
            limits_line(limits) + fmt::format("{} new tokens a sequence, median of {} runs after one to warm up\n\n", run.tokens, run.repeats) +
            markdown_table(table) + kNotes + fmt::format("\nprocess peak {} resident\n", human_bytes(static_cast<double>(resident))));
  return 0;
}

namespace {

// Two rows of one length and batch: the autoregressive model's, the diffusion model's.
struct Pair {
  const Row *a, *d;
  double bytes_ratio() const { return a_token(a->cost, a->cost.bytes()) / a_token(d->cost, d->cost.bytes()); }
  double time_ratio() const {
    return a->cost.seconds.median / static_cast<double>(a->cost.tokens) / (d->cost.seconds.median / static_cast<double>(d->cost.tokens));
  }
};

// What the table says, in sentences: for one length, over batches.
std::string verdict(const std::vector<Pair>& pairs, double read_limit, const std::vector<double>& flop_limits, nlohmann::json& json) {
  std::string out;
  int64_t no_advantage = 0, bound = 0;
  for (const Pair& p : pairs) {
    out += fmt::format("batch {:>4}: the diffusion model reads {:.2f} times fewer bytes a token and is {:.2f} times as fast\n", p.a->cost.batch,
                       p.bytes_ratio(), p.time_ratio());
    json["ratios"].push_back({{"batch", p.a->cost.batch}, {"fewer_bytes", p.bytes_ratio()}, {"speed", p.time_ratio()}});
  }
  // From here to the largest batch, without a gap.
  for (size_t i = pairs.size(); i-- > 0;) {
    if (!(pairs[i].bytes_ratio() > 1 && pairs[i].time_ratio() <= 1)) break;
    no_advantage = pairs[i].d->cost.batch;
  }
  for (size_t i = pairs.size(); i-- > 0;) {
    const Row& d = *pairs[i].d;
    if (d.cost.floor(read_limit, flop_limits[d.flops_model]).flop_share <= 0.5) break;
    bound = d.cost.batch;
  }
  bool fewer = false;
  for (const Pair& p : pairs) fewer |= p.bytes_ratio() > 1;
  out += bound > 0 ? fmt::format("From batch {} on FLOP and not bandwidth binds the diffusion model.\n", bound)
                   : "Bandwidth and not FLOP binds the diffusion model up to the largest batch measured.\n";
  if (!fewer) out += "It reads fewer bytes a token than the autoregressive model at no batch measured.\n";
  else if (no_advantage > 0) out += fmt::format("From batch {} on its fewer bytes a token are no advantage in time.\n", no_advantage);
  else out += "Where it reads fewer bytes a token it is faster too, up to the largest batch measured.\n";
  json["flop_bound_from_batch"] = bound;
  json["no_time_advantage_from_batch"] = no_advantage;
  return out;
}

}  // namespace

int bench_contrast(const BenchRun& run, const std::vector<std::string>& dirs, const DiffusionBenchOptions& options) {
  const std::vector<DiffusionParams> settings = options.settings();
  std::vector<std::unique_ptr<Engine>> engines;
  size_t diffusion = 0;
  for (const std::string& dir : dirs) {
    EngineOptions o = run.engine;
    o.model_dir = dir;
    if (!is_diffusion(o)) o.diffusion_block = 0;
    engines.push_back(std::make_unique<Engine>(o, Takes::kAny));
    check_positions(*engines.back(), run);
    if (engines.back()->any.diffusion) diffusion = engines.size() - 1;
  }
  if (!engines[0]->model == !engines[1]->model)
    throw BadInput("--contrast: found {} and {}, expected an autoregressive and a block-diffusion model", engines[0]->any.architecture(),
                   engines[1]->any.architecture());
  std::vector<Row> rows;
  Progress progress("measuring", "runs", 1, !run.quiet);
  const auto total = static_cast<int64_t>(run.lengths.size() * run.batches.size() * (settings.size() + 1)) * (run.repeats + 1);
  int64_t done = 0;
  for (int64_t length : run.lengths)
    for (int64_t batch : run.batches)
      for (size_t s = 0; s <= settings.size(); ++s) {
        const size_t m = s == 0 ? 1 - diffusion : diffusion;
        const DiffusionParams p = s == 0 ? DiffusionParams{} : settings[s - 1];
        const auto tick = [&] { progress.update(done++, total, fmt::format("{} tokens, batch {}", length, batch)); };
        rows.push_back({model_name(dirs[m]) + (s == 0 ? "" : ", " + setting_name(p)),
                        measure_generation(*engines[m], p, length, batch, run.tokens, run.repeats, tick), m});
      }
  progress.finish();
  const MachineLimits limits = best_limits(engines[0]->ctx);
  const std::vector<double> flops = {flops_limit(*engines[0], limits), flops_limit(*engines[1], limits)};

  nlohmann::json json = {{"kind", "contrast"}, {"new_tokens", run.tokens}, {"repeats", run.repeats}, {"limits", limits_json(limits)}};
  std::string text;
  for (size_t m = 0; m < 2; ++m) {
    json["models"].push_back(model_json(*engines[m], dirs[m]));
    text += describe(*engines[m], dirs[m]);
  }
  text += limits_line(limits) + fmt::format("{} new tokens a sequence, median of {} runs after one to warm up\n\n", run.tokens, run.repeats);
  std::vector<std::vector<std::string>> table = {{"prompt, batch, model"}};
  table[0].insert(table[0].end(), kHead.begin(), kHead.end());
  for (const Row& row : rows) {
    json["cells"].push_back(row_json(row, limits.read_bytes_per_s, flops[row.flops_model]));
    auto& line = table.emplace_back(std::vector<std::string>{fmt::format("{}, {}, {}", row.cost.length, row.cost.batch, row.name)});
    const auto own = cells(row, limits.read_bytes_per_s, flops[row.flops_model]);
    line.insert(line.end(), own.begin(), own.end());
  }
  text += markdown_table(table) + kNotes;
  for (int64_t length : run.lengths)
    for (size_t s = 1; s <= settings.size(); ++s) {
      std::vector<Pair> pairs;
      for (size_t i = 0; i < rows.size(); i += settings.size() + 1)
        if (rows[i].cost.length == length) pairs.push_back({&rows[i], &rows[i + s]});
      nlohmann::json own = {{"length", length}, {"setting", setting_name(settings[s - 1])}};
      text += fmt::format("\nprompt of {} tokens, {}\n", length, setting_name(settings[s - 1])) +
              verdict(pairs, limits.read_bytes_per_s, flops, own);
      json["verdicts"].push_back(own);
    }
  print_out(run.json ? json.dump(2) + "\n" : text);
  return 0;
}

}  // namespace lacuna::cli

// lacuna bench: how fast and how large prefill and decode are, over lengths, policies and budgets.
#include <algorithm>
#include <chrono>

#include <fmt/ranges.h>

#include "bench_shared.h"
#include "eval/report.h"
#include "evict/evictor.h"

namespace lacuna::cli {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Of shorter prompts the default budget, 5 %, can be less than the window that laprox always keeps: unless somebody asks
// for it, and is told so, they run with the whole cache alone.
constexpr int64_t kShortestEvicted = 1024;

struct BenchOptions {
  EngineOptions engine;
  std::vector<int64_t> lengths = {1024, 4096};
  std::vector<std::string> policies = {"laprox"}, budgets = {"5%"};
  std::vector<int64_t> batches = {1};
  int64_t decode = 32, repeats = 3;
  DiffusionBenchOptions diffusion;
  std::vector<const CLI::Option*> cache_options;
  std::vector<std::string> contrast;
  bool json = false, quiet = false;
};

// One run of one cell.
struct Sample {
  double prefill_seconds = 0, evict_seconds = 0, decode_seconds = 0;
  OpTotals prefill_ops, decode_ops;
};

template <typename Value>
Spread spread(const std::vector<Sample>& samples, Value&& value) {
  std::vector<double> v;
  for (const Sample& s : samples) v.push_back(value(s));
  return spread_of(std::move(v));
}

struct Cell {
  int64_t length = 0, batch = 1;
  std::string label;
  std::vector<Sample> samples;
  nlohmann::json memory;  // peaks by tag over prefill and decode
  size_t kv_bytes = 0;    // allocated once the prompt is read, all sequences
  size_t kv_peak = 0;
};

Sample run_once(Engine& engine, const BenchOptions& o, const Variant& variant, const std::vector<int32_t>& ids,
                const std::shared_ptr<OutputProjections>& projections, Cell& cell) {
  Sample out;
  Model& model = *engine.model;
  const int64_t vocab = model.info().vocab;
  for (int t = 0; t < kMemoryTags; ++t) engine.memory.reset_peak(static_cast<MemoryTag>(t));
  std::vector<SequenceState> states;
  std::vector<float> logits(static_cast<size_t>(vocab * cell.batch));

  states.push_back(model.new_state(engine.memory, engine.kv));
  engine.ctx.trace = &out.prefill_ops;
  auto start = Clock::now();
  if (variant.full()) {
    prefill(engine.ctx, model, states[0], ids, nullptr, engine.prefill, logits.data());
  } else {
    Evictor evictor(engine.ctx, model, make_policy(variant.policy), variant.budget, {}, projections);
    prefill(engine.ctx, model, states[0], ids, &evictor, engine.prefill, logits.data());
    evictor.finish(states[0], ids, engine.prefill);
    const EvictionReport report = evictor.report(states[0]);
    out.evict_seconds = report.score_seconds + report.select_seconds + report.compact_seconds;
  }
  out.prefill_seconds = seconds_since(start);
  engine.ctx.trace = nullptr;

  states.reserve(static_cast<size_t>(cell.batch));
  while (static_cast<int64_t>(states.size()) < cell.batch)
    states.push_back(states[0].copy(engine.ctx));
  std::vector<SequenceState*> rows;
  cell.kv_bytes = 0;
  for (SequenceState& state : states) {
    rows.push_back(&state);
    cell.kv_bytes += state.kv.allocated_bytes();
  }
  std::vector<int32_t> next(states.size());
  const auto step = [&] {
    for (size_t i = 0; i < next.size(); ++i) next[i] = ids[i];  // any id
    decode_step(engine.ctx, model, rows, next, logits.data());
  };
  step();  // workspaces of the decode path
  engine.ctx.trace = &out.decode_ops;
  start = Clock::now();
  for (int64_t i = 0; i < o.decode; ++i) {
    if (interrupted()) throw Cancelled("stopped during decode");
    step();
  }
  out.decode_seconds = seconds_since(start);
  engine.ctx.trace = nullptr;
  cell.memory = memory_json(engine.memory);
  cell.kv_peak = engine.memory.peak(MemoryTag::kKv);
  return out;
}

double op_rate(const OpTotals::Sum& sum, double amount) { return per_second(amount, static_cast<double>(sum.duration_ns) * 1e-9); }

struct Rates {
  Spread prefill_tokens, decode_tokens, gemm_flops, decode_bytes, attention_bytes, evict_share;
};

Rates rates_of(const Cell& cell, const BenchOptions& o) {
  Rates r;
  const double new_tokens = static_cast<double>(o.decode * cell.batch);
  r.prefill_tokens = spread(cell.samples, [&](const Sample& s) { return per_second(static_cast<double>(cell.length), s.prefill_seconds); });
  r.decode_tokens = spread(cell.samples, [&](const Sample& s) { return per_second(new_tokens, s.decode_seconds); });
  r.gemm_flops = spread(cell.samples, [](const Sample& s) {
    const auto& gemm = s.prefill_ops.of(OpKind::kGemm);
    return op_rate(gemm, 2 * static_cast<double>(gemm.macs));
  });
  r.decode_bytes = spread(cell.samples, [](const Sample& s) {
    const OpTotals::Sum sum = s.decode_ops.total();
    return per_second(static_cast<double>(sum.weight_bytes + sum.kv_read_bytes + sum.state_bytes), s.decode_seconds);
  });
  r.attention_bytes = spread(cell.samples, [](const Sample& s) {
    const auto& attention = s.decode_ops.of(OpKind::kAttention);
    return op_rate(attention, static_cast<double>(attention.kv_read_bytes));
  });
  r.evict_share = spread(cell.samples, [](const Sample& s) { return per_second(s.evict_seconds, s.prefill_seconds); });
  return r;
}

std::string range(const Spread& s, double scale) {
  return fmt::format("{:.0f} ({:.0f}–{:.0f})", s.median * scale, s.low * scale, s.high * scale);
}

std::string share(const Spread& s, double limit, double scale) {
  return limit > 0 ? fmt::format("{:.1f}, {:.0f} %", s.median * scale, 100 * s.median / limit) : fmt::format("{:.1f}", s.median * scale);
}

// What the router of each layer did with a prompt of each length: tokens by expert. Random prompts show that
// it runs and what it costs, not how a text would be routed.
std::string expert_lines(const std::vector<Cell>& cells) {
  std::string text;
  int64_t length = 0;
  for (const Cell& cell : cells) {
    const auto& layers = cell.samples.front().prefill_ops.expert_tokens();
    if (cell.length == length || layers.empty()) continue;  // other caches read the same prompt
    length = cell.length;
    text += fmt::format("\ntokens by expert in the prefill of {}\n", length);
    for (size_t l = 0; l < layers.size(); ++l)
      if (!layers[l].empty()) text += fmt::format("layer {:>3}: {}\n", l, fmt::join(layers[l], " "));
  }
  return text;
}

int run_bench(const BenchOptions& o) {
  const std::vector<Variant> variants = list_variants(split_policies(o.policies), o.budgets, {});
  Engine engine(o.engine);
  const ModelInfo& info = engine.model->info();
  for (int64_t length : o.lengths)
    if (length + o.decode + 1 > info.max_positions)
      throw BadInput("{} tokens and {} decoded ones pass the model's {} positions", length, o.decode, info.max_positions);
  const auto projections = std::make_shared<OutputProjections>(*engine.model);

  const bool by_default = std::none_of(o.cache_options.begin(), o.cache_options.end(),
                                       [](const CLI::Option* option) { return option->count() > 0; });
  std::vector<Cell> cells;
  Progress progress("measuring", "runs", 1, !o.quiet);
  const int64_t total = static_cast<int64_t>(o.lengths.size() * o.batches.size() * variants.size()) * (o.repeats + 1);
  int64_t done = 0;
  for (int64_t length : o.lengths) {
    const std::vector<int32_t> ids = random_ids(length, info.vocab);
    for (const int64_t batch : o.batches)
      for (const Variant& variant : variants) {
        if (by_default && !variant.full() && length < kShortestEvicted) continue;
        Cell& cell = cells.emplace_back();
        cell.length = length;
        cell.batch = batch;
        cell.label = variant.label() + (o.batches.size() > 1 ? fmt::format(", batch {}", batch) : "");
        for (int64_t i = 0; i <= o.repeats; ++i) {
          progress.update(done++, total, fmt::format("{} tokens, {}", length, cell.label));
          Sample sample = run_once(engine, o, variant, ids, projections, cell);
          if (i > 0) cell.samples.push_back(std::move(sample));  // the first is the warm-up
        }
      }
  }
  progress.finish();
  const size_t resident = peak_rss();  // before the buffers below
  const MachineLimits limits = best_limits(engine.ctx);
  // What the prefill products are held against: operands of bf16 or f32.
  const bool bf16 = engine.ctx.activations == ActivationType::kBF16;
  const double flops_limit = bf16 ? std::max(limits.bf16_flops_per_s, limits.f32_flops_per_s) : limits.f32_flops_per_s;

  if (o.json) {
    nlohmann::json out = {{"kind", "bench"},
                          {"architecture", info.architecture},
                          {"parameters", info.parameters},
                          {"weight_bytes", info.weight_bytes},
                          {"token_weight_bytes", info.token_weight_bytes},
                          {"threads", engine.ctx.pool.size()},
                          {"activations", bf16 ? "bf16" : "f32"},
                          {"kv_dtype", dtype_name(engine.kv.dtype)},
                          {"decode_tokens", o.decode},
                          {"batch", o.batches.front()},
                          {"repeats", o.repeats},
                          {"limits",
                           {{"read_bytes_per_second", limits.read_bytes_per_s},
                            {"f32_flops_per_second", limits.f32_flops_per_s},
                            {"bf16_flops_per_second", limits.bf16_flops_per_s},
                            {"int8_ops_per_second", limits.int8_ops_per_s},
                            {"isa", limits.isa}}},
                          {"peak_rss_bytes", resident}};
    for (const Cell& cell : cells) {
      const Rates r = rates_of(cell, o);
      out["cells"].push_back({{"length", cell.length},
                              {"batch", cell.batch},
                              {"cache", cell.label},
                              {"prefill_tokens_per_second", spread_json(r.prefill_tokens)},
                              {"prefill_gemm_flops_per_second", spread_json(r.gemm_flops)},
                              {"prefill_gemm_share_of_limit", flops_limit > 0 ? r.gemm_flops.median / flops_limit : 0.0},
                              {"evict_share_of_prefill", spread_json(r.evict_share)},
                              {"decode_tokens_per_second", spread_json(r.decode_tokens)},
                              {"decode_bytes_per_second", spread_json(r.decode_bytes)},
                              {"decode_share_of_limit", limits.read_bytes_per_s > 0 ? r.decode_bytes.median / limits.read_bytes_per_s : 0.0},
                              {"decode_attention_bytes_per_second", spread_json(r.attention_bytes)},
                              {"kv_bytes_after_prompt", cell.kv_bytes},
                              {"memory", cell.memory}});
      if (!cell.samples.front().prefill_ops.expert_tokens().empty())
        out["cells"].back()["expert_tokens"] = {{"prefill", cell.samples.front().prefill_ops.expert_tokens()},
                                                {"decode", cell.samples.front().decode_ops.expert_tokens()}};
    }
    print_out(out.dump(2) + "\n");
    return 0;
  }
  std::string text = fmt::format(
      "{}: {:.1f} M parameters, {} of weights read a token; activations {}, KV {}; {} thread(s), {}\n"
      "limits measured now: {:.1f} GB/s read, {:.0f} GFLOP/s f32, {:.0f} bf16, {:.0f} GOP/s int8\n"
      "batch {}, {} tokens decoded, median (min–max) of {} runs after one to warm up\n\n",
      info.architecture, static_cast<double>(info.parameters) / 1e6, human_bytes(static_cast<double>(info.token_weight_bytes)),
      bf16 ? "bf16" : "f32", dtype_name(engine.kv.dtype), engine.ctx.pool.size(), limits.isa, limits.read_bytes_per_s / 1e9,
      limits.f32_flops_per_s / 1e9, limits.bf16_flops_per_s / 1e9, limits.int8_ops_per_s / 1e9, fmt::join(o.batches, ", "), o.decode, o.repeats);
  std::vector<std::vector<std::string>> speed = {{"tokens, cache", "prefill tokens/s", "products GFLOP/s, of peak", "eviction, of prefill",
                                                  "decode tokens/s", "decode GB/s, of read limit", "attention GB/s"}};
  std::vector<std::vector<std::string>> memory = {{"tokens, cache", "KV after prompt", "KV peak", "weights", "activations peak", "scratch peak"}};
  for (const Cell& cell : cells) {
    const Rates r = rates_of(cell, o);
    const std::string name = fmt::format("{}, {}", cell.length, cell.label);
    speed.push_back({name, range(r.prefill_tokens, 1), share(r.gemm_flops, flops_limit, 1e-9), fmt::format("{:.1f} %", 100 * r.evict_share.median),
                     range(r.decode_tokens, 1), share(r.decode_bytes, limits.read_bytes_per_s, 1e-9),
                     share(r.attention_bytes, limits.read_bytes_per_s, 1e-9)});
    const auto peak = [&](const char* tag) { return human_bytes(cell.memory[tag]["peak_bytes"].get<double>()); };
    memory.push_back({name, human_bytes(static_cast<double>(cell.kv_bytes)), human_bytes(static_cast<double>(cell.kv_peak)), peak("weights"),
                      peak("activations"), peak("scratch")});
  }
  print_out(text + markdown_table(speed) + "\n" + markdown_table(memory) + expert_lines(cells) +
            fmt::format("\nprocess peak {} resident\n", human_bytes(static_cast<double>(resident))));
  return 0;
}

int run(const BenchOptions& o) {
  BenchRun run{o.engine, o.lengths, o.batches, o.decode, o.repeats, o.json, o.quiet};
  if (!o.contrast.empty()) {
    if (!o.engine.model_dir.empty()) throw BadInput("-m: --contrast names its two models itself");
    refuse_given(o.cache_options, "--contrast compares whole caches");
    return bench_contrast(run, o.contrast, o.diffusion);
  }
  if (o.engine.model_dir.empty()) throw BadInput("no model: give -m DIR, or --contrast A B");
  if (is_diffusion(o.engine)) {
    refuse_given(o.cache_options, "a block-diffusion model has no cache that could be evicted");
    return bench_diffusion(run, o.diffusion);
  }
  refuse_given(o.diffusion.options, "the model is autoregressive; the option is for block-diffusion models (Cola DLM)");
  return run_bench(o);
}

}  // namespace

Command add_bench(CLI::App& parent) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App* app = parent.add_subcommand("bench", "Measure prefill and decode: time, bytes, and the share of what this machine can do");
  add_engine_options(*app, o->engine);
  app->add_option("--lengths", o->lengths, "Prompt tokens")->delimiter(',')->check(CLI::Range(1, 1 << 24))->capture_default_str();
  o->cache_options = {
      app->add_option("--policies", o->policies, "Eviction policies beside the full cache")->capture_default_str(),
      app->add_option("--budgets", o->budgets, "Each policy at each: 5%, 256, 64MiB, mass:0.99")->delimiter(',')->capture_default_str()};
  app->add_option("-n,--decode", o->decode, "Tokens decoded")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  app->add_option("--batch", o->batches, "Sequences decoded at once")->delimiter(',')->check(CLI::Range(1, 1024))->capture_default_str();
  add_diffusion_bench_options(*app, o->diffusion, o->engine);
  app->add_option("--contrast", o->contrast, "Two model directories, one of them block diffusion: bytes and operations a token side by side, and what binds")
      ->expected(2);
  app->add_option("--repeats", o->repeats, "Runs measured, after one to warm up")->check(CLI::Range(1, 1000))->capture_default_str();
  app->add_flag("--json", o->json, "Machine-readable output (docs/eval.md)");
  app->add_flag("-q,--quiet", o->quiet, "No progress");
  app->get_option("--model")->required(false);
  return {app, [o] { return run(*o); }};
}

}  // namespace lacuna::cli

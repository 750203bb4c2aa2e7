// lacuna eval: accuracy, perplexity and fidelity of many caches, each prompt read once for all of them.
#include <algorithm>
#include <charconv>
#include <filesystem>

#include "base/atomic_file.h"
#include "subject.h"
#include "eval/fidelity.h"
#include "eval/report.h"
#include "eval/result_log.h"
#include "eval/spikes.h"

namespace lacuna::cli {
namespace {

struct EvalOptions {
  EngineOptions engine;
  // What is compared.
  std::vector<std::string> policies = {"laprox", "snapkv"}, budgets = {"5%", "10%", "20%"}, variants;
  // What is asked.
  std::string tasks, wordings = "train", prompts_file, haystack = "data/books", match = "all";
  std::vector<std::string> files;
  std::vector<int64_t> lengths;
  std::vector<double> depths;
  int64_t count = 100, first_index = 0, new_tokens = 128;
  uint64_t seed = 1;
  bool query_agnostic = false;
  std::string first_token = "dense";
  // Plain text.
  int64_t context = 4096, continuation = 256, window = 8192, windows = 20;
  // Block-diffusion models.
  DiffusionOptions diffusion;
  std::vector<const CLI::Option*> cache_options;  // what only means something for a cache that can be evicted
  // What comes out.
  std::vector<std::string> logs;
  std::string html, title = "How much of the cache is enough?", reference;
  bool json = false, quiet = false;
};

void present(const EvalOptions& o, const EvalRun& run) {
  const EvalSummary summary = summarise(run, o.reference.empty() ? "" : make_policy(o.reference)->name());
  if (!o.html.empty()) write_file(o.html, html_report(summary, o.title));
  if (o.json) print_json(json_report(summary));
  else print_out(markdown_report(summary));
}

// Every prompt of a run, in an order in which any prefix covers all cells alike.
std::vector<TaskMaker::Request> list_requests(const EvalOptions& o, const TaskMaker& maker) {
  std::vector<TaskMaker::Request> out;
  const std::vector<std::string> tasks = maker.expand(o.tasks);
  for (int64_t index = o.first_index; index < o.first_index + o.count; ++index)
    for (int64_t length : o.lengths)
      for (const std::string& task : tasks) {
        if (o.depths.empty()) out.push_back({task, length, index, o.wordings, {}});
        for (double depth : o.depths) out.push_back({task, length, index, o.wordings, depth});
      }
  return out;
}

EvalHeader make_header(const EvalOptions& o, const Engine& engine, const std::vector<Variant>& variants) {
  EvalHeader h;
  h.model = std::filesystem::path(o.engine.model_dir).lexically_normal().filename().string();
  if (h.model.empty()) h.model = std::filesystem::path(o.engine.model_dir).lexically_normal().parent_path().filename().string();
  h.activations = engine.ctx.activations == ActivationType::kBF16 ? "bf16" : "f32";
  h.kv_dtype = dtype_name(engine.kv.dtype);
  h.wordings = o.files.empty() ? o.wordings : "file";
  for (const auto& file : o.files) h.haystack += (h.haystack.empty() ? "" : ", ") + std::filesystem::path(file).filename().string();
  if (o.files.empty()) h.haystack = std::filesystem::path(o.haystack).lexically_normal().filename().string();
  h.seed = o.seed;
  h.query_agnostic = o.query_agnostic;
  h.first_token = o.first_token == "rerun" ? FirstToken::kRerun : FirstToken::kDense;
  for (const Variant& v : variants) h.variants.push_back(v.label());
  return h;
}

int run_tasks(const EvalOptions& o) {
  if (o.logs.size() > 1) throw BadInput("--log: one log is written; lacuna eval report joins several");
  const bool diffusion = is_diffusion(o.engine);
  if (diffusion) refuse_given(o.cache_options, "a block-diffusion model has no cache that could be evicted; its tasks run with the whole one");
  else refuse_given(o.diffusion.options, "the model is autoregressive; the option is for block-diffusion models (Cola DLM)");
  const std::vector<Variant> variants =
      diffusion ? list_variants({}, {}, {}) : list_variants(split_policies(o.policies), o.budgets, o.variants);
  const DiffusionParams params = o.diffusion.open();
  const PromptSpec spec = o.prompts_file.empty() ? builtin_prompt_spec() : parse_prompt_spec(read_text_file(o.prompts_file), o.prompts_file);
  std::vector<std::pair<std::string, JsonlPrompt>> lines;
  for (const std::string& file : o.files)
    for (auto& line : read_jsonl(file)) lines.emplace_back(std::filesystem::path(file).stem().string(), std::move(line));
  const Haystack books = lines.empty() ? Haystack::open(o.haystack) : Haystack();

  Subject subject(o.engine);
  const TaskMaker maker(spec, books, subject.codec.encode, o.seed, subject.codec.before);
  const std::vector<TaskMaker::Request> requests = lines.empty() ? list_requests(o, maker) : std::vector<TaskMaker::Request>{};
  RunnerOptions options;
  options.kv = subject.engine.kv;
  options.prefill = subject.engine.prefill;
  options.query_agnostic = o.query_agnostic;
  options.first_token = o.first_token == "rerun" ? FirstToken::kRerun : FirstToken::kDense;
  std::unique_ptr<PromptRunner> runner;
  std::unique_ptr<Generator> generator;
  if (diffusion) generator = make_generator(subject.engine.ctx, subject.engine.any, subject.text, options.kv, options.prefill, params);
  else runner = std::make_unique<PromptRunner>(subject.engine.ctx, *subject.engine.model, subject.codec, variants, options);
  ResultLog log(o.logs.empty() ? "" : o.logs[0], make_header(o, subject.engine, variants));

  const int64_t total = static_cast<int64_t>(lines.empty() ? requests.size() : lines.size());
  Progress progress("evaluating", "prompts", 1, !o.quiet);
  for (int64_t i = 0; i < total; ++i) {
    TaskPrompt prompt;
    if (lines.empty()) {
      const auto& r = requests[static_cast<size_t>(i)];
      if (log.has(r.task, r.length, r.index, r.depth.value_or(-1))) continue;
      prompt = maker.make(r);
    } else {
      const auto& [name, line] = lines[static_cast<size_t>(i)];
      if (log.has(name, line.length, line.index, -1)) continue;
      prompt = from_jsonl(line, name, subject.codec.encode, subject.codec.before, o.match == "part" ? MatchRule::kPart : MatchRule::kAll,
                          o.new_tokens);
    }
    progress.update(i, total, fmt::format("{} {}", prompt.task, prompt.ids.size()));
    log.append(runner ? runner->run(prompt) : run_generated(*generator, prompt, {.cancelled = interrupted}));
    progress.update(i + 1, total, fmt::format("{} {}", prompt.task, prompt.ids.size()));
  }
  progress.finish();
  present(o, log.run());
  return 0;
}

std::vector<std::string> plain_texts(const EvalOptions& o) {
  std::vector<std::string> texts;
  for (const std::string& file : o.files) texts.push_back(read_text_file(file));
  if (texts.empty()) {
    const Haystack books = Haystack::open(o.haystack);
    for (const auto& book : books.books()) texts.push_back(book.text);
  }
  return texts;
}

int run_fidelity(const EvalOptions& o) {
  const std::vector<Variant> variants = list_variants(split_policies(o.policies), o.budgets, o.variants);
  const std::vector<std::string> texts = plain_texts(o);
  Subject subject(o.engine, "fidelity compares smaller caches, and it has no cache that could be evicted");
  TextOptions options;
  options.context = o.context;
  options.continuation = o.continuation;
  options.windows = o.windows;
  options.kv = subject.engine.kv;
  options.prefill = subject.engine.prefill;
  Progress progress("reading", "stretches", 1, !o.quiet);
  const FidelityResult result =
      measure_fidelity(subject.engine.ctx, *subject.engine.model, subject.codec, texts, variants, options,
                       [&](int64_t done, int64_t total) { progress.update(done, total); });
  progress.finish();
  if (o.json) print_json(json_report(result));
  else print_out(fmt::format("{} tokens of context, then {} tokens\n", o.context, o.continuation) + markdown_report(result));
  return 0;
}

int run_perplexity(const EvalOptions& o) {
  if (!o.policies.empty() || !o.variants.empty()) return run_fidelity(o);
  const std::vector<std::string> texts = plain_texts(o);
  Subject subject(o.engine, "it gives no likelihood of a text and so no perplexity; see eval samples and eval reconstruct");
  Progress progress("reading", "windows", 1, !o.quiet);
  const PerplexityResult r =
      measure_perplexity(subject.engine.ctx, *subject.engine.model, subject.codec, texts, o.window, o.windows, subject.engine.kv,
                         subject.engine.prefill, [&](int64_t done, int64_t total) { progress.update(done, total); });
  progress.finish();
  const auto interval = [](const Interval& i) { return Json{{"value", i.value}, {"low", i.low}, {"high", i.high}}; };
  if (o.json) {
    print_json({{"kind", "perplexity"}, {"window", o.window}, {"windows", r.windows}, {"tokens", r.tokens}, {"bytes", r.bytes},
                {"nats_per_token", interval(r.nats)}, {"bits_per_byte", interval(r.bits_per_byte)}});
    return 0;
  }
  print_out(fmt::format("{} windows of {} tokens, {} tokens and {} bytes scored, 95 % intervals over windows\n\n", r.windows, o.window, r.tokens, r.bytes) +
            markdown_table({{"", "value", "interval"},
                            {"nats a token", fmt::format("{:.4f}", r.nats.value), fmt::format("[{:.4f}, {:.4f}]", r.nats.low, r.nats.high)},
                            {"perplexity", fmt::format("{:.2f}", std::exp(r.nats.value)),
                             fmt::format("[{:.2f}, {:.2f}]", std::exp(r.nats.low), std::exp(r.nats.high))},
                            {"bits a byte", fmt::format("{:.4f}", r.bits_per_byte.value),
                             fmt::format("[{:.4f}, {:.4f}]", r.bits_per_byte.low, r.bits_per_byte.high)}}));
  return 0;
}

int run_spikes(const EvalOptions& o) {
  const std::vector<std::string> texts = plain_texts(o);
  Subject subject(o.engine, "its activations are not spike-coded");
  Progress progress("reading", "windows", 1, !o.quiet);
  const SpikeResult result =
      measure_spikes(subject.engine.ctx, *subject.engine.model, subject.codec, texts, o.window, o.windows, subject.engine.kv,
                     subject.engine.prefill, [&](int64_t done, int64_t total) { progress.update(done, total); });
  progress.finish();
  if (o.json) print_json(json_report(result));
  else print_out(markdown_report(result));
  return 0;
}

// Logs of one configuration (lengths, tasks or prompts may differ) as one report.
int run_report(const EvalOptions& o) {
  EvalRun run;
  for (size_t i = 0; i < o.logs.size(); ++i) {
    EvalRun next = read_result_log(o.logs[i]);
    if (i == 0) {
      run = std::move(next);
      continue;
    }
    if (next.header.variants != run.header.variants || next.header.query_agnostic != run.header.query_agnostic ||
        next.header.first_token != run.header.first_token)
      throw BadInput("{} and {} do not compare the same caches in the same way", o.logs[0], o.logs[i]);
    run.results.insert(run.results.end(), std::make_move_iterator(next.results.begin()), std::make_move_iterator(next.results.end()));
  }
  present(o, run);
  return 0;
}

void add_variant_options(CLI::App& app, EvalOptions& o) {
  o.cache_options = {
      app.add_option("--policies", o.policies, "Eviction policies, with switches: laprox,snapkv,adakv:snapkv,… (docs/policies.md)")
          ->capture_default_str(),
      app.add_option("--budgets", o.budgets, "Each policy at each: 5%, 256 (entries a KV head), 64MiB, mass:0.99")->delimiter(',')->capture_default_str(),
      app.add_option("--variants", o.variants, "Further caches: POLICY@BUDGET, full+int8, full+int4, POLICY@BUDGET+int4, …")->delimiter(';')};
}

void add_output_options(CLI::App& app, EvalOptions& o) {
  app.add_flag("--json", o.json, "Machine-readable output (docs/eval.md)");
  app.add_flag("-q,--quiet", o.quiet, "No progress");
}

void add_report_options(CLI::App& app, EvalOptions& o) {
  app.add_option("--html", o.html, "Also write an HTML page with curves, maps and tables");
  app.add_option("--title", o.title, "Its title");
  app.add_option("--reference", o.reference, "The policy that others are compared with; default: the first");
}

void add_task_options(CLI::App& app, EvalOptions& o) {
  add_engine_options(app, o.engine);
  add_variant_options(app, o);
  app.add_option("--tasks", o.tasks, "ruler (the 14), all (qa too), or names with commas")->capture_default_str();
  app.add_option("--lengths", o.lengths, "Tokens of prompt and answer together")->delimiter(',')->check(CLI::Range(64, 1 << 24))->capture_default_str();
  app.add_option("--wordings", o.wordings, "train: as the shipped model has seen them; held_out: wordings it has not")
      ->check(CLI::IsMember({"train", "held_out"}))->capture_default_str();
  app.add_option("-n,--count", o.count, "Prompts a cell")->check(CLI::Range(int64_t{1}, int64_t{1} << 20))->capture_default_str();
  app.add_option("--first", o.first_index, "Index of the first prompt, to split a run over machines")->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  app.add_option("--seed", o.seed)->capture_default_str();
  app.add_option("--haystack", o.haystack, "Text file, or folder of .txt files, that contexts are taken from")->capture_default_str();
  app.add_option("--prompts", o.prompts_file, "Wordings and tasks in the layout of presets/prompts/tasks.json instead of the built-in ones");
  o.cache_options.push_back(app.add_flag("--agnostic", o.query_agnostic, "Compress the context before the question is known, then read the question"));
  o.cache_options.push_back(
      app.add_option("--first-token", o.first_token, "dense: from the full prefill, as in generation; rerun: run the last prompt token on the small cache")
          ->check(CLI::IsMember({"dense", "rerun"}))->capture_default_str());
  add_diffusion_options(app, o.diffusion, o.engine);
  app.add_option("--log", o.logs, "Write every prompt's result here as JSON lines; run again to go on");
  add_report_options(app, o);
  add_output_options(app, o);
}

void add_text_options(CLI::App& app, EvalOptions& o) {
  add_engine_options(app, o.engine);
  add_variant_options(app, o);
  app.add_option("-f,--file", o.files, "Plain text; may be repeated; default: every book of --haystack")->allow_extra_args(false);
  app.add_option("--haystack", o.haystack)->capture_default_str();
  app.add_option("--context", o.context, "Tokens read before the cache is made smaller")->check(CLI::Range(1, 1 << 24))->capture_default_str();
  app.add_option("--continuation", o.continuation, "Tokens scored after that")->check(CLI::Range(2, 1 << 20))->capture_default_str();
  app.add_option("--windows", o.windows, "Stretches of text, spread evenly")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  add_output_options(app, o);
}

}  // namespace

Command add_eval(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("eval", "Measure what a smaller cache costs (tasks, perplexity, fidelity), or what a generator writes");
  app->require_subcommand(1);
  const std::vector<Command> of_generation = add_generation_evals(*app);

  auto ruler = std::make_shared<EvalOptions>();
  ruler->tasks = "ruler";
  ruler->lengths = {4096};
  CLI::App* ruler_app = app->add_subcommand("ruler", "Long-context tasks of RULER's kinds, made on the spot or read from a file");
  add_task_options(*ruler_app, *ruler);
  ruler_app->add_option("-f,--file", ruler->files, "A RULER-format JSONL file (index, input, outputs) instead of made prompts; may be repeated")
      ->allow_extra_args(false);
  ruler_app->add_option("--new-tokens", ruler->new_tokens, "Longest answer to a file's prompt")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  ruler_app->add_option("--match", ruler->match, "A file's score: all (share of outputs found) or part (any of them)")
      ->check(CLI::IsMember({"all", "part"}))->capture_default_str();

  auto needle = std::make_shared<EvalOptions>();
  needle->tasks = "single_number_book";
  needle->lengths = {1024, 2048, 4096, 8192};
  needle->depths = {0, 0.25, 0.5, 0.75, 1};
  needle->count = 10;
  CLI::App* needle_app = app->add_subcommand("needle", "One needle over a grid of depths and lengths");
  add_task_options(*needle_app, *needle);
  needle_app->add_option("--depths", needle->depths, "0 = start of the context … 1 = its end")->delimiter(',')->check(CLI::Range(0.0, 1.0))->capture_default_str();

  auto ppl = std::make_shared<EvalOptions>();
  ppl->policies.clear();
  CLI::App* ppl_app = app->add_subcommand("ppl", "Perplexity of plain text; with --policies, of what follows an evicted context");
  add_text_options(*ppl_app, *ppl);
  ppl_app->add_option("--window", ppl->window, "Tokens read at a time, without --policies")->check(CLI::Range(2, 1 << 24))->capture_default_str();

  auto fidelity = std::make_shared<EvalOptions>();
  CLI::App* fidelity_app = app->add_subcommand("fidelity", "KL divergence, top-1 agreement and layer error against the full cache on plain text");
  add_text_options(*fidelity_app, *fidelity);

  auto spikes = std::make_shared<EvalOptions>();
  spikes->window = 1024;
  spikes->windows = 8;
  CLI::App* spikes_app = app->add_subcommand("spikes", "How sparse spike-coded activations are on plain text, under every definition");
  add_engine_options(*spikes_app, spikes->engine);
  spikes_app->add_option("-f,--text,--file", spikes->files, "Plain text; may be repeated; default: every book of --haystack")->allow_extra_args(false);
  spikes_app->add_option("--haystack", spikes->haystack)->capture_default_str();
  spikes_app->add_option("--window", spikes->window, "Tokens read at a time")->check(CLI::Range(2, 1 << 24))->capture_default_str();
  spikes_app->add_option("--windows", spikes->windows, "Stretches of text, spread evenly")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  add_output_options(*spikes_app, *spikes);

  auto report = std::make_shared<EvalOptions>();
  CLI::App* report_app = app->add_subcommand("report", "Tables and page from the logs of earlier runs");
  report_app->add_option("--log", report->logs, "Logs of ruler or needle")->required();
  add_report_options(*report_app, *report);
  add_output_options(*report_app, *report);

  return {app, [=] {
            for (const Command& command : of_generation)
              if (command.app->parsed()) return command.run();
            if (ruler_app->parsed()) return run_tasks(*ruler);
            if (needle_app->parsed()) return run_tasks(*needle);
            if (ppl_app->parsed()) return run_perplexity(*ppl);
            if (fidelity_app->parsed()) return run_fidelity(*fidelity);
            if (spikes_app->parsed()) return run_spikes(*spikes);
            return run_report(*report);
          }};
}

}  // namespace lacuna::cli

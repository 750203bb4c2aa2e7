// lacuna eval samples, reconstruct, score: what a generator writes, what a text VAE keeps, what a diffusion model expects.
#include <filesystem>

#include "base/atomic_file.h"
#include "eval/reconstruct.h"
#include "eval/samples.h"
#include "generate/diffusion_score.h"
#include "subject.h"

namespace lacuna::cli {
namespace {

constexpr const char* kOnlyDiffusion = "the model is autoregressive; the option is for block-diffusion models (Cola DLM)";

struct TextSource {
  std::vector<std::string> files;
  std::string haystack = "data/books";

  void add(CLI::App& app) {
    app.add_option("-f,--text,--file", files, "Plain text; may be repeated; default: every book of --haystack")->allow_extra_args(false);
    app.add_option("--haystack", haystack)->capture_default_str();
  }
  std::vector<std::string> read() const {
    std::vector<std::string> texts;
    for (const std::string& file : files) texts.push_back(read_text(file));
    if (texts.empty()) {
      const Haystack books = Haystack::open(haystack);
      for (const auto& book : books.books()) texts.push_back(book.text);
    }
    return texts;
  }
};

struct SampleOptions {
  EngineOptions engine;
  DiffusionOptions diffusion;
  TextSource text;
  SamplingParams sampling;
  std::vector<int> steps;
  std::vector<float> guidance;
  std::string judge, html, title = "What it writes";
  int64_t prompt = 64, count = 32, batch = 16;
  bool json = false, quiet = false;
};

int run_samples(const SampleOptions& o) {
  const bool diffusion = is_diffusion(o.engine);
  if (!diffusion) {
    refuse_given(o.diffusion.options, kOnlyDiffusion);
    if (!o.steps.empty() || !o.guidance.empty()) throw BadInput("--steps-grid, --guidance-grid: {}", kOnlyDiffusion);
  }
  validate(o.sampling);
  const std::vector<std::string> texts = o.text.read();
  const DiffusionParams params = o.diffusion.open();
  Subject subject(o.engine);
  const std::vector<SamplePrompt> prompts = cut_prompts(subject.codec, texts, o.count, o.prompt, o.sampling.max_new_tokens);
  std::unique_ptr<Subject> judge_model;
  std::unique_ptr<Judge> judge;
  if (!o.judge.empty()) {
    EngineOptions judge_options;
    judge_options.model_dir = o.judge;
    judge_options.threads = o.engine.threads;
    judge_model = std::make_unique<Subject>(judge_options, "a judge gives likelihoods, which only an autoregressive model has");
    judge = std::make_unique<Judge>(judge_model->engine.ctx, *judge_model->engine.model, judge_model->codec, judge_model->engine.kv,
                                    judge_model->engine.prefill);
  }
  std::vector<std::pair<std::string, DiffusionParams>> settings;
  if (!diffusion) settings.emplace_back(subject.engine.any.architecture(), params);
  const std::vector<int> steps = o.steps.empty() ? std::vector<int>{params.steps} : o.steps;
  const std::vector<float> guidance = o.guidance.empty() ? std::vector<float>{params.guidance} : o.guidance;
  for (size_t s = 0; diffusion && s < steps.size(); ++s)
    for (float g : guidance) {
      DiffusionParams p = params;
      p.steps = steps[s];
      p.guidance = g;
      validate(p);
      settings.emplace_back(fmt::format("{} steps, guidance {:g}", p.steps, g), p);
    }

  std::vector<SampleResult> rows = {measure_references(prompts, judge.get())};
  Progress progress("writing", "texts", 1, !o.quiet);
  for (size_t i = 0; i < settings.size(); ++i) {
    const auto generator = make_generator(subject.engine.ctx, subject.engine.any, subject.text, subject.engine.kv, subject.engine.prefill,
                                          settings[i].second);
    const auto all = static_cast<int64_t>(prompts.size());
    rows.push_back(measure_samples(*generator, prompts, o.sampling, o.batch, judge.get(), {.cancelled = interrupted}, [&](int64_t done, int64_t) {
      progress.update(static_cast<int64_t>(i) * all + done, static_cast<int64_t>(settings.size()) * all, settings[i].first);
    }));
    rows.back().label = settings[i].first;
  }
  progress.finish();
  if (!o.html.empty()) write_file(o.html, html_report(rows, prompts, o.title));
  if (o.json) {
    Json out = json_report(rows);
    out["model"] = subject.engine.any.architecture();
    out["judge"] = o.judge.empty() ? "" : std::filesystem::path(o.judge).lexically_normal().filename().string();
    out["prompt_tokens"] = o.prompt;
    out["new_tokens"] = o.sampling.max_new_tokens;
    out["seed"] = o.sampling.seed;
    for (const SamplePrompt& p : prompts) out["prompts"].push_back(p.text);
    print_json(out);
    return 0;
  }
  print_out(fmt::format("{} prompts of {} tokens, {} new tokens at most, batch {}{}\n\n", prompts.size(), o.prompt, o.sampling.max_new_tokens, o.batch,
                        judge ? "; bits a byte are the judge's, given the prompt" : "") +
            markdown_report(rows));
  return 0;
}

struct ReconstructOptions {
  EngineOptions engine;
  TextSource text;
  std::vector<double> grid = {0, 50, 100, 150, 200, 250, 300, 350, 400, 500, 600, 700, 850, 1000};
  int64_t window = 512, windows = 16;
  uint64_t seed = 0;
  bool json = false, quiet = false;
};

int run_reconstruct(const ReconstructOptions& o) {
  if (!is_diffusion(o.engine)) throw Unsupported("{}: the model has no text VAE; reconstruct is for Cola DLM", o.engine.model_dir);
  const std::vector<std::string> texts = o.text.read();
  Subject subject(o.engine);
  Progress progress("reading", "windows", 1, !o.quiet);
  const ReconstructResult result =
      measure_reconstruction(subject.engine.ctx, *subject.engine.any.diffusion, subject.codec, texts, o.window, o.windows, o.grid, o.seed,
                             [&](int64_t done, int64_t total) {
                               progress.update(done, total);
                               if (interrupted()) throw Cancelled("stopped after {} windows", done);
                             });
  progress.finish();
  if (o.json) print_json(json_report(result));
  else print_out(markdown_report(result));
  return 0;
}

struct ScoreOptions {
  EngineOptions engine;
  DiffusionScoreOptions score;
  std::string prompt;
  std::vector<std::string> continuations;
  bool exact_timesteps = false, json = false;
};

int run_score(const ScoreOptions& o) {
  if (!is_diffusion(o.engine)) throw Unsupported("{}: the model is autoregressive, and has likelihoods: see eval ppl", o.engine.model_dir);
  Subject subject(o.engine);
  DiffusionScoreOptions options = o.score;
  options.rounding = o.exact_timesteps ? TimestepRounding::kNone : TimestepRounding::kBf16;
  std::vector<int32_t> prompt = subject.codec.before;
  const std::vector<int32_t> read = subject.codec.encode(o.prompt);
  prompt.insert(prompt.end(), read.begin(), read.end());
  Json json = {{"kind", "score"}, {"timesteps", options.timesteps}, {"seeds", options.seeds}, {"seed", options.seed}};
  std::vector<std::vector<std::string>> rows = {{"continuation", "tokens", "velocity error", "without the prompt", "gain", "reconstruction, nats a token"}};
  for (const std::string& text : o.continuations) {
    const DiffusionScore s = score_continuation(subject.engine.ctx, *subject.engine.any.diffusion, prompt, subject.codec.encode(text), options,
                                                subject.engine.kv);
    if (interrupted()) throw Cancelled("stopped");
    rows.push_back({text, fmt::format("{}", s.tokens), fmt::format("{:.4f}", s.velocity_error), fmt::format("{:.4f}", s.velocity_error_alone),
                    fmt::format("{:.4f}", s.velocity_error_alone - s.velocity_error), fmt::format("{:.4f}", s.reconstruction)});
    json["continuations"].push_back({{"text", text}, {"tokens", s.tokens}, {"latents", s.latents}, {"velocity_error", s.velocity_error},
                                     {"velocity_error_alone", s.velocity_error_alone}, {"by_timestep", s.by_timestep},
                                     {"reconstruction", s.reconstruction}});
  }
  if (o.json) print_json(json);
  else
    print_out(markdown_table(rows) + fmt::format("\nFlow-matching errors over {} timesteps and {} noise(s): lower is more expected. They are not likelihoods, and "
                                                 "compare continuations of one prompt only.\n", options.timesteps, options.seeds));
  return 0;
}

}  // namespace

std::vector<Command> add_generation_evals(CLI::App& eval) {
  auto s = std::make_shared<SampleOptions>();
  s->sampling.max_new_tokens = 64;
  CLI::App* samples = eval.add_subcommand("samples", "Continue texts with any model: a judge's likelihood, variety, repetition, speed");
  add_engine_options(*samples, s->engine);
  add_diffusion_options(*samples, s->diffusion, s->engine);
  s->text.add(*samples);
  samples->add_option("--steps-grid", s->steps, "Block diffusion: each of these instead of --steps")->delimiter(',')->check(CLI::Range(1, 1000));
  samples->add_option("--guidance-grid", s->guidance, "Block diffusion: each of these instead of --guidance")->delimiter(',');
  samples->add_option("--judge", s->judge, "An autoregressive model that says how likely the texts are");
  samples->add_option("--prompt-tokens", s->prompt, "Tokens of a prompt")->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  samples->add_option("--count", s->count, "Prompts, spread evenly over the texts")->check(CLI::Range(int64_t{1}, int64_t{1} << 20))->capture_default_str();
  samples->add_option("--batch", s->batch, "Prompts at a time")->check(CLI::Range(int64_t{1}, int64_t{1024}))->capture_default_str();
  samples->add_option("-n,--max-tokens", s->sampling.max_new_tokens, "New tokens at most")->capture_default_str();
  samples->add_option("--temperature", s->sampling.temperature, "0 = greedy");
  samples->add_option("--top-k", s->sampling.top_k);
  samples->add_option("--top-p", s->sampling.top_p);
  samples->add_option("--min-p", s->sampling.min_p);
  samples->add_option("--repetition-penalty", s->sampling.repetition_penalty);
  samples->add_option("--seed", s->sampling.seed, "Prompt i draws with seed + i")->capture_default_str();
  samples->add_flag("--ignore-eos", s->sampling.ignore_eos, "Go on after end-of-text");
  samples->add_option("--html", s->html, "Also write a page with the table and the first texts");
  samples->add_option("--title", s->title, "Its title");
  samples->add_flag("--json", s->json, "Machine-readable output (docs/eval.md)");
  samples->add_flag("-q,--quiet", s->quiet, "No progress");

  auto r = std::make_shared<ReconstructOptions>();
  CLI::App* reconstruct = eval.add_subcommand("reconstruct", "Cola DLM: share of tokens its VAE gives back from latents with noise");
  add_engine_options(*reconstruct, r->engine);
  r->text.add(*reconstruct);
  reconstruct->add_option("--grid", r->grid, "Timesteps 0 … 1000: latents are (1 - t / 1000) z + t / 1000 noise")->delimiter(',')->check(CLI::Range(0.0, 1000.0));
  reconstruct->add_option("--window", r->window, "Tokens encoded at a time")->check(CLI::Range(int64_t{1}, int64_t{1} << 20))->capture_default_str();
  reconstruct->add_option("--windows", r->windows, "Stretches of text, spread evenly")->check(CLI::Range(int64_t{1}, int64_t{1} << 20))->capture_default_str();
  reconstruct->add_option("--seed", r->seed)->capture_default_str();
  reconstruct->add_flag("--json", r->json, "Machine-readable output (docs/eval.md)");
  reconstruct->add_flag("-q,--quiet", r->quiet, "No progress");

  auto c = std::make_shared<ScoreOptions>();
  CLI::App* score = eval.add_subcommand("score", "Cola DLM: flow-matching error of given continuations of a prompt (not a likelihood)");
  add_engine_options(*score, c->engine);
  score->add_option("-p,--prompt", c->prompt, "The prompt; may be empty");
  score->add_option("-c,--continuation", c->continuations, "A text after it; may be repeated")->required()->allow_extra_args(false);
  score->add_option("--timesteps", c->score.timesteps, "Timesteps averaged over")->check(CLI::Range(1, 1000))->capture_default_str();
  score->add_option("--seeds", c->score.seeds, "Noises a timestep")->check(CLI::Range(1, 1000))->capture_default_str();
  score->add_option("--seed", c->score.seed);
  score->add_option("--block-size", c->engine.diffusion_block, "Latents denoised together; default: the checkpoint's")->check(CLI::Range(1, 4096));
  score->add_flag("--exact-timesteps", c->exact_timesteps, "Do not round timesteps to bf16");
  score->add_flag("--json", c->json, "Machine-readable output (docs/eval.md)");

  return {{samples, [s] { return run_samples(*s); }}, {reconstruct, [r] { return run_reconstruct(*r); }}, {score, [c] { return run_score(*c); }}};
}

}  // namespace lacuna::cli

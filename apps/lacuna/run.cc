// lacuna run: generate text, with the cache as small as asked, and say what it cost.
#include <cstdio>

#include "cli.h"

namespace lacuna::cli {
namespace {

struct RunOptions {
  EngineOptions engine;
  std::vector<std::string> prompts, files;
  std::string context_file;
  bool ask_later = false;
  std::string evict, budget = "5%", evict_at = "prefill";
  std::vector<std::string> compare;
  std::string kept_file, picture_file;
  std::string save_file, load_file;
  SamplingParams sampling;
  DiffusionOptions diffusion;
  std::string infill;
  bool show_denoising = false;
  std::vector<const CLI::Option*> cache_options;  // what only means something for a cache that can be evicted or stored
  std::vector<const CLI::Option*> diffusion_options;  // beside those of `diffusion`
  const CLI::Option* penalty = nullptr;
  bool json = false, quiet = false;
};

// One way to run the prompts: a policy and budget, or the whole cache.
struct Variant {
  std::string policy, budget;  // policy "full": nothing is evicted
  bool full() const { return policy == "full"; }
  std::string name() const { return full() ? "full cache" : policy + " " + budget; }
};

Variant parse_variant(const std::string& text, const std::string& default_budget) {
  const size_t at = text.rfind('@');
  return at == std::string::npos ? Variant{text, default_budget} : Variant{text.substr(0, at), text.substr(at + 1)};
}

struct Outcome {
  Variant variant;
  std::vector<GenerateResult> results;
  GenerateStats stats;
};

nlohmann::json outcome_json(const Outcome& o, const MachineLimits& limits, const Engine& engine, size_t resident) {
  nlohmann::json out;
  out["policy"] = o.variant.policy;
  if (!o.variant.full()) out["budget"] = o.variant.budget;
  for (const auto& r : o.results) {
    nlohmann::json item = {{"text", r.text},
                           {"ids", r.ids},
                           {"finish", finish_reason_name(r.finish)},
                           {"prompt_tokens", r.prompt_tokens},
                           {"prefill_seconds", r.prefill_seconds},
                           {"kv_bytes", r.kv_bytes},
                           {"kv_slots", r.kv_slots},
                           {"state_bytes", r.state_bytes}};
    if (r.eviction) {
      item["entries_before"] = r.eviction->entries_before;
      item["entries_kept"] = r.eviction->entries_kept;
      item["score_seconds"] = r.eviction->score_seconds;
      item["select_seconds"] = r.eviction->select_seconds;
      item["slack_bytes"] = r.eviction->slack_bytes;
    }
    out["results"].push_back(item);
  }
  const OpTotals::Sum ops = o.stats.decode_ops.total();
  out["decode"] = {{"tokens", o.stats.decode_tokens},
                   {"steps", o.stats.decode_steps},
                   {"seconds", o.stats.decode_seconds},
                   {"bytes", ops.bytes()},
                   {"machine_read_bytes_per_second", limits.read_bytes_per_s}};
  if (o.stats.diffusion) {
    const DiffusionStats& d = *o.stats.diffusion;
    out["diffusion"] = {{"blocks", d.blocks}, {"sweeps", d.sweeps}, {"rows", d.rows}, {"timestep_seconds", d.timestep_seconds},
                        {"encode_seconds", d.encode_seconds}, {"prefill_seconds", d.prefill_seconds},
                        {"denoise_seconds", d.denoise_seconds}, {"decode_seconds", d.decode_seconds},
                        {"denoise_bytes", d.denoise_ops.total().bytes()}, {"decode_bytes", d.vae_ops.total().bytes()}};
  }
  if (!o.stats.decode_ops.expert_tokens().empty()) out["decode"]["expert_tokens"] = o.stats.decode_ops.expert_tokens();
  out["kv_peak_bytes"] = o.stats.kv_peak_bytes;
  out["memory"] = memory_json(engine.memory);
  out["peak_rss_bytes"] = resident;
  return out;
}

// "(7.1 GB/s, 31 % of the 22.9 GB/s this machine reads)"
std::string rate_note(double bytes, double seconds, double limit) {
  if (seconds <= 0 || bytes <= 0) return "";
  const double rate = bytes / seconds;
  if (limit <= 0) return fmt::format(" ({:.1f} GB/s)", rate / 1e9);
  return fmt::format(" ({:.1f} GB/s, {:.0f} % of the {:.1f} GB/s this machine reads)", rate / 1e9, 100 * rate / limit, limit / 1e9);
}

void print_summary(const Outcome& o, const MachineLimits& limits) {
  int64_t prompt_tokens = 0;
  double prefill_seconds = 0;
  size_t kv_now = 0, states = 0;
  for (const auto& r : o.results) {
    prompt_tokens += r.prompt_tokens;
    prefill_seconds += r.prefill_seconds;
    kv_now += r.kv_bytes;
    states += r.state_bytes;
    if (!r.eviction) continue;
    const EvictionReport& e = *r.eviction;
    fmt::print(stderr, "kept {} of {} cache entries ({:.1f} %) by {}, {}; scoring and selection took {:.0f} ms\n", e.entries_kept,
               e.entries_before, e.entries_before ? 100.0 * static_cast<double>(e.entries_kept) / static_cast<double>(e.entries_before) : 100.0,
               e.policy, e.budget, 1e3 * (e.score_seconds + e.select_seconds));
  }
  fmt::print(stderr, "prompt {} tokens in {:.2f} s: {:.0f} tokens/s\n", prompt_tokens, prefill_seconds,
             prefill_seconds > 0 ? static_cast<double>(prompt_tokens) / prefill_seconds : 0);
  if (o.stats.decode_tokens > 0)
    fmt::print(stderr, "decode {} tokens in {:.2f} s: {:.0f} tokens/s{}\n", o.stats.decode_tokens, o.stats.decode_seconds,
               static_cast<double>(o.stats.decode_tokens) / o.stats.decode_seconds,
               rate_note(static_cast<double>(o.stats.decode_ops.total().bytes()), o.stats.decode_seconds, limits.read_bytes_per_s));
  if (o.stats.diffusion) {
    const DiffusionStats& d = *o.stats.diffusion;
    fmt::print(stderr, "{} blocks in {} passes over the DiT's weights, {:.1f} tokens a pass; denoising {:.2f} s, decoding {:.2f} s\n", d.blocks,
               d.sweeps, d.sweeps > 0 ? static_cast<double>(o.stats.decode_tokens) / static_cast<double>(d.sweeps) : 0.0, d.denoise_seconds,
               d.decode_seconds);
  }
  fmt::print(stderr, "KV cache {} now, {} at its peak\n", human_bytes(static_cast<double>(kv_now)),
             human_bytes(static_cast<double>(o.stats.kv_peak_bytes)));
  if (states > 0) fmt::print(stderr, "recurrent states {}\n", human_bytes(static_cast<double>(states)));
}

std::string one_line(std::string text) {
  for (char& c : text)
    if (c == '\n' || c == '\r' || c == '\t') c = ' ';
  return text;
}

void print_comparison(const std::vector<Outcome>& outcomes) {
  std::string out;
  for (size_t i = 0; i < outcomes[0].results.size(); ++i) {
    out += fmt::format("\nprompt {}\n", i + 1);
    for (const auto& o : outcomes) out += fmt::format("  {:<28} {}\n", o.variant.name(), one_line(o.results[i].text));
  }
  out += fmt::format("\n{:<28} {:>12} {:>12} {:>14} {:>14}\n", "", "KV now", "KV peak", "prefill tok/s", "decode tok/s");
  for (const auto& o : outcomes) {
    double tokens = 0, seconds = 0, now = 0;
    for (const auto& r : o.results) {
      tokens += static_cast<double>(r.prompt_tokens);
      seconds += r.prefill_seconds;
      now += static_cast<double>(r.kv_bytes);
    }
    out += fmt::format("{:<28} {:>12} {:>12} {:>14.0f} {:>14.0f}\n", o.variant.name(), human_bytes(now),
                       human_bytes(static_cast<double>(o.stats.kv_peak_bytes)), tokens / seconds,
                       o.stats.decode_seconds > 0 ? static_cast<double>(o.stats.decode_tokens) / o.stats.decode_seconds : 0.0);
  }
  print_out(out);
}

// "The ___ sat.": ids of the text, and -1 for each underscore of a run of at least three.
std::vector<int32_t> parse_infill(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int32_t> ids;
  size_t from = 0;
  const auto add_text = [&](size_t end) {
    const std::vector<int32_t> own = tokenizer.encode(text.substr(from, end - from), false);
    ids.insert(ids.end(), own.begin(), own.end());
  };
  for (size_t at = text.find("___"); at != std::string::npos; at = text.find("___", from)) {
    add_text(at);
    from = std::min(text.find_first_not_of('_', at), text.size());
    ids.insert(ids.end(), from - at, -1);
  }
  add_text(text.size());
  if (std::find(ids.begin(), ids.end(), -1) == ids.end())
    throw BadInput("--infill: found no gap in \"{}\", expected three underscores or more, one a token", text);
  return ids;
}

// Options that mean nothing to the kind of model are refused rather than ignored.
void check_kind(const RunOptions& o, bool diffusion) {
  if (diffusion) {
    refuse_given(o.cache_options, "a block-diffusion model has no cache that could be evicted, scored or stored");
    if (o.engine.window != "config") throw BadInput("--window-rule: a block-diffusion model has no sliding windows");
  } else {
    for (const auto* options : {&o.diffusion.options, &o.diffusion_options})
      refuse_given(*options, "the model is autoregressive; the option is for block-diffusion models (Cola DLM)");
  }
}

int run_command(const RunOptions& o) {
  check_kind(o, is_diffusion(o.engine));
  std::vector<std::string> texts = o.prompts;
  for (const auto& f : o.files) texts.push_back(read_text(f));
  if (texts.empty() && !o.infill.empty()) texts.emplace_back();
  if (texts.empty()) throw BadInput("no prompt: give -p TEXT or -f FILE (\"-\" reads standard input)");
  if (o.ask_later && o.context_file.empty()) throw BadInput("--ask-later needs --context: the text to compress before the prompt is read");
  if (!o.save_file.empty() && texts.size() > 1)
    throw BadInput("--save-state keeps what one prompt left: found {} prompts, expected 1", texts.size());
  if (!o.save_file.empty() && !o.compare.empty()) throw BadInput("--save-state and --compare do not go together: each run leaves a state of its own");
  if (!o.load_file.empty() && (!o.evict.empty() || !o.compare.empty() || o.ask_later))
    throw BadInput("--load-state goes on from a cache that is what it is: it takes no --evict, --compare or --ask-later");
  const std::string context = o.context_file.empty() ? "" : read_text(o.context_file);
  std::vector<Variant> variants{o.evict.empty() ? Variant{"full", ""} : parse_variant(o.evict, o.budget)};
  for (const auto& c : o.compare) variants.push_back(parse_variant(c, o.budget));
  validate(o.sampling);  // wrong values, names and budgets are refused before anything is loaded
  for (const auto& v : variants)
    if (!v.full()) make_policy(v.policy), parse_budget(v.budget);

  const DiffusionParams diffusion = o.diffusion.open();
  Engine engine(o.engine, Takes::kAny);
  const ModelText text_side = open_text(o.engine.model_dir);
  const Tokenizer* tokenizer = text_side.tokenizer.get();
  const std::vector<int32_t> context_ids = context.empty() ? std::vector<int32_t>{} : tokenizer->encode(context, true);
  std::optional<StoredState> stored;
  if (!o.load_file.empty()) stored.emplace(load_state(engine.ctx, *engine.model, engine.kv.page_slots, o.load_file));
  std::vector<GenerateRequest> requests;
  for (const auto& text : texts) {
    GenerateRequest r;
    r.sampling = o.sampling;
    // Tokenised whole, so that no seam shows; only --ask-later must cut.
    // What follows a stored text starts with no mark of its own.
    r.prompt = o.ask_later ? context_ids : tokenizer->encode(context + text, !stored);
    if (stored) r.after = &*stored;
    if (!o.infill.empty()) r.infill = parse_infill(*tokenizer, o.infill);
    if (diffusion.official && o.penalty->count() == 0) r.sampling.repetition_penalty = 1.1f;  // which its users cannot change
    requests.push_back(std::move(r));
  }

  const std::unique_ptr<Generator> generator = make_generator(engine.ctx, engine.any, text_side, engine.kv, engine.prefill, diffusion);
  const bool stream = !o.json && !o.show_denoising && variants.size() == 1 && requests.size() == 1;
  std::vector<Outcome> outcomes;
  for (const auto& variant : variants) {
    for (size_t i = 0; i < requests.size(); ++i) {
      requests[i].eviction.reset();
      if (!variant.full()) requests[i].eviction = EvictionRequest{variant.policy, variant.budget, o.evict_at == "decode", {}};
      if (o.ask_later) {
        const std::vector<int32_t> question = tokenizer->encode(texts[i], false);
        if (variant.full()) {
          requests[i].prompt = context_ids;
          requests[i].prompt.insert(requests[i].prompt.end(), question.begin(), question.end());
        } else {
          requests[i].prompt = context_ids;
          requests[i].eviction->question = question;
        }
      }
    }
    Progress progress("reading " + variant.name(), "tokens", engine.model ? engine.model->info().layers : 1, !o.quiet);
    GenerateCallbacks callbacks;
    callbacks.cancelled = interrupted;
    callbacks.on_prefill = [&](size_t, int64_t done, int64_t total) {
      progress.update(done, total, human_bytes(static_cast<double>(engine.memory.now(MemoryTag::kKv))) + " KV");
      if (done == total) progress.finish();
    };
    if (!o.save_file.empty())
      callbacks.on_read = [&](size_t, const SequenceState& state, std::span<const int32_t> ids) {
        save_state(engine.ctx, *engine.model, state, ids, o.save_file);
      };
    if (stream) callbacks.on_text = [](size_t, std::string_view text) { print_out(text); };
    if (o.show_denoising)
      callbacks.on_denoise = [&](size_t request, int64_t block, int step, std::string_view text) {
        const std::string prompt = requests.size() > 1 ? fmt::format("[{}] ", request + 1) : "";
        fmt::print(stderr, "{}block {} step {:>3}: {}\n", prompt, block + 1, step + 1, one_line(std::string(text)));
      };
    Outcome outcome{variant, generator->generate(requests, callbacks), {}};
    outcome.stats = generator->stats();
    outcomes.push_back(std::move(outcome));
  }

  // Last, because the test's own buffer would count as this run's memory.
  const size_t resident = peak_rss();
  MachineLimits limits;
  if (!o.quiet) try {
      limits = measure_machine(engine.ctx, 0.3);
    } catch (const OutOfMemory&) {  // --memory-limit leaves no room for it: rates stand alone then
    }

  for (const auto& r : outcomes[0].results) {
    if (!r.eviction) continue;
    if (!o.kept_file.empty()) write_kept_json(*r.eviction, o.kept_file);
    if (!o.picture_file.empty()) write_kept_svg(*r.eviction, o.picture_file);
    break;
  }
  if (o.json) {
    nlohmann::json out = {{"model", engine.any.architecture()}, {"load_seconds", engine.load_seconds}};
    for (const auto& outcome : outcomes) out["runs"].push_back(outcome_json(outcome, limits, engine, resident));
    print_out(out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
    return 0;
  }
  if (outcomes.size() > 1) {
    print_comparison(outcomes);
    return 0;
  }
  if (stream)
    print_out("\n");
  else
    for (size_t i = 0; i < outcomes[0].results.size(); ++i)
      print_out(fmt::format("[{}] {}\n", i + 1, outcomes[0].results[i].text));
  if (!o.quiet) {
    print_summary(outcomes[0], limits);
    fmt::print(stderr, "process peak {} resident, {} of it weights\n", human_bytes(static_cast<double>(resident)),
               human_bytes(static_cast<double>(engine.memory.now(MemoryTag::kWeights))));
  }
  return 0;
}

}  // namespace

Command add_run(CLI::App& parent) {
  auto o = std::make_shared<RunOptions>();
  CLI::App* app = parent.add_subcommand("run", "Generate text, with the KV cache as small as asked, or block by block from noise");
  add_engine_options(*app, o->engine);
  app->add_option("-p,--prompt", o->prompts, "A prompt; may be repeated (the prompts run as one batch)")->allow_extra_args(false);
  app->add_option("-f,--file", o->files, "A file that holds a prompt; \"-\" is standard input; may be repeated")->allow_extra_args(false);
  app->add_option("--context", o->context_file, "Text put before every prompt");
  o->cache_options = {
      app->add_flag("--ask-later", o->ask_later, "Compress the context before the prompt is known, then read the prompt"),
      app->add_option("--evict", o->evict, "Eviction policy, with switches: laprox, snapkv, laprox:gqa=exact, … (docs/policies.md)"),
      app->add_option("--kv-budget", o->budget, "What may stay: 5%, 256 (entries a KV head), 64MiB, mass:0.99")->capture_default_str(),
      app->add_option("--evict-at", o->evict_at, "prefill: once; decode: again whenever generation outgrows the budget")
        ->check(CLI::IsMember({"prefill", "decode"})),
      app->add_option("--compare", o->compare, "Also run POLICY or POLICY@BUDGET (\"full\" = whole cache) and print all side by side")
        ->allow_extra_args(false),
      app->add_option("--kept", o->kept_file, "Write the kept positions of the first prompt as JSON"),
      app->add_option("--draw-kept", o->picture_file, "Draw them as SVG"),
      app->add_option("--save-state", o->save_file, "Write what the model keeps of the prompt (cache, recurrent states), for --load-state"),
      app->add_option("--load-state", o->load_file, "Go on from a saved state, in its own cache dtype: the prompts follow the text it has read")};
  app->add_option("-n,--max-tokens", o->sampling.max_new_tokens, "New tokens at most")->capture_default_str();
  app->add_option("--temperature", o->sampling.temperature, "0 = greedy")->capture_default_str();
  app->add_option("--top-k", o->sampling.top_k, "0 = all");
  app->add_option("--top-p", o->sampling.top_p)->capture_default_str();
  app->add_option("--min-p", o->sampling.min_p);
  o->penalty = app->add_option("--repetition-penalty", o->sampling.repetition_penalty)->capture_default_str();
  app->add_option("--seed", o->sampling.seed);
  app->add_option("--stop", o->sampling.stop, "A text that ends the output; may be repeated (\\n is a newline)")->allow_extra_args(false);
  app->add_flag("--ignore-eos", o->sampling.ignore_eos, "Go on after end-of-text");
  add_diffusion_options(*app, o->diffusion, o->engine);
  o->diffusion_options = {
      app->add_option("--infill", o->infill,
                      "Block diffusion: a text after the prompt, in which a run of three or more underscores is a gap of as many tokens to fill"),
      app->add_flag("--show-denoising", o->show_denoising, "Block diffusion: what each block reads after every step, on standard error")};
  app->add_flag("--json", o->json, "Machine-readable output");
  app->add_flag("-q,--quiet", o->quiet, "Only the text");
  return {app, [o] {
            for (auto& s : o->sampling.stop)
              for (size_t at; (at = s.find("\\n")) != std::string::npos;) s.replace(at, 2, "\n");
            return run_command(*o);
          }};
}

}  // namespace lacuna::cli

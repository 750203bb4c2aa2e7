// lacuna convert: a Qwen2 checkpoint as a SpikingBrain one, ready to be trained on.
#include "models/convert.h"

#include "cli.h"

namespace lacuna::cli {
namespace {

struct Options {
  std::string kind, source, target, weights = "stored";
  std::vector<int64_t> full_attention, dense_layers;
  int threads = 0;
  bool json = false, quiet = false;
  ConvertOptions convert;
};

int convert_command(Options& o, bool full_given, bool dense_given) {
  ConvertOptions& c = o.convert;
  if (full_given) c.full_attention = o.full_attention;
  if (dense_given) c.dense_layers = o.dense_layers;
  c.weights = o.weights == "int8" ? WeightMode::kInt8 : WeightMode::kStored;
  MemoryAccount memory;
  Context ctx(memory, o.threads);
  Progress progress("writing " + o.target, "bytes", 1, !o.quiet && !o.json);
  c.progress = [&](uint64_t done, uint64_t total) {
    progress.update(static_cast<int64_t>(done), static_cast<int64_t>(total), "");
    if (done == total) progress.finish();
  };
  c.cancelled = interrupted;
  const ConvertReport r = convert_to_spikingbrain(ctx, o.source, o.target, c);
  const auto scratch = memory.peak(MemoryTag::kScratch);
  if (o.json) {
    print_out(nlohmann::json{{"architecture", r.architecture},
                             {"tensors", r.tensors},
                             {"copied_parameters", r.copied_parameters},
                             {"new_parameters", r.new_parameters},
                             {"weight_bytes", r.bytes},
                             {"files", r.files},
                             {"scratch_peak_bytes", scratch}}
                  .dump(2) +
              "\n");
    return 0;
  }
  if (o.quiet) return 0;
  print_out(fmt::format("{}: {}, {} of weights in {} tensors; {} parameters copied, {} new and untrained\n", o.target,
                        r.architecture, human_bytes(static_cast<double>(r.bytes)), r.tensors, r.copied_parameters,
                        r.new_parameters));
  return 0;
}

}  // namespace

Command add_convert(CLI::App& parent) {
  auto o = std::make_shared<Options>();
  CLI::App* app =
      parent.add_subcommand("convert", "Make a SpikingBrain checkpoint, to be trained on, out of a Qwen2 one");
  ConvertOptions& c = o->convert;
  app->add_option("kind", o->kind, "What to make: spikingbrain")->required()->check(CLI::IsMember({"spikingbrain"}));
  app->add_option("-m,--model", o->source, "The Qwen2 model directory")->required();
  app->add_option("-o,--out", o->target, "The new model directory")->required();
  app->add_option("--window", c.window, "Keys that a sliding-window layer sees")->capture_default_str();
  app->add_option("--window-rule", c.window_rule,
                  "Whether these are W keys throughout, as the published code has them, or W + 1")
      ->capture_default_str()
      ->check(CLI::IsMember({"exact", "official", "plus_one"}));
  auto* full =
      app->add_option("--full-attention", o->full_attention,
                      "Layers, from 0, that see everything: \"1,5\"; default: none, with --experts every seventh")
          ->delimiter(',');
  app->add_option("--gate-rank", c.gate_rank, "Rank of the forget gates")->capture_default_str();
  app->add_option("--seed", c.seed, "Of what is new: gates, routers, sinks")->capture_default_str();
  app->add_option("--weights", o->weights, "stored, or int8 (codes and a scale per output row)")
      ->capture_default_str()
      ->check(CLI::IsMember({"stored", "int8"}));
  app->add_option("--experts", c.experts,
                  "Routed experts a layer: makes the parallel hybrid, upcycled from the feed-forwards");
  app->add_option("--top-k", c.experts_per_token, "Experts that a token is routed to")->capture_default_str();
  app->add_option("--shared", c.shared_experts, "Shared experts a layer, always on")->capture_default_str();
  auto* dense = app->add_option("--dense-layers", o->dense_layers, "Layers without experts; default 0,1,2,4,6,8,10")
                    ->delimiter(',');
  app->add_option("--sinks", c.sinks, "With --experts: learnable tokens before the text")->capture_default_str();
  app->add_option("--threads", o->threads, "Threads; 0 = every core this process may use")->check(CLI::Range(0, 1024));
  app->add_flag("--force", c.replace, "Replace a model directory that stands at the target");
  app->add_flag("--json", o->json, "Machine-readable output");
  app->add_flag("-q,--quiet", o->quiet, "Print nothing");
  return {app, [o, full, dense] { return convert_command(*o, full->count() > 0, dense->count() > 0); }};
}

}  // namespace lacuna::cli

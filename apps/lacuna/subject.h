#pragma once

#include "cli.h"
#include "eval/report.h"

namespace lacuna::cli {

// A model with its tokenizer, as evaluation sees them.
struct Subject {
  explicit Subject(const EngineOptions& options) : Subject(options, Takes::kAny, "") {}
  // An autoregressive one; `why_not_diffusion` is the sentence for others.
  Subject(const EngineOptions& options, std::string_view why_not_diffusion) : Subject(options, Takes::kAutoregressive, why_not_diffusion) {}

  Engine engine;
  ModelText text;
  TextCodec codec;

 private:
  Subject(const EngineOptions& options, Takes takes, std::string_view why_not);
};

void print_json(const Json& json);

// Subcommands of eval that measure what any Generator writes, or what a text VAE keeps: samples, reconstruct, score.
std::vector<Command> add_generation_evals(CLI::App& eval);

}  // namespace lacuna::cli

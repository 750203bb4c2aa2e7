#pragma once

#include <span>
#include <vector>

#include "models/cola.h"

namespace lacuna {

struct DiffusionScoreOptions {
  int timesteps = 8;  // 1000 (i + 1/2) / timesteps
  int seeds = 1;      // noises a timestep
  uint64_t seed = 0;
  TimestepRounding rounding = TimestepRounding::kBf16;
};

// How well a block-diffusion model expects a text after another. None of it is a likelihood: continuous latents have a
// density and no probability, and the paper itself finds perplexities made of it useless. Errors may be compared
// between continuations of one prompt, at equal timesteps and noise; differences of single words drown in the noise.
struct DiffusionScore {
  int64_t tokens = 0, latents = 0;  // of the continuation
  // Flow-matching loss: mean over latents, dimensions, timesteps and noises of (v - (noise - z))^2 where x = (1 - t) z +
  // t noise. Predicting nothing (v = E[noise - z] = 0) would give about 2.
  double velocity_error = 0;        // with the text before it as history
  double velocity_error_alone = 0;  // without: what each block says by itself. The gain is what the prompt explains
  std::vector<double> by_timestep;  // velocity_error, at t ascending
  // Mean natural logarithm a token of what the VAE's decoder gives the true token from its encoder's mean: how
  // faithfully the text can be written in latents at all, whatever the prompt.
  double reconstruction = 0;
};

// Latents that prompt and continuation share (patch > 1) count to the continuation. BadInput for ids out of range and
// an empty continuation.
DiffusionScore score_continuation(Context& ctx, ColaModel& model, std::span<const int32_t> prompt,
                                  std::span<const int32_t> continuation, const DiffusionScoreOptions& options = {},
                                  const KvOptions& kv = {});

}  // namespace lacuna

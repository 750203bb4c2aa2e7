#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "eval/runner.h"

namespace lacuna {

// Stretches of `size` tokens, codec.before in front of each, `most` of them at most, evenly spread over all
// texts; a stretch never crosses a text's end. Throws BadInput where no text is long enough.
std::vector<std::vector<int32_t>> spread_windows(const TextCodec& codec, const std::vector<std::string>& texts, int64_t size, int64_t most);
// The same, of no more than the model's positions.
std::vector<std::vector<int32_t>> spread_windows(const Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                                 int64_t size, int64_t most);

// Plain text as the model continues it: how much a smaller cache changes, with no task in between.
struct TextOptions {
  int64_t context = 4096;      // tokens read before the cache is made smaller
  int64_t continuation = 256;  // tokens scored after that, given their true predecessors
  int64_t windows = 20;        // stretches of text, spread evenly over all of it
  KvOptions kv;
  PrefillOptions prefill;
  std::string replay_prompt = RunnerOptions{}.replay_prompt;
};

// One stretch of text under one variant.
struct WindowScores {
  double nats = 0;         // negative log likelihood, mean over the continuation's tokens
  double kl = 0;           // KL(full ‖ variant), mean over positions, nats
  double same_top = 0;     // share of positions at which both prefer the same token
  double layer_error = 0;  // ‖h − h_full‖ / ‖h_full‖ of the residual stream, mean over layers; grows from layer to layer
  size_t kv_bytes = 0;
};

struct FidelityResult {
  std::vector<Variant> variants;
  std::vector<std::vector<WindowScores>> windows;      // [window][variant]
  std::vector<std::vector<double>> layer_error;        // [variant][layer], mean over windows
  int64_t tokens = 0;                                  // continuation tokens scored a variant
  double bytes_per_token = 0;                          // of the continuations' text, for bits a byte
};

// Every policy and budget from one dense prefill a window. The first variant must be the plain full cache.
FidelityResult measure_fidelity(Context& ctx, Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                const std::vector<Variant>& variants, const TextOptions& options,
                                const std::function<void(int64_t done, int64_t total)>& progress = {});

// Plain perplexity: texts in windows of `window` tokens, every token but a window's first one scored.
struct PerplexityResult {
  int64_t tokens = 0, windows = 0;
  size_t bytes = 0;               // of the scored tokens' text
  Interval nats;                  // a token, bootstrap over windows
  Interval bits_per_byte;
};
PerplexityResult measure_perplexity(Context& ctx, Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                    int64_t window, int64_t max_windows, const KvOptions& kv, const PrefillOptions& prefill,
                                    const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace lacuna

#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/metrics.h"
#include "eval/report.h"
#include "models/cola.h"

namespace lacuna {

// How much noise a text VAE's latents stand before its decoder names other tokens.
struct ReconstructPoint {
  double t = 0;          // 0 … 1000: latents are (1 - t / 1000) mean + t / 1000 noise
  bool posterior = false;  // instead a draw of the encoder's posterior, as training decodes
  int64_t tokens = 0, correct = 0;
  Interval accuracy;     // over windows
};
struct ReconstructResult {
  int64_t windows = 0, window = 0, tokens = 0;
  double posterior_sigma = 0;  // root mean square of the posterior's standard deviation
  std::vector<ReconstructPoint> points;  // the grid, then the posterior
};

// Texts in windows of `window` tokens, at most max_windows of them spread evenly: encoded, made noisy, decoded. The
// noise of a window is the same at every t. BadInput for t outside 0 … 1000.
ReconstructResult measure_reconstruction(Context& ctx, ColaModel& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                         int64_t window, int64_t max_windows, const std::vector<double>& grid, uint64_t seed,
                                         const std::function<void(int64_t done, int64_t total)>& progress = {});

std::string markdown_report(const ReconstructResult& result);
Json json_report(const ReconstructResult& result);

}  // namespace lacuna

#include "eval/reconstruct.h"

#include <cmath>

#include "eval/fidelity.h"
#include "generate/noise.h"

namespace lacuna {

ReconstructResult measure_reconstruction(Context& ctx, ColaModel& model, const TextCodec& codec, const std::vector<std::string>& texts,
                                         int64_t window, int64_t max_windows, const std::vector<double>& grid, uint64_t seed,
                                         const std::function<void(int64_t, int64_t)>& progress) {
  const ColaConfig& c = model.config();
  const int64_t patch = c.vae.patch, d = c.latent_dim(), vocab = c.vae.vocab;
  const int64_t unit = c.vae.block * patch;
  if (window < unit || window % unit != 0)
    throw BadInput("windows of {} tokens; a multiple of {}, the VAE's block, is needed", window, unit);
  for (double t : grid)
    if (!(t >= 0 && t <= 1000)) throw BadInput("t: found {}, expected 0 to 1000", t);
  auto windows = spread_windows(codec, texts, window, max_windows);
  const auto rows = window / patch, values = rows * d;
  ReconstructResult out;
  out.window = window;
  for (double t : grid) out.points.push_back({t});
  out.points.push_back({0, true});
  std::vector<std::vector<double>> shares(out.points.size());
  std::vector<float> mean(static_cast<size_t>(values)), logvar(mean.size()), noise(mean.size()), z(mean.size());
  constexpr int64_t kRows = 128;  // of logits at a time
  std::vector<float> logits(static_cast<size_t>(std::min(rows, kRows) * patch * vocab));
  double variance = 0;
  for (size_t w = 0; w < windows.size(); ++w) {
    const std::vector<int32_t>& ids = windows[w];
    const int64_t lengths[] = {window};
    model.encode(ctx, ids, lengths, mean.data(), logvar.data());
    fill_noise(seed, w, noise);
    for (size_t i = 0; i < logvar.size(); ++i) variance += std::exp(static_cast<double>(logvar[i]));
    for (size_t p = 0; p < out.points.size(); ++p) {
      ReconstructPoint& point = out.points[p];
      const auto t = static_cast<float>(point.t / 1000);
      for (size_t i = 0; i < z.size(); ++i) z[i] = point.posterior ? mean[i] + std::exp(0.5f * logvar[i]) * noise[i] : mean[i];
      model.to_prior(z);  // noise is the prior's, and the decoder reads what the prior makes
      if (!point.posterior)
        for (size_t i = 0; i < z.size(); ++i) z[i] = (1 - t) * z[i] + t * noise[i];
      ColaState state = model.new_state(ctx.memory);
      int64_t correct = 0;
      for (int64_t at = 0; at < rows; at += kRows) {
        const int64_t count = std::min(kRows, rows - at);
        const LatentRows entry[] = {{&state, count, count}};
        model.decode(ctx, z.data() + at * d, entry, logits.data());
        for (int64_t i = 0; i < count * patch; ++i)
          correct += most_likely(logits.data() + i * vocab, vocab) == ids[static_cast<size_t>(at * patch + i)];
      }
      point.correct += correct;
      point.tokens += window;
      shares[p].push_back(static_cast<double>(correct) / static_cast<double>(window));
    }
    out.tokens += window;
    ++out.windows;
    if (progress) progress(out.windows, static_cast<int64_t>(windows.size()));
  }
  for (size_t p = 0; p < out.points.size(); ++p) out.points[p].accuracy = bootstrap_interval(shares[p]);
  out.posterior_sigma = std::sqrt(variance / static_cast<double>(values * out.windows));
  return out;
}

std::string markdown_report(const ReconstructResult& r) {
  std::vector<std::vector<std::string>> rows = {{"latents", "correct", "of", "accuracy %", "95 % interval"}};
  for (const ReconstructPoint& p : r.points)
    rows.push_back({p.posterior ? "posterior draw" : fmt::format("t = {:g}", p.t), fmt::format("{}", p.correct), fmt::format("{}", p.tokens),
                    fmt::format("{:.2f}", 100 * p.accuracy.value), fmt::format("[{:.2f}, {:.2f}]", 100 * p.accuracy.low, 100 * p.accuracy.high)});
  return fmt::format("{} windows of {} tokens; the posterior's standard deviation is {:.4f}, its means have 1\n\n", r.windows, r.window,
                     r.posterior_sigma) +
         markdown_table(rows);
}

Json json_report(const ReconstructResult& r) {
  Json out = {{"kind", "reconstruct"}, {"windows", r.windows}, {"window", r.window}, {"tokens", r.tokens}, {"posterior_sigma", r.posterior_sigma}};
  for (const ReconstructPoint& p : r.points) {
    Json point = {{"latents", p.posterior ? "posterior" : "noisy"}, {"tokens", p.tokens}, {"correct", p.correct},
                  {"accuracy", {{"value", p.accuracy.value}, {"low", p.accuracy.low}, {"high", p.accuracy.high}}}};
    if (!p.posterior) point["t"] = p.t;
    out["points"].push_back(point);
  }
  return out;
}

}  // namespace lacuna

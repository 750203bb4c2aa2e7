#include "generate/diffusion_score.h"

#include <algorithm>
#include <cmath>

#include "generate/noise.h"

namespace lacuna {
namespace {

double log_probability(const float* logits, int64_t vocab, int32_t id) {
  const double top = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - top);
  return logits[id] - top - std::log(sum);
}

}  // namespace

DiffusionScore score_continuation(Context& ctx, ColaModel& model, std::span<const int32_t> prompt, std::span<const int32_t> continuation,
                                  const DiffusionScoreOptions& o, const KvOptions& kv) {
  const ColaConfig& c = model.config();
  const int64_t d = c.latent_dim(), patch = c.vae.patch, block = c.dit.block, vocab = c.vae.vocab;
  if (continuation.empty()) throw BadInput("the continuation is empty: there is nothing to score");
  if (o.timesteps < 1 || o.timesteps > 1000 || o.seeds < 1 || o.seeds > 1000)
    throw BadInput("timesteps and seeds: found {} and {}, expected 1 to 1000", o.timesteps, o.seeds);
  std::vector<int32_t> ids(prompt.begin(), prompt.end());
  ids.insert(ids.end(), continuation.begin(), continuation.end());
  const auto real = static_cast<int64_t>(ids.size()), from_token = static_cast<int64_t>(prompt.size());
  for (int64_t i = 0; i < real; ++i)
    if (ids[static_cast<size_t>(i)] < 0 || ids[static_cast<size_t>(i)] >= vocab)
      throw BadInput("found id {} at index {}, expected 0 to {}", ids[static_cast<size_t>(i)], i, vocab - 1);
  const int64_t unit = c.vae.block > 1 ? c.block_tokens() : patch;
  ids.resize(static_cast<size_t>((real + unit - 1) / unit * unit), static_cast<int32_t>(vocab - 1));
  std::vector<float> z(ids.size() / static_cast<size_t>(patch) * static_cast<size_t>(d));
  const int64_t lengths[] = {static_cast<int64_t>(ids.size())};
  model.encode(ctx, ids, lengths, z.data(), nullptr);
  model.to_prior(z);
  const int64_t latents = (real + patch - 1) / patch, from = from_token / patch, start = from / block * block;

  std::vector<float> grid;
  for (int i = 0; i < o.timesteps; ++i) grid.push_back(static_cast<float>(1000 * (i + 0.5) / o.timesteps));
  const int32_t clean = o.timesteps, noisy = o.timesteps + 1;
  grid.push_back(0);
  grid.push_back(1000);
  const TimestepTable table = model.make_timesteps(ctx, grid, o.rounding);

  ColaState state = model.new_state(ctx.memory, kv);
  const auto append = [&](int64_t position, int64_t rows) {
    const LatentRows entry[] = {{&state, rows, rows}};
    model.velocity(ctx, table, std::vector<int32_t>(static_cast<size_t>(rows), clean), z.data() + position * d, entry, nullptr);
  };
  if (start > 0) {
    append(0, start);
    const LatentRows entry[] = {{&state, start, start}};
    model.decode(ctx, z.data(), entry, nullptr);
  }

  DiffusionScore out;
  out.tokens = real - from_token;
  out.latents = latents - from;
  out.by_timestep.assign(static_cast<size_t>(o.timesteps), 0);
  std::vector<float> noise(static_cast<size_t>(block * d)), x(2 * noise.size()), v(x.size());
  std::vector<int32_t> timestep(static_cast<size_t>(2 * block));
  std::vector<float> logits;
  for (int64_t position = start; position < latents; position += block) {
    for (int i = 0; i < o.timesteps; ++i)
      for (int seed = 0; seed < o.seeds; ++seed) {
        // The same noise for the same place and timestep, whatever the continuation is.
        fill_noise(o.seed + static_cast<uint64_t>(seed), static_cast<uint64_t>(position / block * o.timesteps + i), noise);
        const float t = grid[static_cast<size_t>(i)] / 1000.0f;
        for (int64_t r = 0; r < block; ++r) {
          const int64_t p = position + r;
          // Before the continuation clean, after its end nothing but noise, and both say so.
          const float share = p < from ? 0.0f : p < latents ? t : 1.0f;
          timestep[static_cast<size_t>(r)] = timestep[static_cast<size_t>(block + r)] = p < from ? clean : p < latents ? i : noisy;
          for (int64_t j = 0; j < d; ++j) {
            const float at = p < latents ? z[static_cast<size_t>(p * d + j)] : 0.0f;
            x[static_cast<size_t>(r * d + j)] = (1 - share) * at + share * noise[static_cast<size_t>(r * d + j)];
          }
        }
        std::copy_n(x.begin(), noise.size(), x.begin() + static_cast<int64_t>(noise.size()));
        const LatentRows entries[] = {{&state, block}, {nullptr, block}};
        model.velocity(ctx, table, timestep, x.data(), entries, v.data());
        for (int64_t r = std::max<int64_t>(0, from - position); r < std::min(block, latents - position); ++r)
          for (int64_t j = 0; j < d; ++j) {
            const auto at = static_cast<size_t>(r * d + j);
            const double target = static_cast<double>(noise[at]) - z[static_cast<size_t>((position + r) * d + j)];
            const double e = v[at] - target, alone = v[noise.size() + at] - target;
            out.by_timestep[static_cast<size_t>(i)] += e * e;
            out.velocity_error_alone += alone * alone;
          }
      }
    const int64_t rows = std::min(block, latents - position);
    logits.resize(static_cast<size_t>(rows * patch * vocab));
    const LatentRows entry[] = {{&state, rows, rows}};
    model.decode(ctx, z.data() + position * d, entry, logits.data());
    for (int64_t token = std::max(position * patch, from_token); token < std::min((position + rows) * patch, real); ++token)
      out.reconstruction += log_probability(logits.data() + (token - position * patch) * vocab, vocab, ids[static_cast<size_t>(token)]);
    if (position + block < latents) append(position, block);
  }
  const double values = static_cast<double>(out.latents * d) * o.seeds;
  for (double& e : out.by_timestep) {
    e /= values;
    out.velocity_error += e / o.timesteps;
  }
  out.velocity_error_alone /= values * o.timesteps;
  out.reconstruction /= static_cast<double>(out.tokens);
  return out;
}

}  // namespace lacuna

#include "generate/diffusion_score.h"

#include <gtest/gtest.h>

#include <cmath>

#include "cola_fixture.h"

namespace lacuna {
namespace {

using testing_cola::Cola;

// Without caches: clean history and the noisy block in one call, block by block, in double where it adds up.
TEST_F(Cola, ScoreEqualsOneCallABlockWithoutCaches) {
  const std::vector<int32_t> prompt = {1, 5, 9, 13, 17, 21}, continuation = {2, 3, 4, 5, 6, 7, 8, 50, 51};
  DiffusionScoreOptions options;
  options.timesteps = 3;
  options.seeds = 2;
  options.seed = 11;
  options.rounding = TimestepRounding::kNone;
  const DiffusionScore score = score_continuation(ctx, *model, prompt, continuation, options);
  EXPECT_EQ(score.tokens, 9);
  EXPECT_EQ(score.latents, 9);

  std::vector<int32_t> ids = prompt;
  ids.insert(ids.end(), continuation.begin(), continuation.end());
  const int64_t n = 15, d = 4, block = 4, vocab = 61;
  std::vector<float> z(static_cast<size_t>(n * d));
  const int64_t lengths[] = {n};
  model->encode(ctx, ids, lengths, z.data(), nullptr);
  model->to_prior(z);
  const std::vector<float> grid = {1000.0f / 6, 500, 5000.0f / 6, 0, 1000};
  const TimestepTable table = model->make_timesteps(ctx, grid);
  double with = 0, alone = 0;
  for (int64_t position = 4; position < 16; position += block)
    for (int i = 0; i < 3; ++i)
      for (uint64_t seed = 11; seed < 13; ++seed) {
        std::vector<float> noise(static_cast<size_t>(block * d)), x(z.begin(), z.begin() + position * d);
        fill_noise(seed, static_cast<uint64_t>(position / block * 3 + i), noise);
        std::vector<int32_t> timestep(static_cast<size_t>(position), 3);
        for (int64_t p = position; p < position + block; ++p) {
          timestep.push_back(p < 6 ? 3 : p < n ? i : 4);
          const float share = p < 6 ? 0 : p < n ? grid[static_cast<size_t>(i)] / 1000 : 1;
          for (int64_t j = 0; j < d; ++j)
            x.push_back((p < n ? (1 - share) * z[static_cast<size_t>(p * d + j)] : 0) + share * noise[static_cast<size_t>((p - position) * d + j)]);
        }
        std::vector<float> v(x.size()), own(noise.size());
        const LatentRows all[] = {{nullptr, position + block}}, one[] = {{nullptr, block}};
        model->velocity(ctx, table, timestep, x.data(), all, v.data());
        model->velocity(ctx, table, std::span(timestep).subspan(static_cast<size_t>(position)), x.data() + position * d, one, own.data());
        for (int64_t p = std::max<int64_t>(6, position); p < std::min(n, position + block); ++p)
          for (int64_t j = 0; j < d; ++j) {
            const auto at = static_cast<size_t>((p - position) * d + j);
            const double target = static_cast<double>(noise[at]) - z[static_cast<size_t>(p * d + j)];
            with += std::pow(v[static_cast<size_t>(p * d + j)] - target, 2) / (9 * d * 3 * 2);
            alone += std::pow(own[at] - target, 2) / (9 * d * 3 * 2);
          }
      }
  EXPECT_NEAR(score.velocity_error, with, 1e-4 * with);
  EXPECT_NEAR(score.velocity_error_alone, alone, 1e-4 * alone);
  EXPECT_NEAR((score.by_timestep[0] + score.by_timestep[1] + score.by_timestep[2]) / 3, with, 1e-4 * with);

  ColaState state = model->new_state(memory);
  std::vector<float> logits(static_cast<size_t>(n * vocab));
  const LatentRows rows[] = {{&state, n}};
  model->decode(ctx, z.data(), rows, logits.data());
  double reconstruction = 0;
  for (int64_t p = 6; p < n; ++p) {
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[static_cast<size_t>(p * vocab + i)]));
    reconstruction += (logits[static_cast<size_t>(p * vocab + ids[static_cast<size_t>(p)])] - std::log(sum)) / 9;
  }
  EXPECT_NEAR(score.reconstruction, reconstruction, 1e-4);
}

TEST_F(Cola, ScoreWithoutAPromptHasNoGainInTheFirstBlock) {
  const std::vector<int32_t> text = {2, 3, 4};
  const DiffusionScore score = score_continuation(ctx, *model, {}, text);
  EXPECT_NEAR(score.velocity_error, score.velocity_error_alone, 1e-5);
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

TEST_F(Cola, ScoreRefusesWhatItCannotScore) {
  const std::vector<int32_t> ids = {1, 2}, odd = {61}, negative = {-1};
  EXPECT_THROW(score_continuation(ctx, *model, ids, {}), BadInput);
  EXPECT_THROW(score_continuation(ctx, *model, ids, odd), BadInput);
  EXPECT_THROW(score_continuation(ctx, *model, negative, ids), BadInput);
  EXPECT_THROW(score_continuation(ctx, *model, ids, ids, {.timesteps = 0}), BadInput);
}

}  // namespace
}  // namespace lacuna

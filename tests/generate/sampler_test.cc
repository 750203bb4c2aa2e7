#include "generate/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <numeric>

#include "base/error.h"

namespace lacuna {
namespace {

std::vector<double> probabilities(SamplingParams p, std::vector<float> logits, std::vector<int32_t> history = {}) {
  return Sampler(p).probabilities(logits, history);
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargestWhereverItStands) {
  std::mt19937 random(3);
  SamplingParams p;
  p.temperature = 0;
  Sampler greedy(p);
  for (int round = 0; round < 2000; ++round) {
    std::vector<float> logits(1 + random() % 1100);
    // Few values, so that there are equals, and NaNs and infinities among them.
    const int kinds = 1 + static_cast<int>(random() % 6);
    for (float& x : logits) {
      const auto kind = static_cast<int>(random() % static_cast<unsigned>(kinds));
      x = kind == 4 ? NAN : kind == 5 ? -INFINITY : static_cast<float>(random() % 300) - 200.0f;
    }
    if (round % 3 == 0) logits[random() % logits.size()] = 500;
    size_t best = 0;
    while (best + 1 < logits.size() && std::isnan(logits[best])) ++best;
    for (size_t i = best + 1; i < logits.size(); ++i)
      if (logits[i] > logits[best]) best = i;
    ASSERT_EQ(greedy.sample(logits, {}), static_cast<int32_t>(best)) << logits.size();
  }
}

TEST(Sampler, GreedyTakesTheLowestOfEqualIds) {
  std::vector<float> logits = {1, 3, 3, 2};
  EXPECT_EQ(Sampler(SamplingParams{}).sample(logits, {}), 1);
}

TEST(Sampler, TopKThenTopPThenMinP) {
  // Probabilities 0.5, 0.25, 0.125, 0.125.
  const std::vector<float> logits = {std::log(4.f), std::log(2.f), 0, 0};
  SamplingParams p;
  p.temperature = 1;
  auto q = probabilities(p, logits);
  EXPECT_NEAR(q[0], 0.5, 1e-6);
  EXPECT_NEAR(q[3], 0.125, 1e-6);
  p.top_k = 2;
  q = probabilities(p, logits);
  EXPECT_NEAR(q[0], 2.0 / 3, 1e-6);
  EXPECT_EQ(q[2], 0);
  p.top_k = 0;
  p.top_p = 0.7f;  // 0.5 is not enough, 0.75 is
  q = probabilities(p, logits);
  EXPECT_NEAR(q[1], 1.0 / 3, 1e-6);
  EXPECT_EQ(q[2], 0);
  p.top_p = 1;
  p.min_p = 0.3f;
  q = probabilities(p, logits);
  EXPECT_NEAR(q[1], 1.0 / 3, 1e-6);
  EXPECT_EQ(q[3], 0);
  p.min_p = 0;
  p.temperature = 0.5f;
  q = probabilities(p, logits);
  EXPECT_NEAR(q[0], 16.0 / 22, 1e-6);
}

TEST(Sampler, RepetitionPenaltyOncePerId) {
  SamplingParams p;
  p.repetition_penalty = 2;
  std::vector<float> logits = {4, 3, -1};
  EXPECT_EQ(Sampler(p).sample(logits, std::vector<int32_t>{0, 0, 2}), 1);  // 4 / 2 < 3
  EXPECT_FLOAT_EQ(logits[0], 2);
  EXPECT_FLOAT_EQ(logits[2], -2);
}

TEST(Sampler, DrawsFollowTheProbabilities) {
  SamplingParams p;
  p.temperature = 1;
  p.seed = 3;
  Sampler sampler(p);
  int counts[3] = {};
  constexpr int kDraws = 30000;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> logits = {0, std::log(2.f), std::log(3.f)};
    ++counts[sampler.sample(logits, {})];
  }
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(counts[i] / static_cast<double>(kDraws), (i + 1) / 6.0, 0.01);
}

TEST(Sampler, BadParametersAreErrors) {
  for (auto set : {+[](SamplingParams& p) { p.temperature = -1; }, +[](SamplingParams& p) { p.top_p = NAN; },
                   +[](SamplingParams& p) { p.top_k = -3; }, +[](SamplingParams& p) { p.repetition_penalty = 0; }}) {
    SamplingParams p;
    set(p);
    EXPECT_THROW(Sampler{p}, BadInput);
  }
}

}  // namespace
}  // namespace lacuna

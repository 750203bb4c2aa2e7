#include "eval/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace lacuna {
namespace {

using Strings = std::vector<std::string>;

TEST(StringMatch, SharesAndCase) {
  const Strings two = {"Alpha", "beta"};
  EXPECT_DOUBLE_EQ(string_match("alpha and beta", two, MatchRule::kShare), 0.5);
  EXPECT_DOUBLE_EQ(string_match("alpha and beta", two, MatchRule::kAll), 1.0);
  EXPECT_DOUBLE_EQ(string_match("only BETA", two, MatchRule::kPart), 1.0);
  EXPECT_DOUBLE_EQ(string_match("gamma", two, MatchRule::kPart), 0.0);
  EXPECT_DOUBLE_EQ(string_match("anything", Strings{}, MatchRule::kAll), 0.0);
}

TEST(Wilson, HandValues) {
  // Newcombe 1998, table I: 81 of 263 gives 0.2553 … 0.3662; 0 of 20 gives 0 … 0.1611.
  const Interval a = wilson_interval(81, 263);
  EXPECT_NEAR(a.low, 0.2553, 5e-5);
  EXPECT_NEAR(a.high, 0.3662, 5e-5);
  const Interval b = wilson_interval(0, 20);
  EXPECT_NEAR(b.low, 0.0, 1e-12);
  EXPECT_NEAR(b.high, 0.1611, 5e-5);
  EXPECT_DOUBLE_EQ(wilson_interval(0, 0).high, 1.0);
}

TEST(MeanInterval, WilsonForIndependentHits) {
  std::vector<double> scores(263, 0.0);
  for (size_t i = 0; i < 81; ++i) scores[i] = 1;
  EXPECT_NEAR(mean_interval(scores).low, 0.2553, 5e-5);
}

TEST(MeanInterval, QuestionsOnOneContextAreNotIndependent) {
  // 40 contexts with 5 questions each that stand or fall together.
  std::vector<double> scores;
  std::vector<int64_t> clusters;
  for (int64_t c = 0; c < 40; ++c)
    for (int q = 0; q < 5; ++q) {
      scores.push_back(c % 2 ? 1.0 : 0.0);
      clusters.push_back(c);
    }
  const Interval naive = mean_interval(scores), honest = mean_interval(scores, clusters);
  EXPECT_EQ(honest.clusters, 40);
  EXPECT_GT(honest.high - honest.low, 1.8 * (naive.high - naive.low));
}

TEST(MeanInterval, PerfectScoresStillHaveAWidth) {
  const std::vector<double> scores(100, 1.0);
  const Interval i = mean_interval(scores);
  EXPECT_DOUBLE_EQ(i.value, 1.0);
  EXPECT_NEAR(i.low, 0.9630, 1e-4);
}

TEST(MacroInterval, TasksWeighTheSame) {
  const std::vector<std::vector<double>> groups = {{1, 1, 1, 1, 0, 1, 1, 1}, {0, 0.5}, {}};
  const Interval i = macro_interval(groups);
  EXPECT_NEAR(i.value, (0.875 + 0.25) / 2, 1e-12);
  EXPECT_LT(i.low, i.value);
  EXPECT_GT(i.high, i.value);
  EXPECT_EQ(i.count, 10);
}

TEST(PairedDifference, SignTestAgainstTheBinomialTable) {
  // 9 wins, 1 loss: p = 2 (1 + 10) / 1024.
  std::vector<double> a(40, 1.0), b(40, 1.0);
  for (size_t i = 0; i < 9; ++i) b[i] = 0;
  a[20] = 0;
  const PairedDifference d = paired_difference(std::vector<std::vector<double>>{a}, std::vector<std::vector<double>>{b});
  EXPECT_EQ(d.wins, 9);
  EXPECT_EQ(d.losses, 1);
  EXPECT_NEAR(d.p, 22.0 / 1024, 1e-12);
  EXPECT_NEAR(d.difference.value, 8.0 / 40, 1e-12);
  EXPECT_GT(d.difference.low, 0);
}

TEST(PairedDifference, EqualListsDoNotDiffer) {
  const std::vector<std::vector<double>> a = {{1, 0, 0.5}};
  const PairedDifference d = paired_difference(a, a);
  EXPECT_DOUBLE_EQ(d.difference.value, 0);
  EXPECT_DOUBLE_EQ(d.p, 1);
}

TEST(Logits, KlAgainstTheFormula) {
  const float full[] = {0.0f, std::log(3.0f)};    // 1/4, 3/4
  const float other[] = {std::log(1.0f), 0.0f};   // 1/2, 1/2
  const LogitComparison c = compare_logits(full, other, 2);
  EXPECT_NEAR(c.kl, 0.25 * std::log(0.5) + 0.75 * std::log(1.5), 1e-7);
  EXPECT_FALSE(c.same_top);
  EXPECT_NEAR(negative_log_likelihood(full, 2, 0), std::log(4.0), 1e-6);
  EXPECT_NEAR(compare_logits(full, full, 2).kl, 0, 1e-12);
}

}  // namespace
}  // namespace lacuna

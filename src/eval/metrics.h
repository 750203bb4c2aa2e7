// eval: tasks, metrics, the runner that scores many policies on one prefill, and its reports.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// How an answer is held against its references.
enum class MatchRule : uint8_t {
  kShare,  // the share of references that occur in the answer, letter by letter: the project's tasks
  kAll,    // the same with case ignored: RULER's string_match_all
  kPart,   // 1 if any reference occurs, case ignored, else 0: RULER's string_match_part
};

// 0 … 1. An empty list of references scores 0.
double string_match(std::string_view answer, std::span<const std::string> references, MatchRule rule);

// A mean with its 95 % interval.
struct Interval {
  double value = 0, low = 0, high = 0;
  int64_t count = 0;     // observations
  int64_t clusters = 0;  // independent ones: questions on one context count once
};

// Wilson's score interval for `successes` (may be fractional) out of n. Unlike the normal one it stays
// inside [0, 1] and has a width at 0 % and 100 %.
Interval wilson_interval(double successes, int64_t n);

// Mean of scores in [0, 1]. Wilson's interval where every score is 0 or 1 and observations are
// independent; else a percentile bootstrap that draws whole clusters (10,000 draws, fixed seed), and
// Wilson's over clusters where the bootstrap has nothing to vary. clusters: empty, or one id a score.
Interval mean_interval(std::span<const double> scores, std::span<const int64_t> clusters = {});

// The mean of several groups' means, each group (a task) weighing the same; the bootstrap draws within
// every group. For one group whose scores are all 0 or 1 it is mean_interval. Empty groups do not count.
Interval macro_interval(std::span<const std::vector<double>> groups);

// A mean of values of any size, cluster bootstrap.
Interval bootstrap_interval(std::span<const double> values, std::span<const int64_t> clusters = {});

// a − b on the same prompts.
struct PairedDifference {
  Interval difference;           // mean of a[i] − b[i], bootstrap
  int64_t wins = 0, losses = 0;  // prompts where a > b, a < b
  double p = 1;                  // two-sided exact sign test over wins and losses (McNemar's exact test for 0/1 scores)
};
// a and b: one list of scores a group (a task), prompt by prompt the same; groups weigh the same.
PairedDifference paired_difference(std::span<const std::vector<double>> a, std::span<const std::vector<double>> b);

// Differences between two rows of logits, natural logarithms.
struct LogitComparison {
  double kl = 0;          // KL(full ‖ other) in nats
  bool same_top = false;  // both have the same most likely token
};
LogitComparison compare_logits(const float* full, const float* other, int64_t vocab);

// −log softmax(logits)[target] in nats.
double negative_log_likelihood(const float* logits, int64_t vocab, int32_t target);

}  // namespace lacuna

#include "eval/metrics.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "eval/random.h"

namespace lacuna {
namespace {

constexpr int kDraws = 10000;
constexpr int kStratifiedDraws = 2000;  // a report has thousands of these intervals, over thousands of prompts
constexpr double kZ95 = 1.959963984540054;

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

struct ClusterSums {
  std::vector<double> sum;
  std::vector<int64_t> size;
};

ClusterSums by_cluster(std::span<const double> scores, std::span<const int64_t> clusters) {
  LACUNA_CHECK(clusters.empty() || clusters.size() == scores.size());
  ClusterSums out;
  std::map<int64_t, size_t> index;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t id = clusters.empty() ? static_cast<int64_t>(i) : clusters[i];
    const auto [at, fresh] = index.try_emplace(id, out.sum.size());
    if (fresh) {
      out.sum.push_back(0);
      out.size.push_back(0);
    }
    out.sum[at->second] += scores[i];
    ++out.size[at->second];
  }
  return out;
}

std::pair<double, double> percentiles(std::vector<double>& draws) {
  std::sort(draws.begin(), draws.end());
  const auto at = [&](double q) { return draws[static_cast<size_t>(std::lround(q * static_cast<double>(draws.size() - 1)))]; };
  return {at(0.025), at(0.975)};
}

// Percentile bootstrap of sum(sum) / sum(size) over whole clusters.
std::pair<double, double> bootstrap(const ClusterSums& c) {
  const int64_t n = static_cast<int64_t>(c.sum.size());
  EvalRandom random(20260101);
  std::vector<double> means(kDraws);
  for (double& mean : means) {
    double sum = 0;
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const size_t j = static_cast<size_t>(random.below(n));
      sum += c.sum[j];
      size += c.size[j];
    }
    mean = sum / static_cast<double>(size);
  }
  return percentiles(means);
}

// Mean of the groups' means, percentile bootstrap drawn within every group.
Interval stratified(const std::vector<std::span<const double>>& groups) {
  Interval out;
  const double weight = 1.0 / static_cast<double>(groups.size());
  for (const auto& group : groups) {
    double sum = 0;
    for (double v : group) sum += v;
    out.value += weight * sum / static_cast<double>(group.size());
    out.count += static_cast<int64_t>(group.size());
  }
  out.clusters = out.count;
  EvalRandom random(20260102);
  std::vector<double> means(kStratifiedDraws);
  for (double& mean : means) {
    mean = 0;
    for (const auto& group : groups) {
      const int64_t n = static_cast<int64_t>(group.size());
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += group[static_cast<size_t>(random.below(n))];
      mean += weight * sum / static_cast<double>(n);
    }
  }
  std::tie(out.low, out.high) = percentiles(means);
  return out;
}

double log_sum_exp(const float* x, int64_t n) {
  const float top = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - top);
  return top + std::log(sum);
}

}  // namespace

double string_match(std::string_view answer, std::span<const std::string> references, MatchRule rule) {
  if (references.empty()) return 0;
  const auto folded = [&](std::string_view s) { return rule == MatchRule::kShare ? std::string(s) : lower(s); };
  const std::string text = folded(answer);
  int64_t found = 0;
  for (const std::string& reference : references) found += text.find(folded(reference)) != std::string::npos;
  if (rule == MatchRule::kPart) return found > 0 ? 1 : 0;
  return static_cast<double>(found) / static_cast<double>(references.size());
}

Interval wilson_interval(double successes, int64_t n) {
  Interval out;
  out.count = out.clusters = n;
  if (n == 0) {
    out.high = 1;
    return out;
  }
  const double m = static_cast<double>(n), p = successes / m, z2 = kZ95 * kZ95;
  const double centre = (p + z2 / (2 * m)) / (1 + z2 / m);
  const double half = kZ95 / (1 + z2 / m) * std::sqrt(p * (1 - p) / m + z2 / (4 * m * m));
  out.value = p;
  out.low = std::max(0.0, centre - half);
  out.high = std::min(1.0, centre + half);
  return out;
}

Interval mean_interval(std::span<const double> scores, std::span<const int64_t> clusters) {
  if (scores.empty()) return wilson_interval(0, 0);
  const ClusterSums c = by_cluster(scores, clusters);
  const int64_t independent = static_cast<int64_t>(c.sum.size());
  double sum = 0;
  bool binary = true;
  for (double s : scores) {
    sum += s;
    binary = binary && (s == 0 || s == 1);
  }
  const double mean = sum / static_cast<double>(scores.size());
  Interval out;
  const auto [low, high] = std::minmax_element(scores.begin(), scores.end());
  if ((binary && independent == static_cast<int64_t>(scores.size())) || *low == *high) {
    out = wilson_interval(mean * static_cast<double>(independent), independent);
  } else {
    std::tie(out.low, out.high) = bootstrap(c);
  }
  out.value = mean;
  out.count = static_cast<int64_t>(scores.size());
  out.clusters = independent;
  return out;
}

Interval bootstrap_interval(std::span<const double> values, std::span<const int64_t> clusters) {
  Interval out;
  if (values.empty()) return out;
  const ClusterSums c = by_cluster(values, clusters);
  for (double v : values) out.value += v / static_cast<double>(values.size());
  std::tie(out.low, out.high) = bootstrap(c);
  out.count = static_cast<int64_t>(values.size());
  out.clusters = static_cast<int64_t>(c.sum.size());
  return out;
}

Interval macro_interval(std::span<const std::vector<double>> groups) {
  std::vector<std::span<const double>> full;
  for (const auto& group : groups)
    if (!group.empty()) full.emplace_back(group);
  if (full.empty()) return wilson_interval(0, 0);
  if (full.size() == 1) return mean_interval(full[0]);
  Interval out = stratified(full);
  // Where nothing varies (all right or all wrong) the bootstrap has no width; Wilson's has.
  if (out.low == out.high && (out.value == 0 || out.value == 1)) {
    const Interval w = wilson_interval(out.value * static_cast<double>(out.count), out.count);
    out.low = w.low;
    out.high = w.high;
  }
  return out;
}

PairedDifference paired_difference(std::span<const std::vector<double>> a, std::span<const std::vector<double>> b) {
  LACUNA_CHECK(a.size() == b.size());
  PairedDifference out;
  std::vector<std::vector<double>> d;
  for (size_t g = 0; g < a.size(); ++g) {
    LACUNA_CHECK(a[g].size() == b[g].size());
    if (a[g].empty()) continue;
    auto& group = d.emplace_back(a[g].size());
    for (size_t i = 0; i < group.size(); ++i) {
      group[i] = a[g][i] - b[g][i];
      out.wins += group[i] > 0;
      out.losses += group[i] < 0;
    }
  }
  if (d.empty()) return out;
  out.difference = stratified({d.begin(), d.end()});

  // P(Binomial(n, 1/2) ≤ min(wins, losses)) · 2, in logarithms so that n in the thousands is fine.
  const int64_t n = out.wins + out.losses, k = std::min(out.wins, out.losses);
  double tail = 0;
  for (int64_t i = 0; i <= k; ++i) {
    const double top = static_cast<double>(n), low = static_cast<double>(i);
    tail += std::exp(std::lgamma(top + 1) - std::lgamma(low + 1) - std::lgamma(top - low + 1) - top * std::log(2.0));
  }
  out.p = std::min(1.0, 2 * tail);
  return out;
}

LogitComparison compare_logits(const float* full, const float* other, int64_t vocab) {
  const double za = log_sum_exp(full, vocab), zb = log_sum_exp(other, vocab);
  LogitComparison out;
  for (int64_t i = 0; i < vocab; ++i) {
    const double la = full[i] - za;
    out.kl += std::exp(la) * (la - (other[i] - zb));
  }
  out.kl = std::max(0.0, out.kl);
  out.same_top = std::max_element(full, full + vocab) - full == std::max_element(other, other + vocab) - other;
  return out;
}

double negative_log_likelihood(const float* logits, int64_t vocab, int32_t target) {
  return log_sum_exp(logits, vocab) - logits[target];
}

}  // namespace lacuna

// LagKV (arXiv 2504.04704): a token stands out if its key and value vary over channels once they are
// scaled by the range of the next block of tokens. No attention is needed.
#include <cmath>
#include <numeric>

#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class LagKV : public NamedPolicy {
 public:
  explicit LagKV(PolicyOptions& options) {
    lag_ = options.integer("lag", 128, 2, 65536);
    rule_.scope = Scope::kHead;
    rule_.sinks = options.integer("sinks", 4, 0, 1024);
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.keys = needs.values = true;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    const int64_t n = e.candidates, sinks = std::min<int64_t>(rule_.sinks, n);
    out.score.assign(static_cast<size_t>(n), 1.0f);
    if (n < rule_.sinks + 2 * lag_) {  // too short for a block and its reference: the most recent tokens
      for (int64_t i = sinks; i < n; ++i)
        out.score[static_cast<size_t>(i)] = static_cast<float>(i - sinks) / static_cast<float>(n - sinks);
      return;
    }
    const int64_t blocks = (n - sinks) / lag_;
    std::vector<double> key_score(static_cast<size_t>(lag_)), value_score(key_score);
    std::vector<int64_t> order(static_cast<size_t>(lag_));
    for (int64_t b = 0; b + 1 < blocks; ++b) {
      const int64_t begin = sinks + b * lag_;
      relative_spread(e.key(begin), e.key(begin + lag_), e.head_dim, key_score);
      relative_spread(e.value(begin), e.value(begin + lag_), e.head_dim, value_score);
      std::iota(order.begin(), order.end(), int64_t{0});
      std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
        return key_score[static_cast<size_t>(x)] + value_score[static_cast<size_t>(x)] <
               key_score[static_cast<size_t>(y)] + value_score[static_cast<size_t>(y)];
      });
      for (int64_t rank = 0; rank < lag_; ++rank)
        out.score[static_cast<size_t>(begin + order[static_cast<size_t>(rank)])] = static_cast<float>(rank) / static_cast<float>(lag_);
    }
    // The last block and the rest behind it have no reference and stay; if not all of them can, the
    // newest do (the method leaves that open: all have score 1).
    for (int64_t i = sinks + (blocks - 1) * lag_; i < n; ++i)
      out.score[static_cast<size_t>(i)] = 1.0f + static_cast<float>(i) / static_cast<float>(n);
  }

 private:
  // softmax over the block of the standard deviation over channels of (x - min) / (max - min).
  void relative_spread(const float* block, const float* reference, int d, std::vector<double>& out) const {
    std::vector<float> low(reference, reference + d), high(reference, reference + d);
    for (int64_t t = 1; t < lag_; ++t)
      for (int j = 0; j < d; ++j) {
        low[static_cast<size_t>(j)] = std::min(low[static_cast<size_t>(j)], reference[t * d + j]);
        high[static_cast<size_t>(j)] = std::max(high[static_cast<size_t>(j)], reference[t * d + j]);
      }
    double top = 0;
    for (int64_t t = 0; t < lag_; ++t) {
      double sum = 0, square = 0;
      for (int j = 0; j < d; ++j) {
        const double range = static_cast<double>(high[static_cast<size_t>(j)]) - low[static_cast<size_t>(j)];
        const double x = range > 0 ? (block[t * d + j] - low[static_cast<size_t>(j)]) / range : 0;
        sum += x;
        square += x * x;
      }
      const double mean = sum / d;
      out[static_cast<size_t>(t)] = std::sqrt(std::max(0.0, (square - d * mean * mean) / std::max(1, d - 1)));
      top = std::max(top, out[static_cast<size_t>(t)]);
    }
    double total = 0;
    for (double& x : out) total += x = std::exp(x - top);
    for (double& x : out) x /= total;
  }

  int64_t lag_;
};

}  // namespace

PolicyPtr make_lagkv(PolicyOptions& options) { return std::make_shared<LagKV>(options); }

}  // namespace lacuna

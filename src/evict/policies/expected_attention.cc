// Expected attention (kvpress; arXiv 2510.00636): what a future query, drawn from the statistics of the
// past ones and rotated by the mean rotation of the positions to come, would pay to each key.
#include <cmath>

#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

constexpr int64_t kSinks = 4;

class ExpectedAttention : public NamedPolicy {
 public:
  explicit ExpectedAttention(PolicyOptions& options) {
    future_ = options.integer("future", 512, 1, 1 << 20);
    covariance_ = options.flag("covariance", true);
    value_norm_ = options.flag("value_norm", true);
    epsilon_ = options.number("epsilon", 0, 0, 1);
    rule_.scope = Scope::kHead;
    rule_.sinks = kSinks;
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.keys = needs.values = needs.raw_queries = true;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.assign(static_cast<size_t>(e.candidates), 0.0f);
    const int64_t sinks = std::clamp<int64_t>(kSinks - e.first, 0, e.candidates), count = e.candidates - sinks;
    if (count <= 0) return;
    const int d = e.head_dim;
    std::vector<double> mean(static_cast<size_t>(d)), cov(static_cast<size_t>(d) * static_cast<size_t>(d));
    std::vector<double> logits(static_cast<size_t>(count));
    for (int h = 0; h < e.group; ++h) {
      rotate(e, h, mean, cov);
      for_columns(*e.pool, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) logits[static_cast<size_t>(i)] = logit(e, e.key(sinks + i), mean, cov);
      });
      double top = logits[0], sum = 0;
      for (double x : logits) top = std::max(top, x);
      for (double& x : logits) sum += x = std::exp(x - top);
      for (int64_t i = 0; i < count; ++i)
        out.score[static_cast<size_t>(sinks + i)] += static_cast<float>(logits[static_cast<size_t>(i)] / sum / e.group);
    }
    if (!value_norm_) return;
    for (int64_t i = sinks; i < e.candidates; ++i) {
      const float* v = e.value(i);
      double square = 0;
      for (int j = 0; j < d; ++j) square += static_cast<double>(v[j]) * v[j];
      float& s = out.score[static_cast<size_t>(i)];
      s = static_cast<float>((s + epsilon_) * std::sqrt(square));
    }
  }

 private:
  // mu R^T and R Sigma R^T, R the mean of the rotations of the next `future` positions: in every pair
  // (j, j + d/2) it scales and turns by the mean cosine and sine.
  void rotate(const HeadEvidence& e, int h, std::vector<double>& mean, std::vector<double>& cov) const {
    const int d = e.head_dim, half = d / 2;
    std::vector<double> c(static_cast<size_t>(half), 0.0), s(static_cast<size_t>(half), 0.0);
    for (int j = 0; j < half; ++j) {
      for (int64_t t = 0; t < future_; ++t) {
        // The angle as the model forms it, in f32.
        const float angle = static_cast<float>(e.next_position + t) * e.inv_freq[j];
        c[static_cast<size_t>(j)] += std::cos(static_cast<double>(angle));
        s[static_cast<size_t>(j)] += std::sin(static_cast<double>(angle));
      }
      c[static_cast<size_t>(j)] *= e.rope_factor / static_cast<double>(future_);
      s[static_cast<size_t>(j)] *= e.rope_factor / static_cast<double>(future_);
    }
    const auto turn = [&](const double* x, int64_t stride, double* y, int64_t y_stride) {
      for (int j = 0; j < half; ++j) {
        const double a = x[j * stride], b = x[(j + half) * stride];
        y[j * y_stride] = c[static_cast<size_t>(j)] * a - s[static_cast<size_t>(j)] * b;
        y[(j + half) * y_stride] = c[static_cast<size_t>(j)] * b + s[static_cast<size_t>(j)] * a;
      }
    };
    turn(e.query_mean + static_cast<int64_t>(h) * d, 1, mean.data(), 1);
    if (!covariance_) return;
    std::vector<double> half_way(cov.size());
    const double* sigma = e.query_cov + static_cast<int64_t>(h) * d * d;
    for (int i = 0; i < d; ++i) turn(sigma + static_cast<int64_t>(i) * d, 1, half_way.data() + static_cast<int64_t>(i) * d, 1);
    for (int j = 0; j < d; ++j) turn(half_way.data() + j, d, cov.data() + j, d);
  }

  double logit(const HeadEvidence& e, const float* key, const std::vector<double>& mean, const std::vector<double>& cov) const {
    const int d = e.head_dim;
    double linear = 0, square = 0;
    for (int i = 0; i < d; ++i) {
      linear += mean[static_cast<size_t>(i)] * key[i];
      if (!covariance_) continue;
      double row = 0;
      for (int j = 0; j < d; ++j) row += cov[static_cast<size_t>(i * d + j)] * key[j];
      square += row * key[i];
    }
    return linear * e.scale + square * e.scale * e.scale / 2;
  }

  int64_t future_;
  bool covariance_, value_norm_;
  double epsilon_;
};

}  // namespace

PolicyPtr make_expected_attention(PolicyOptions& options) { return std::make_shared<ExpectedAttention>(options); }

}  // namespace lacuna

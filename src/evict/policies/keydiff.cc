// KeyDiff (arXiv 2504.15364): keys that point away from the mean direction of all keys.
#include <cmath>

#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

double length(const double* x, int d) {
  double sum = 0;
  for (int j = 0; j < d; ++j) sum += x[j] * x[j];
  return std::sqrt(sum);
}

class KeyDiff : public NamedPolicy {
 public:
  explicit KeyDiff(PolicyOptions& options) {
    rule_.scope = Scope::kHead;
    rule_.non_negative = false;
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.keys = true;
    return needs;
  }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    const int d = e.head_dim;
    std::vector<float> lengths(static_cast<size_t>(e.candidates));
    std::vector<double> mean(static_cast<size_t>(d), 0.0);
    for (int64_t i = 0; i < e.candidates; ++i) {
      const float* k = e.key(i);
      double sum = 0;
      for (int j = 0; j < d; ++j) sum += static_cast<double>(k[j]) * k[j];
      const double size = std::max(std::sqrt(sum), 1e-12);
      lengths[static_cast<size_t>(i)] = static_cast<float>(size);
      for (int j = 0; j < d; ++j) mean[static_cast<size_t>(j)] += k[j] / size;
    }
    for (double& x : mean) x /= static_cast<double>(std::max<int64_t>(1, e.candidates));
    const double anchor = length(mean.data(), d);
    out.score.resize(static_cast<size_t>(e.candidates));
    for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* k = e.key(i);
        double dot = 0;
        for (int j = 0; j < d; ++j) dot += k[j] * mean[static_cast<size_t>(j)];
        out.score[static_cast<size_t>(i)] = static_cast<float>(-dot / std::max(anchor * lengths[static_cast<size_t>(i)], 1e-8));
      }
    });
  }
};

}  // namespace

PolicyPtr make_keydiff(PolicyOptions& options) { return std::make_shared<KeyDiff>(options); }

}  // namespace lacuna

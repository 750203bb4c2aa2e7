// Key norm (arXiv 2406.11430): keys of small length attract attention.
#include <cmath>

#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class KeyNorm : public NamedPolicy {
 public:
  explicit KeyNorm(PolicyOptions& options) {
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
    out.score.resize(static_cast<size_t>(e.candidates));
    for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* k = e.key(i);
        float sum = 0;
        for (int j = 0; j < e.head_dim; ++j) sum += k[j] * k[j];
        out.score[static_cast<size_t>(i)] = -std::sqrt(sum);
      }
    });
  }
};

}  // namespace

PolicyPtr make_knorm(PolicyOptions& options) { return std::make_shared<KeyNorm>(options); }

}  // namespace lacuna

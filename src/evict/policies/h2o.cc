// H2O (arXiv 2306.14048) as kvpress's observed attention: attention received from all queries, over
// the number of queries that could see the token.
#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class H2O : public NamedPolicy {
 public:
  explicit H2O(PolicyOptions& options) {
    rule_.scope = Scope::kHead;
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.column_sums = true;
    return needs;
  }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.assign(static_cast<size_t>(e.candidates), 0.0f);
    for (int64_t i = 0; i < e.candidates; ++i) {
      float sum = 0;
      for (int h = 0; h < e.group; ++h) sum += e.sum_row(h)[i];
      const float seen = e.observers[e.first + i] * static_cast<float>(e.group);
      out.score[static_cast<size_t>(i)] = seen > 0 ? sum / seen : 0.0f;
    }
  }
};

}  // namespace

PolicyPtr make_h2o(PolicyOptions& options) { return std::make_shared<H2O>(options); }

}  // namespace lacuna

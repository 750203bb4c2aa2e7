// KVzip (arXiv 2505.23416): the largest attention a token receives while the model repeats the context;
// compared over the whole model. Needs a second pass (evict/replay.h).
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class KVzip : public NamedPolicy {
 public:
  explicit KVzip(PolicyOptions& options) {
    rule_.scope = Scope::kModel;
    rule_.sinks = options.integer("sinks", 4, 0, 1024);
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.replay = true;
    return needs;
  }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.assign(e.replayed + e.first, e.replayed + e.first + e.candidates);
  }
};

}  // namespace

PolicyPtr make_kvzip(PolicyOptions& options) { return std::make_shared<KVzip>(options); }

}  // namespace lacuna

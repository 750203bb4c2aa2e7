// AdaKV (arXiv 2407.11550): another policy's scores, compared over all heads of a layer; every head is
// guaranteed a part of an even share.
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class AdaKV : public NamedPolicy {
 public:
  AdaKV(PolicyOptions& options, PolicyPtr base) : base_(std::move(base)) {
    rule_ = base_->rule();
    rule_.scope = Scope::kLayer;
    rule_.guarantee = options.number("guarantee", 0.2, 0, 1);
    options.done();
    name_ = options.canonical() + ":" + base_->name();
  }
  PolicyNeeds needs() const override { return base_->needs(); }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores& layer) const override { base_->score(e, out, layer); }
  void finish_layer(LayerScores& layer) const override { base_->finish_layer(layer); }
  void apply_quota(LayerScores& layer, double mean) const override { base_->apply_quota(layer, mean); }

 private:
  PolicyPtr base_;
};

}  // namespace

PolicyPtr make_adakv(PolicyOptions& options, PolicyPtr base) { return std::make_shared<AdaKV>(options, std::move(base)); }

}  // namespace lacuna

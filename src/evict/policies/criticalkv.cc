// CriticalKV (arXiv 2502.03805): half of each head's budget by another policy's score, the rest by
// (score + epsilon) times the group mean of ||v W_O||_1.
#include "base/error.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class CriticalKV : public NamedPolicy {
 public:
  CriticalKV(PolicyOptions& options, PolicyPtr base) : base_(std::move(base)) {
    rule_ = base_->rule();
    if (rule_.first_stage < 1 || base_->name().find("layer_defensive") != std::string::npos)
      throw BadInput("policy criticalkv: {} chooses in two stages already, so it can't be the base", base_->name());
    rule_.first_stage = options.number("first_stage", 0.5, 0, 0.999);
    epsilon_ = static_cast<float>(options.number("epsilon", 1e-4, 0, 1));
    options.done();
    name_ = options.canonical() + ":" + base_->name();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs = base_->needs();
    needs.projected_l1 = true;
    return needs;
  }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores& layer) const override {
    base_->score(e, out, layer);
    out.second.assign(static_cast<size_t>(e.candidates), 0.0f);
    for (int h = 0; h < e.group; ++h)
      for (size_t i = 0; i < out.second.size(); ++i) out.second[i] += e.l1_row(h)[i] / static_cast<float>(e.group);
  }
  void finish_layer(LayerScores& layer) const override {
    base_->finish_layer(layer);
    for (HeadScores& head : layer.heads)
      for (size_t i = 0; i < head.second.size(); ++i) head.second[i] *= head.score[i] + epsilon_;
  }

 private:
  PolicyPtr base_;
  float epsilon_;
};

}  // namespace

PolicyPtr make_criticalkv(PolicyOptions& options, PolicyPtr base) {
  return std::make_shared<CriticalKV>(options, std::move(base));
}

}  // namespace lacuna

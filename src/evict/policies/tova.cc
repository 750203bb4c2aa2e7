// TOVA (arXiv 2401.06104): the last query's attention, averaged over all heads of the layer.
#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class Tova : public NamedPolicy {
 public:
  explicit Tova(PolicyOptions& options) {
    rule_.scope = Scope::kHead;
    rule_.window = 1;
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.window_rows = 1;
    return needs;
  }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.resize(static_cast<size_t>(e.candidates));
    mean_window_attention(e, 1, out.score.data());
  }
  void finish_layer(LayerScores& layer) const override {
    const auto sums = sum_over_heads(layer, &HeadScores::score);
    for (size_t h = 0; h < layer.heads.size(); ++h)
      for (size_t i = 0; i < sums[h].size(); ++i)
        layer.heads[h].score[i] = static_cast<float>(sums[h][i] / static_cast<double>(layer.heads.size()));
  }
};

}  // namespace

PolicyPtr make_tova(PolicyOptions& options) { return std::make_shared<Tova>(options); }

}  // namespace lacuna

// SnapKV (arXiv 2404.14469): mean attention of the last queries, pooled; per head. PyramidKV
// (arXiv 2406.02069): the same with budgets that fall linearly with depth.
#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

constexpr std::string_view kRules[] = {"original", "kvpress"};

class SnapKV : public NamedPolicy {
 public:
  SnapKV(PolicyOptions& options, bool pyramid) {
    rule_.scope = Scope::kHead;
    rule_.window = options.integer("window", 32, 1, 1024);
    kernel_ = options.odd("pool_kernel", 5);
    if (pyramid) {
      rule_.share = LayerShare::kPyramid;
      rule_.pyramid_beta = options.number("beta", 20, 1, 1e6);
      rule_.pyramid_holds_window = options.choice("rule", kRules) == 1;
    }
    options.done();
    name_ = options.canonical();
  }

  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.window_rows = rule_.window;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    std::vector<float> mean(static_cast<size_t>(e.candidates));
    mean_window_attention(e, rule_.window, mean.data());
    out.score = average_pool(mean, kernel_);
  }

 private:
  int kernel_;
};

}  // namespace

PolicyPtr make_snapkv(PolicyOptions& options) { return std::make_shared<SnapKV>(options, false); }
PolicyPtr make_pyramidkv(PolicyOptions& options) { return std::make_shared<SnapKV>(options, true); }

}  // namespace lacuna

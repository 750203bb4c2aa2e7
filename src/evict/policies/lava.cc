// LAVa (arXiv 2509.09754): mean window attention times the longest value of the head, one list a layer;
// a layer's budget follows the normalised entropy of that list.
#include <cmath>

#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

constexpr std::string_view kPools[] = {"max", "average"};
constexpr std::string_view kGroups[] = {"max", "mean"};

class Lava : public NamedPolicy {
 public:
  explicit Lava(PolicyOptions& options) {
    rule_.scope = Scope::kLayer;
    rule_.share = LayerShare::kMeasured;
    rule_.window = options.integer("window", 32, 1, 1024);
    kernel_ = options.odd("pool_kernel", 7);
    average_ = options.choice("pool", kPools) == 1;
    mean_group_ = options.choice("gqa", kGroups) == 1;
    rule_.guarantee = options.number("guarantee", 0, 0, 1);
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.window_rows = rule_.window;
    needs.values = true;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.assign(static_cast<size_t>(e.candidates), 0.0f);
    std::vector<float> mean(out.score.size());
    for (int h = 0; h < e.group; ++h) {
      for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) {
        reduce_window(e, rule_.window, h, WindowReduce::kMean, begin, end, mean.data() + begin);
      });
      const std::vector<float> pooled = average_ ? average_pool(mean, kernel_) : max_pool(mean, kernel_);
      for (size_t i = 0; i < pooled.size(); ++i)
        out.score[i] = mean_group_ ? out.score[i] + pooled[i] / static_cast<float>(e.group) : std::max(out.score[i], pooled[i]);
    }
    float longest = 0;
    for (int64_t i = 0; i < e.candidates; ++i) {
      float sum = 0;
      for (int j = 0; j < e.head_dim; ++j) sum += std::fabs(e.value(i)[j]);
      longest = std::max(longest, sum);
    }
    for (float& s : out.score) s *= longest;
  }
  void finish_layer(LayerScores& layer) const override {
    double total = 0, entropy = 0;
    size_t count = 0;
    for (const HeadScores& head : layer.heads) {
      count += head.score.size();
      for (float s : head.score) total += s;
    }
    for (const HeadScores& head : layer.heads)
      for (float s : head.score) {
        const double p = s / (total + 1e-16);
        entropy -= p * std::log(p + 1e-16);
      }
    layer.preference = count > 1 ? entropy / std::log(static_cast<double>(count)) : 1;
  }

 private:
  int kernel_;
  bool average_, mean_group_;
};

}  // namespace

PolicyPtr make_lava(PolicyOptions& options) { return std::make_shared<Lava>(options); }

}  // namespace lacuna

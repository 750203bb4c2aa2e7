// CAKE (arXiv 2503.12491): mean and variance of the window's attention; a layer's budget grows with how
// dispersed its attention is over tokens (entropy) and over queries (variance).
#include <cmath>

#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class Cake : public NamedPolicy {
 public:
  explicit Cake(PolicyOptions& options) {
    rule_.scope = Scope::kHead;
    rule_.share = LayerShare::kMeasured;
    rule_.window = options.integer("window", 32, 2, 1024);
    kernel_ = options.odd("pool_kernel", 5);
    gamma_ = static_cast<float>(options.number("gamma", 200, 0, 1e6));
    tau1_ = options.number("tau1", 1, 0.01, 100);
    tau2_ = options.number("tau2", 1, 0.01, 100);
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.window_rows = rule_.window;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores& layer) const override {
    std::vector<float> raw(static_cast<size_t>(e.candidates), 0.0f);
    const int from = first_row(e, rule_.window), rows = e.rows - from;
    const int64_t pieces = (e.candidates + kColumnBlock - 1) / kColumnBlock;
    std::vector<double> entropy(static_cast<size_t>(pieces), 0.0), spread(static_cast<size_t>(pieces), 0.0);
    for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) {
      const size_t piece = static_cast<size_t>(begin / kColumnBlock);
      for (int64_t i = begin; i < end; ++i)
        for (int h = 0; h < e.group; ++h) {
          double sum = 0, square = 0;
          for (int t = from; t < e.rows; ++t) {
            const double a = e.prob_row(h, t)[i];
            sum += a;
            square += a * a;
            entropy[piece] -= a * std::log(a + 1e-10);
          }
          const double mean = sum / std::max(1, rows);
          const double variance = rows > 1 ? std::max(0.0, (square - sum * mean) / (rows - 1)) : 0;
          spread[piece] += variance;
          raw[static_cast<size_t>(i)] += static_cast<float>((mean + gamma_ * variance) / e.group);
        }
    });
    for (double x : entropy) layer.preference += x;
    for (double x : spread) layer.spread += x;
    out.score = average_pool(raw, kernel_);
  }
  void finish_layer(LayerScores& layer) const override {
    layer.preference = std::pow(std::max(0.0, layer.preference), 1 / tau1_) * std::pow(layer.spread, 1 / tau2_);
  }

 private:
  int kernel_;
  float gamma_;
  double tau1_, tau2_;
};

}  // namespace

PolicyPtr make_cake(PolicyOptions& options) { return std::make_shared<Cake>(options); }

}  // namespace lacuna

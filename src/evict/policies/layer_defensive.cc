// Layer-DefensiveKV (arXiv 2510.13334): the worst case over queries and heads instead of the mean,
// floored at the head's mean, times the share of ||v W_O||_1 among the heads; one list for the model.
#include <cmath>
#include <limits>
#include <numeric>

#include "evict/columns.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class LayerDefensive : public NamedPolicy {
 public:
  explicit LayerDefensive(PolicyOptions& options) {
    rule_.scope = Scope::kModel;
    rule_.window = options.integer("window", 32, 1, 1024);
    kernel_ = options.odd("pool_kernel", 5);
    mass_ = options.number("mass", 0.9, 0, 1);
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.window_rows = rule_.window;
    needs.projected_l1 = true;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores& layer) const override {
    const size_t n = static_cast<size_t>(e.candidates);
    out.score.assign(n, 0.0f);
    out.weight.assign(n, 0.0f);
    out.second.assign(n, 0.0f);
    if (n == 0) return;
    mean_window_attention(e, rule_.window, out.second.data());
    for (int h = 0; h < e.group; ++h)
      for (size_t i = 0; i < n; ++i) out.weight[i] += e.l1_row(h)[i] / static_cast<float>(e.group);

    const int from = first_row(e, rule_.window), rows = e.rows - from;
    std::vector<std::vector<float>> best(static_cast<size_t>(e.group));
    std::vector<double> near_window(static_cast<size_t>(e.group), 0.0);
    e.pool->parallel_for(e.group, [&](int64_t h, int) {
      auto& top = best[static_cast<size_t>(h)];
      top.assign(n, 0.0f);
      for (int t = from; t < e.rows; ++t) {
        const float* row = e.prob_row(static_cast<int>(h), t);
        const std::vector<float> pooled = average_pool(std::vector<float>(row, row + n), kernel_);
        double before = 0, after = 0;
        for (size_t i = 0; i < n; ++i) {
          before += row[i];
          after += pooled[i];
        }
        const float scale = after > 0 ? static_cast<float>(before / after) : 0.0f;  // pooling leaks mass at the ends
        for (size_t i = 0; i < n; ++i) top[i] = std::max(top[i], pooled[i] * scale);
        for (size_t i = n - std::min(n, static_cast<size_t>(rule_.window)); i < n; ++i) near_window[static_cast<size_t>(h)] += row[i];
      }
    });
    for (const auto& top : best)
      for (size_t i = 0; i < n; ++i) out.score[i] = std::max(out.score[i], top[i]);
    double sum = 0;
    for (float s : out.score) sum += s;
    const float mean = static_cast<float>(sum / static_cast<double>(n));
    for (float& s : out.score) s = std::max(s, mean);
    for (double x : near_window) layer.spread += x / std::max(1, rows) / e.group;
  }

  void finish_layer(LayerScores& layer) const override {
    const auto sums = sum_over_heads(layer, &HeadScores::weight);
    layer.peak = 0;
    // The authors' code takes this share of the attention off the mass that the first stage collects.
    const double enough = mass_ - (mass_ > 0 ? layer.spread / static_cast<double>(std::max<size_t>(1, layer.heads.size())) : 0);
    for (size_t h = 0; h < layer.heads.size(); ++h) {
      HeadScores& head = layer.heads[h];
      for (size_t i = 0; i < head.score.size(); ++i) {
        if (sums[h][i] > 0) head.score[i] *= static_cast<float>(head.weight[i] / sums[h][i]);
        layer.peak = std::max(layer.peak, head.score[i]);
      }
      head.weight.clear();
      rank_first_stage(head, enough);
    }
  }

  // The first stage's tokens of each head, as many as it may keep on average, get the layer's top score.
  void apply_quota(LayerScores& layer, double mean_candidates) const override {
    for (HeadScores& head : layer.heads) {
      for (size_t i = 0; i < head.score.size(); ++i)
        if (static_cast<double>(head.second[i]) < std::floor(mean_candidates)) head.score[i] = layer.peak;
      head.second.clear();
    }
  }

 private:
  // Replaces mean attention in `second` by its rank from the top as long as the attention collected
  // before stays below `enough` of the head's; all others get infinity.
  static void rank_first_stage(HeadScores& head, double enough) {
    std::vector<size_t> order(head.second.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return head.second[a] > head.second[b]; });
    double total = 0, mass = 0;
    for (float a : head.second) total += a;
    std::vector<float> rank(head.second.size(), std::numeric_limits<float>::infinity());
    for (size_t r = 0; r < order.size(); ++r) {
      mass += head.second[order[r]];
      if (!(mass < enough * total)) break;
      rank[order[r]] = static_cast<float>(r);
    }
    head.second = std::move(rank);
  }

  int kernel_;
  double mass_;
};

}  // namespace

PolicyPtr make_layer_defensive(PolicyOptions& options) { return std::make_shared<LayerDefensive>(options); }

}  // namespace lacuna

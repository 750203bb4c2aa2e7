// LaProx: attention's column length times the projected value's length, compared over the whole model
// (arXiv 2605.07234). Every choice the paper leaves open is a switch; docs/policies.md names them.
#include <cmath>

#include "evict/columns.h"
#include "evict/policies/policies.h"

#include "base/error.h"

namespace lacuna {
namespace {

enum class Group : uint8_t { kScoreMean, kAttentionMean, kExact, kScoreMax };
enum class PoolAt : uint8_t { kScore, kAttention, kNone };
enum class Normalise : uint8_t { kLayerSum, kNone, kOutput };
enum class ValueLength : uint8_t { kProjected, kProjectedL1, kNone };

constexpr std::string_view kGroups[] = {"score_mean", "attn_mean", "exact", "score_max"};
constexpr std::string_view kPoolAt[] = {"score", "attention", "none"};
constexpr std::string_view kNormalise[] = {"layer_sum", "none", "output"};
constexpr std::string_view kReduce[] = {"l2", "mean", "max"};
constexpr std::string_view kValue[] = {"projected", "projected_l1", "none"};
constexpr std::string_view kScopes[] = {"model", "layer", "head"};
constexpr std::string_view kFloor[] = {"none", "head_mean"};

class LaProx : public NamedPolicy {
 public:
  LaProx(PolicyOptions& options, Group group, Normalise normalise) {
    group_ = static_cast<Group>(options.choice("gqa", kGroups, static_cast<int>(group)));
    pool_at_ = static_cast<PoolAt>(options.choice("pool_at", kPoolAt));
    kernel_ = options.odd("pool_kernel", 7);
    normalise_ = static_cast<Normalise>(options.choice("normalise", kNormalise, static_cast<int>(normalise)));
    reduce_ = static_cast<WindowReduce>(options.choice("window_reduce", kReduce));
    value_ = static_cast<ValueLength>(options.choice("value", kValue));
    floor_ = options.choice("floor", kFloor) == 1;
    rule_.window = options.integer("window", 32, 1, 1024);
    rule_.sinks = options.integer("sinks", 0, 0, 1024);
    rule_.counts_window = options.flag("budget_counts_window", true);
    constexpr Scope kScope[] = {Scope::kModel, Scope::kLayer, Scope::kHead};
    rule_.scope = kScope[options.choice("scope", kScopes)];
    rule_.guarantee = options.number("guarantee", 0, 0, 1);
    options.done();
    if (group_ == Group::kExact && (pool_at_ == PoolAt::kAttention || value_ != ValueLength::kProjected))
      throw BadInput("policy laprox: gqa=exact has no attention factor of its own, so it takes neither pool_at=attention nor "
                     "value={}", kValue[static_cast<size_t>(value_)]);
    name_ = options.canonical();
  }

  PolicyNeeds needs() const override {
    PolicyNeeds needs;
    needs.window_rows = rule_.window;
    needs.projected_norms = group_ != Group::kExact && value_ == ValueLength::kProjected;
    needs.projected_l1 = group_ != Group::kExact && value_ == ValueLength::kProjectedL1;
    needs.projected_products = group_ == Group::kExact;
    needs.output_norm = normalise_ == Normalise::kOutput;
    return needs;
  }

  void score(const HeadEvidence& e, HeadScores& out, LayerScores& layer) const override {
    out.score.resize(static_cast<size_t>(e.candidates));
    if (group_ == Group::kExact)
      for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) { exact(e, begin, end, out.score.data() + begin); });
    else if (pool_at_ == PoolAt::kAttention)
      pooled_attention(e, out.score);
    else
      for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) { product(e, begin, end, out.score.data() + begin); });
    if (pool_at_ == PoolAt::kScore) out.score = average_pool(out.score, kernel_);
    if (floor_ && e.candidates > 0) {
      double sum = 0;
      for (float s : out.score) sum += s;
      const float mean = static_cast<float>(sum / static_cast<double>(e.candidates));
      for (float& s : out.score) s = std::max(s, mean);
    }
    // One head's evicted column costs at most c u, a group's at most r times the mean of its heads'.
    if (value_ == ValueLength::kProjected && reduce_ == WindowReduce::kL2 && !floor_)
      layer.bound_scale = group_ == Group::kExact ? 1 : group_ == Group::kAttentionMean ? 0 : e.group;
  }

  void finish_layer(LayerScores& layer) const override {
    double total = 0;
    for (const HeadScores& head : layer.heads)
      for (float s : head.score) total += s;
    layer.bound_scale *= total;
    const double scale = normalise_ == Normalise::kLayerSum ? total : normalise_ == Normalise::kOutput ? layer.output_norm : 1;
    if (!(scale > 0)) return;
    const float factor = static_cast<float>(1 / scale);
    for (HeadScores& head : layer.heads)
      for (float& s : head.score) s *= factor;
  }

 private:

  void attention_of_mean_head(const HeadEvidence& e, int64_t begin, int64_t end, float* out) const {
    const int64_t n = end - begin;
    float mean[kColumnBlock];
    std::fill(out, out + n, 0.0f);
    const int from = first_row(e, rule_.window);
    for (int t = from; t < e.rows; ++t) {
      std::fill(mean, mean + n, 0.0f);
      for (int h = 0; h < e.group; ++h) add_scaled(e.prob_row(h, t) + begin, 1.0f / static_cast<float>(e.group), n, mean);
      if (reduce_ == WindowReduce::kL2) add_squares(mean, n, out);
      if (reduce_ == WindowReduce::kMean) add_scaled(mean, 1.0f, n, out);
      if (reduce_ == WindowReduce::kMax) take_largest(mean, n, out);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (reduce_ == WindowReduce::kL2) out[i] = std::sqrt(out[i]);
      if (reduce_ == WindowReduce::kMean) out[i] /= static_cast<float>(std::max(1, e.rows - from));
    }
  }

  // p from c already reduced: c [r or 1, n].
  void combine(const HeadEvidence& e, const float* c, int64_t stride, int64_t begin, int64_t end, float* out) const {
    const int64_t n = end - begin;
    std::fill(out, out + n, 0.0f);
    for (int h = 0; h < e.group; ++h) {
      const float* u = value_ == ValueLength::kProjected     ? e.norm_row(h) + begin
                       : value_ == ValueLength::kProjectedL1 ? e.l1_row(h) + begin
                                                             : nullptr;
      const float* a = group_ == Group::kAttentionMean ? c : c + h * stride;
      if (group_ == Group::kScoreMax)
        for (int64_t i = 0; i < n; ++i) out[i] = std::max(out[i], u ? a[i] * u[i] : a[i]);
      else if (u)
        add_products(a, u, n, out);
      else
        add_scaled(a, 1.0f, n, out);
    }
    if (group_ == Group::kScoreMax) return;
    const float scale = 1.0f / static_cast<float>(e.group);
    for (int64_t i = 0; i < n; ++i) out[i] *= scale;
  }

  void product(const HeadEvidence& e, int64_t begin, int64_t end, float* out) const {
    if (group_ == Group::kAttentionMean) {
      float c[kColumnBlock];
      attention_of_mean_head(e, begin, end, c);
      combine(e, c, 0, begin, end, out);
      return;
    }
    std::vector<float> c(static_cast<size_t>(e.group) * kColumnBlock);
    for (int h = 0; h < e.group; ++h) reduce_window(e, rule_.window, h, reduce_, begin, end, c.data() + h * kColumnBlock);
    combine(e, c.data(), kColumnBlock, begin, end, out);
  }

  void pooled_attention(const HeadEvidence& e, std::vector<float>& out) const {
    const int lists = group_ == Group::kAttentionMean ? 1 : e.group;
    std::vector<float> all(static_cast<size_t>(lists * e.candidates));
    std::vector<float> c(static_cast<size_t>(e.candidates));
    for (int h = 0; h < lists; ++h) {
      for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) {
        if (group_ == Group::kAttentionMean)
          attention_of_mean_head(e, begin, end, c.data() + begin);
        else
          reduce_window(e, rule_.window, h, reduce_, begin, end, c.data() + begin);
      });
      const std::vector<float> pooled = average_pool(c, kernel_);
      std::copy(pooled.begin(), pooled.end(), all.begin() + static_cast<std::ptrdiff_t>(h * e.candidates));
    }
    combine(e, all.data(), e.candidates, 0, e.candidates, out.data());
  }

  // ||sum over the group of A^h[:, i] (x) v_i W_O^h||_F, by the products of the projected values. With
  // window_reduce max or mean: the largest or mean length of one query's lost output.
  void exact(const HeadEvidence& e, int64_t begin, int64_t end, float* out) const {
    const int64_t n = end - begin;
    const int from = first_row(e, rule_.window);
    std::fill(out, out + n, 0.0f);
    if (reduce_ == WindowReduce::kL2) {
      squared_length(e, from, e.rows, begin, end, out);
      for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(std::max(0.0f, out[i]));  // a cancelled sum may round below zero
      return;
    }
    float length[kColumnBlock];
    for (int t = from; t < e.rows; ++t) {
      std::fill(length, length + n, 0.0f);
      squared_length(e, t, t + 1, begin, end, length);
      for (int64_t i = 0; i < n; ++i) length[i] = std::sqrt(std::max(0.0f, length[i]));
      if (reduce_ == WindowReduce::kMean)
        add_scaled(length, 1.0f / static_cast<float>(e.rows - from), n, out);
      else
        take_largest(length, n, out);
    }
  }

  // out += sum over rows [from, to) and pairs of heads of A^h A^h' (v W_O^h W_O^h'^T v^T).
  static void squared_length(const HeadEvidence& e, int from, int to, int64_t begin, int64_t end, float* out) {
    const int64_t n = end - begin;
    float inner[kColumnBlock];
    int pair = 0;
    for (int h = 0; h < e.group; ++h)
      for (int other = h; other < e.group; ++other, ++pair) {
        std::fill(inner, inner + n, 0.0f);
        for (int t = from; t < to; ++t) {
          if (other == h)
            add_squares(e.prob_row(h, t) + begin, n, inner);
          else
            add_products(e.prob_row(h, t) + begin, e.prob_row(other, t) + begin, n, inner);
        }
        add_products(inner, e.product_row(pair) + begin, n, out);
        if (other != h) add_products(inner, e.product_row(pair) + begin, n, out);  // the pair counts both ways
      }
  }

  Group group_;
  PoolAt pool_at_;
  Normalise normalise_;
  WindowReduce reduce_;
  ValueLength value_;
  int kernel_ = 7;
  bool floor_ = false;
};

}  // namespace

PolicyPtr make_laprox(PolicyOptions& options) {
  return std::make_shared<LaProx>(options, Group::kScoreMean, Normalise::kLayerSum);
}

// The length of what a layer's output loses with an entry, in one unit for all layers: neither the triangle
// bound over the group nor the paper's division by the layer's sum (docs/policies.md says what each costs).
PolicyPtr make_laprox_exact(PolicyOptions& options) {
  return std::make_shared<LaProx>(options, Group::kExact, Normalise::kNone);
}

}  // namespace lacuna

#pragma once

#include "evict/budget.h"
#include "evict/policy.h"

namespace lacuna {

// Chooses what stays. Holds the scores of the layers seen so far and drops, after each layer, every
// entry that can no longer be part of the final set: the top K of a union never holds an entry that
// is outside the top K of a part. What is left after the last layer is the one-shot set, tie for tie
// (higher score, then lower layer, lower head, lower position).
class Selection {
 public:
  // `sizes` are the lengths that every layer will have when it is scored.
  Selection(const SelectionRule& rule, const BudgetPlan& plan, const CacheSizes& sizes);

  // Adds a layer; layers come in ascending order, those without KV heads are left out.
  void add_layer(int layer, LayerScores scores);
  // Drops what the layers seen so far already exclude; `last`: they are all there. Rules that do not
  // stream (SelectionRule::streams) are shrunk once, at the end.
  void shrink(bool last);

  const LayerScores& layer(int l) const { return layers_[static_cast<size_t>(l)]; }
  // Model-wide selection: the score that the last entry to stay has; -infinity if nothing was dropped.
  float threshold() const { return threshold_; }
  // Sum of the kept scores of a layer over the sum of all its candidates'.
  double kept_share(int layer) const;

 private:
  void shrink_model(bool last);
  void shrink_layer(int layer, int64_t quota);
  void shrink_heads(int layer, const std::vector<int64_t>& quotas);
  void shrink_by_mass(int layer);
  void effective_scores(int layer, int64_t guaranteed);
  void second_stage(int layer, const std::vector<int64_t>& counts);
  std::vector<std::vector<int64_t>> quotas(bool last) const;

  SelectionRule rule_;
  BudgetPlan plan_;
  CacheSizes sizes_;
  int64_t heads_ = 0;
  std::vector<LayerScores> layers_;
  std::vector<int> seen_, waiting_;  // layers added; those of them that were never shrunk
  std::vector<std::vector<std::vector<float>>> effective_;  // [layer][head]: +infinity for what must stay
  std::vector<float> scratch_;
  float threshold_;
};

}  // namespace lacuna

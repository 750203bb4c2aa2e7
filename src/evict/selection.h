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

  // Adds a layer; layers come in ascending order, those without KV heads are skipped.
  void add_layer(int layer, LayerScores scores);
  // Drops what the layers seen so far already exclude. `last`: every layer is there.
  void shrink(bool last);

  const LayerScores& layer(int l) const { return layers_[static_cast<size_t>(l)]; }
  // The score below which (over the whole model) nothing was kept; -infinity if no such score exists.
  float threshold() const { return threshold_; }
  // Sum of the kept scores of a layer over the sum of all: 1 when nothing was dropped.
  double kept_share(int layer) const;

 private:
  void shrink_model(bool last);
  void shrink_layer(int layer, int64_t quota);
  void shrink_head(int layer, int head, int64_t quota);
  void shrink_by_mass(int layer);
  void second_stage(int layer, int head, const std::vector<int32_t>& order, int64_t quota);
  std::vector<int64_t> layer_quotas(bool last) const;

  SelectionRule rule_;
  BudgetPlan plan_;
  CacheSizes sizes_;
  std::vector<LayerScores> layers_;
  std::vector<int> seen_;
  float threshold_;
};

}  // namespace lacuna

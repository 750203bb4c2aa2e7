#pragma once

#include <memory>
#include <span>

#include "evict/budget.h"
#include "evict/evidence.h"
#include "evict/policy.h"
#include "evict/report.h"
#include "evict/selection.h"
#include "models/forward.h"

namespace lacuna {

// Scores one dense prefill with several policies and evicts nothing: one prefill serves every policy
// and budget of a prompt.
//   prefill(ctx, model, state, ids, &board, {}, nullptr);  board.finish(state, ids);
//   SequenceState small{state.kv.copy(ctx, board.select(p, budget)), state.recurrent.copy(ctx.memory), state.next_position};
// Window attention, value norms and all other evidence are computed once per KV head for all policies.
class ScoreBoard : public LayerObserver {
 public:
  using KeepMap = std::vector<std::vector<std::vector<int32_t>>>;  // [layer][KV head] ascending slots

  ScoreBoard(Context& ctx, Model& model, std::vector<std::shared_ptr<const Policy>> policies,
             std::shared_ptr<OutputProjections> projections = nullptr, bool measure_error = false);

  bool wants_raw_queries() const override { return needs_.raw_queries; }
  void on_chunk(const LayerTap& tap, SequenceState& state) override;
  void on_layer_end(int layer, SequenceState& state) override;
  // After prefill(): the second pass of policies that replay the prompt. The cache is as before afterwards.
  void finish(SequenceState& state, std::span<const int32_t> prompt, const std::vector<int32_t>& replay_prompt = {},
              const PrefillOptions& prefill = {});

  const Policy& policy(size_t index) const { return *policies_[index]; }
  // Slots that the policy keeps; all of them when the budget covers the prompt.
  KeepMap select(size_t index, const Budget& budget, const KvCache& cache, EvictionReport* report = nullptr) const;
  const LayerScores& scores(size_t index, int layer) const { return scores_[index][static_cast<size_t>(layer)]; }
  double score_seconds() const { return score_seconds_; }

 private:
  void score_layer(int layer, const SequenceState& state, int64_t next_position, bool replayed,
                   const std::vector<std::vector<float>>& attention);
  LayerWitness& witness(int layer);

  Context& ctx_;
  Model& model_;
  std::vector<std::shared_ptr<const Policy>> policies_;
  PolicyNeeds needs_;
  bool measure_error_;
  mutable EvidenceReader reader_;
  std::vector<LayerWitness> witnesses_;  // one, or one a layer when errors are measured
  std::vector<std::vector<LayerScores>> scores_;  // [policy][layer]
  int64_t prompt_tokens_ = 0, next_position_ = 0;
  double score_seconds_ = 0;
};

}  // namespace lacuna

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

struct EvictorOptions {
  bool during_decode = false;    // evict again, by the most recent queries, when generation outgrows the budget
  int64_t decode_block = 64;     // … once for so many new tokens
  size_t kv_limit = 0;           // hard limit in bytes on the cache at every moment; 0 = none
  size_t used_elsewhere = 0;     // bytes of that limit that other sequences hold
  // Also measure the true error of every layer's attention output over the window. Nothing is evicted
  // before the last layer then, so the cache is dense for a moment.
  bool measure_error = false;
  std::vector<int32_t> replay_prompt;  // kvzip: token ids of "repeat the context", read before each replayed chunk
};

// Evicts one sequence's cache while it is read. Give it to prefill() as the observer; layer-major
// prefill lets it drop earlier layers' entries as soon as they are out, so that the cache never holds
// more than the budget and one full layer. Kept as the observer of decode_step() it evicts again
// (during_decode). For question-agnostic use, prefill the context with it and the question without.
class Evictor : public LayerObserver {
 public:
  Evictor(Context& ctx, Model& model, std::shared_ptr<const Policy> policy, Budget budget, EvictorOptions options = {},
          std::shared_ptr<OutputProjections> projections = nullptr);

  // Says before anything runs whether budget and limits can be kept for a prompt of so many tokens,
  // followed by so many generated ones; throws BadInput or OutOfMemory. prefill() does it otherwise,
  // with no generated tokens.
  const BudgetPlan& plan(const SequenceState& state, int64_t prompt_tokens, int64_t new_tokens = 0);

  bool wants_raw_queries() const override { return needs_.raw_queries; }
  void on_chunk(const LayerTap& tap, SequenceState& state) override;
  void on_layer_end(int layer, SequenceState& state) override;
  // After prefill(). Policies that replay the prompt (kvzip) run their second pass and evict here;
  // for all others there is nothing left to do.
  void finish(SequenceState& state, std::span<const int32_t> prompt, const PrefillOptions& prefill = {});

  EvictionReport report(const SequenceState& state) const;

 private:
  void begin_call(const LayerTap& tap, SequenceState& state);
  void begin_round(const SequenceState& state, const CacheSizes& sizes);
  void score_layer(int layer, SequenceState& state);
  void evict_layers(SequenceState& state, bool last);
  void end_round(SequenceState& state);
  LayerWitness& witness(int layer);
  CacheSizes sizes_after(const SequenceState& state, int64_t new_tokens) const;

  Context& ctx_;
  Model& model_;
  std::shared_ptr<const Policy> policy_;
  Budget budget_;
  EvictorOptions options_;
  SelectionRule rule_;
  PolicyNeeds needs_;
  std::shared_ptr<OutputProjections> projections_;
  EvidenceReader reader_;
  int first_layer_ = -1, last_layer_ = -1;  // of those with attention

  bool planned_ = false, prefilled_ = false;
  BudgetPlan plan_;
  KvLimit limit_;
  bool streaming_ = true;
  std::vector<LayerWitness> witnesses_;   // one, or one a layer when later rounds or errors need them
  std::unique_ptr<Selection> selection_;  // a round in progress
  std::vector<std::vector<std::vector<int32_t>>> held_;  // [layer][head] slots, as scored, that the cache still holds
  int64_t tokens_since_round_ = 0;
  bool round_due_ = false;
  EvictionReport report_;
};

}  // namespace lacuna

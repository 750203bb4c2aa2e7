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
  int64_t question_tokens = 0;   // read after eviction, before anything is generated; what the limit must leave room for
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
  // followed by so many generated ones (and the question); throws BadInput or OutOfMemory. prefill()
  // does it otherwise, with no generated tokens.
  const BudgetPlan& plan(const SequenceState& state, int64_t prompt_tokens, int64_t new_tokens = 0);

  bool wants_raw_queries() const override { return needs_.raw_queries; }
  void on_chunk(const LayerTap& tap, SequenceState& state) override;
  void on_layer_end(int layer, SequenceState& state) override;
  // After prefill(). Policies that replay the prompt (kvzip) run their second pass and evict here;
  // for all others there is nothing left to do.
  void finish(SequenceState& state, std::span<const int32_t> prompt, const PrefillOptions& prefill = {});

  EvictionReport report(const SequenceState& state) const;

 private:
  void begin_call(const LayerTap& tap, const SequenceState& state);
  CacheSizes sizes_after(const SequenceState& state, int64_t first_position, int64_t tokens, bool visible_only) const;
  void begin_round(CacheSizes sizes, const BudgetPlan& plan);
  void score_layer(int layer, SequenceState& state);
  void add_scores(int layer, LayerScores scores, const SequenceState& state, int64_t next_position);
  void evict_layers(SequenceState& state);
  void measure_errors(SequenceState& state);
  void end_round(const SequenceState& state);
  LayerWitness& witness(int layer);
  std::vector<int32_t> kept_slots(int layer, int head) const;

  Context& ctx_;
  Model& model_;
  std::shared_ptr<const Policy> policy_;
  Budget budget_;
  EvictorOptions options_;
  SelectionRule rule_;
  PolicyNeeds needs_;
  EvidenceReader reader_;
  std::vector<int> attention_layers_;
  bool streaming_ = true;
  std::vector<LayerWitness> witnesses_;  // one, or one a layer when later rounds or errors need them

  bool planned_ = false, prefilled_ = false;
  BudgetPlan plan_;
  int64_t new_tokens_ = 0;
  int64_t tokens_since_round_ = 0;

  // The round in progress.
  struct Held {
    std::vector<int32_t> slots;     // as scored, that the cache still holds
    int32_t window_begin = 0, end = 0;  // of the slots that always stay
  };
  std::unique_ptr<Selection> selection_;
  double mean_candidates_ = 0;
  std::vector<std::vector<Held>> held_;  // [layer][head]; empty for layers not scored yet
  EvictionReport report_;
};

}  // namespace lacuna

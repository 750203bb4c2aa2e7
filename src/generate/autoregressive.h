#pragma once

#include "formats/config.h"
#include "generate/generator.h"
#include "text/tokenizer.h"

namespace lacuna {

// Token after token: layer-major prefill of each prompt (evicting as it goes, if asked), then one
// batched decode step for all sequences that are not finished.
class AutoregressiveGenerator : public Generator {
 public:
  // Prompts beyond the model's positions are BadInput. end_ids: generation ends after any of them.
  AutoregressiveGenerator(Context& ctx, Model& model, const Tokenizer& tokenizer, std::vector<int32_t> end_ids,
                          KvOptions kv, PrefillOptions prefill);

  std::vector<GenerateResult> generate(std::span<const GenerateRequest> requests,
                                       const GenerateCallbacks& callbacks = {}) override;
  const GenerateStats& stats() const override { return stats_; }

 private:
  struct Sequence;
  void check(const GenerateRequest& request) const;
  void read_prompt(Sequence& s, size_t index, const GenerateCallbacks& callbacks);
  void take(Sequence& s, size_t index, std::span<float> logits, const GenerateCallbacks& callbacks);
  void finish(Sequence& s, size_t index, FinishReason reason, const GenerateCallbacks& callbacks);

  Context& ctx_;
  Model& model_;
  const Tokenizer& tokenizer_;
  std::vector<int32_t> end_ids_;
  KvOptions kv_;
  PrefillOptions prefill_;
  std::shared_ptr<OutputProjections> projections_;  // computed once a model, shared by all evictors
  GenerateStats stats_;
};

}  // namespace lacuna

#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "eval/tasks.h"
#include "eval/variants.h"
#include "evict/score_board.h"
#include "generate/generator.h"
#include "models/forward.h"

namespace lacuna {

// The tokenizer as evaluation sees it.
struct TextCodec {
  EncodeFn encode;  // no special tokens
  std::function<std::string(std::span<const int32_t>)> decode;
  std::vector<int32_t> before;  // in front of every prompt: the model's begin-of-text, or none
  std::vector<int32_t> end;     // ids that end an answer
};

enum class FirstToken : uint8_t {
  kDense,  // the first answer token comes from the dense prefill, as in generation with eviction
  kRerun,  // the last prompt token is run again on the evicted cache, so that every answer token pays for what is gone
};

struct RunnerOptions {
  KvOptions kv;
  PrefillOptions prefill;
  FirstToken first_token = FirstToken::kDense;
  // The context is compressed before the question is known, then the question is read. Reported apart.
  bool query_agnostic = false;
  std::string replay_prompt = "\n\nRepeat the previous context exactly.\n";  // kvzip reads it before each chunk
};

struct VariantResult {
  double score = 0;
  std::string answer;
  size_t kv_bytes = 0;   // of the prompt's slots, in the variant's format
  int64_t kv_slots = 0;  // entries kept of the prompt, all layers and heads
};

struct PromptResult {
  std::string task;
  int64_t length = 0, index = 0;
  double depth = -1, asked_depth = -1;
  int64_t prompt_tokens = 0;
  size_t full_bytes = 0;               // of the whole prompt's slots in the cache's own format
  std::vector<VariantResult> variants;  // as the runner's list
  double prefill_seconds = 0, score_seconds = 0, decode_seconds = 0;
};

// Serves every policy and budget of a prompt from one dense layer-major prefill, then decodes all of
// them as one batch.
class PromptRunner {
 public:
  PromptRunner(Context& ctx, Model& model, TextCodec codec, std::vector<Variant> variants, RunnerOptions options);

  PromptResult run(const TaskPrompt& prompt);
  const std::vector<Variant>& variants() const { return variants_; }

 private:
  SequenceState make_state(size_t variant, const SequenceState& dense, const ScoreBoard& board, VariantResult& out);
  void decode(const TaskPrompt& prompt, std::vector<SequenceState>& states, std::vector<int32_t> next, bool next_is_answer,
              PromptResult& out);

  Context& ctx_;
  Model& model_;
  TextCodec codec_;
  std::vector<Variant> variants_;
  RunnerOptions options_;
  std::vector<size_t> policy_of_;                        // [variant]; of no meaning for the full cache
  std::vector<std::shared_ptr<const Policy>> policies_;  // each once, whatever its budgets; fills policy_of_
  std::shared_ptr<OutputProjections> projections_;
};

// A prompt through any Generator, greedily: the one variant is its whole cache.
PromptResult run_generated(Generator& generator, const TaskPrompt& prompt, const GenerateCallbacks& callbacks = {});

// Greedy choice; of equals, the lowest id.
int32_t most_likely(const float* logits, int64_t vocab);

// Policies of `variants`, each once, and for each variant the index of its own.
std::vector<std::shared_ptr<const Policy>> collect_policies(const std::vector<Variant>& variants, std::vector<size_t>& policy_of);

// A variant's own cache, cut from a dense one.
KvCache variant_cache(Context& ctx, const Variant& variant, size_t policy, const SequenceState& dense, const ScoreBoard& board);

}  // namespace lacuna

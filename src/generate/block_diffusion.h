#pragma once

#include <memory>

#include "generate/generator.h"
#include "generate/noise.h"
#include "models/cola.h"
#include "text/tokenizer.h"

namespace lacuna {

struct DiffusionParams {
  int steps = 16;       // Euler steps a block, 1 … 1000
  float guidance = 7;   // v = v_uncond + guidance * (v_cond - v_uncond)
  TimestepRounding timesteps = TimestepRounding::kBf16;  // as published results were made
  // As the published script generates (docs/cola.md): whole blocks, no cut at end-of-text, special tokens in the text,
  // repetition penalty over the blocks emitted so far, the batch stops as one. Else each sequence ends on its own at an
  // end-of-text id, a stop string or max_new_tokens.
  bool official = false;
  int32_t pad_id = -1;  // fills the prompt's last block where the encoder looks ahead; -1: the tokenizer's, else the last id
  std::shared_ptr<const NoiseFile> noise;  // request i of a call takes sequence first_noise + i; null: from its seed
  size_t first_noise = 0;
};
void validate(const DiffusionParams& params);

// One Euler step of one sequence; spans are [block, latent_dim] and valid during the call.
struct DenoiseStep {
  size_t request = 0;
  int64_t block = 0;  // 0 is the first that is not all prompt
  int step = 0;
  std::span<const float> x;                // before the step, known positions pinned
  std::span<const float> v_cond, v_uncond;  // v_uncond is empty where guidance does not apply
  std::span<const float> v;                // what the step took: next = x - (t - t_next) * v, known positions pinned
  std::span<const float> next;
};

// Watches the loop, for tests and tools.
class DiffusionObserver {
 public:
  virtual ~DiffusionObserver() = default;
  // z [latents, latent_dim] of the prompt's (and infill's) positions, as the DiT takes them.
  virtual void on_prompt(size_t request, std::span<const float> z) {}
  virtual void on_step(const DenoiseStep& step) {}
  // A block is done: clean latents [block, latent_dim] and logits [block * patch, vocab] before penalty and sampling.
  virtual void on_block(size_t request, int64_t block, std::span<const float> z, std::span<const float> logits) {}
};

// Block after block: noise is carried to clean latents in `steps` Euler steps, conditioned on the clean latents before
// it, then the VAE's decoder names all of the block's tokens at once. All live sequences share each pass over the
// weights, conditional and unconditional rows together; a finished block is committed in the next one's first pass.
class BlockDiffusionGenerator : public Generator {
 public:
  // tokenizer may be null: texts are empty then, and stop strings BadInput. end_ids: end-of-text, any of them.
  BlockDiffusionGenerator(Context& ctx, ColaModel& model, const Tokenizer* tokenizer, std::vector<int32_t> end_ids,
                          KvOptions kv, DiffusionParams params);

  // Requests with eviction or a stored state, and callbacks.on_read, are BadInput: there is nothing to evict, and
  // no SequenceState.
  std::vector<GenerateResult> generate(std::span<const GenerateRequest> requests,
                                       const GenerateCallbacks& callbacks = {}) override;
  const GenerateStats& stats() const override { return stats_; }

  const DiffusionParams& params() const { return params_; }
  void set_params(const DiffusionParams& params);
  void observe(DiffusionObserver* observer) { observer_ = observer; }  // null: nobody

 private:
  struct Sequence;
  struct Ledger;
  void check(const GenerateRequest& request, const GenerateCallbacks& callbacks) const;
  void make_timesteps();
  std::vector<int32_t> encoder_ids(const GenerateRequest& request) const;
  void read_prompts(std::span<Sequence* const> group, const GenerateCallbacks& callbacks);
  void start_block(Sequence& s);
  void denoise(std::span<Sequence* const> live, const GenerateCallbacks& callbacks);
  void step(std::span<Sequence* const> live, int k);
  void show(std::span<Sequence* const> live, int k, const GenerateCallbacks& callbacks);
  void decode(std::span<Sequence* const> live, const GenerateCallbacks& callbacks);
  void emit(Sequence& s, std::span<float> logits, const GenerateCallbacks& callbacks);
  void emit_official(Sequence& s, std::span<float> logits, const GenerateCallbacks& callbacks);
  void push(Sequence& s, int32_t id, const GenerateCallbacks& callbacks);
  void finish(Sequence& s, FinishReason reason, const GenerateCallbacks& callbacks);
  bool official_end(std::span<const std::unique_ptr<Sequence>> all) const;

  Context& ctx_;
  ColaModel& model_;
  const Tokenizer* tokenizer_;
  std::vector<int32_t> end_ids_;
  KvOptions kv_;
  DiffusionParams params_;
  DiffusionObserver* observer_ = nullptr;
  std::vector<float> t_;                  // grid [steps + 1], noise to clean
  std::unique_ptr<TimestepTable> table_;  // of the grid as rounding_ says; its last row is the clean timestep
  TimestepRounding rounding_ = TimestepRounding::kNone;
  GenerateStats stats_;
};

// t_k = 1000 (1 - k / steps), k = 0 … steps, in float as the published script makes them.
std::vector<float> diffusion_grid(int steps);

}  // namespace lacuna

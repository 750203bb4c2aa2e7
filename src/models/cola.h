// Cola DLM (arXiv 2605.06548): a text VAE and a block-causal diffusion Transformer (DiT) over its latents.
// Formulas and tensor names: ByteDance-Seed/Cola-DLM, cola_dlm/modeling_cola_{vae,dit}.py.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "cache/kv_cache.h"
#include "formats/cola_config.h"
#include "models/model.h"

namespace lacuna {

// What the model remembers of one sequence: keys and values (rotated) of the clean latents so far, of the DiT and of
// the VAE's decoder. Position of a latent = its index. Moves; copy() has its own memory.
struct ColaState {
  KvCache dit, vae;
  int64_t history = 0;  // latents that the DiT remembers
  int64_t decoded = 0;  // latents that the decoder remembers; may run ahead of, or behind, `history`
  ColaState copy(Context& ctx) const { return {dit.copy(ctx), vae.copy(ctx), history, decoded}; }
};

// Consecutive rows of one sequence in a batch: the batch's rows are those of its entries, one after the other.
// With a state, row i stands at position (history or decoded) + i and sees what the state remembers; without one, at
// position i and sees nothing but these rows (RoPE is relative: nothing else would change at another multiple of the
// block size). Within, attention is causal by blocks of positions.
struct LatentRows {
  ColaState* state = nullptr;  // null: no history, and none is kept. A state may stand in a call once.
  int64_t rows = 0;
  int64_t keep = 0;            // so many rows, from the first, are appended to the state; the others leave room alone
};

// Adaptive layer norm's shifts, scales and gates of every layer for a fixed set of timesteps, so that the weights
// that make them (a third of the DiT) are read once and not in the loop. 4 * (6 * layers + 2) * dim bytes a timestep.
class TimestepTable {
 public:
  int count() const { return static_cast<int>(timesteps_.size()); }
  // As the sinusoid saw them, rounded if asked for.
  std::span<const float> timesteps() const { return timesteps_; }
  // [count, 6 * dim] of a layer: attention's shift, scale and gate, then the feed-forward's.
  const float* layer(int layer) const { return values_.as<float>() + static_cast<size_t>(layer) * timesteps_.size() * 6 * dim_; }
  // [count, 2 * dim]: shift and scale of the final norm.
  const float* final() const { return layer(layers_); }
  // [count, dim] embeddings that all of them were made of.
  const float* embedding() const { return embedding_.as<float>(); }

 private:
  friend class ColaModel;
  std::vector<float> timesteps_;
  size_t dim_ = 0;
  int layers_ = 0;
  Buffer values_, embedding_;  // tag kActivations
};

// What a timestep is rounded to before its sinusoid is formed. The published code runs under bf16: half to even.
enum class TimestepRounding : uint8_t { kNone, kBf16 };

struct ColaInfo {
  ColaConfig config;
  int64_t vae_parameters = 0, dit_parameters = 0;
  DType weight_dtype = DType::kF32;  // of the DiT's matrices, as held
  size_t weight_bytes = 0;           // of everything, as held in memory or mapped
  // Weights that one call reads, whatever its rows: a velocity, a decode of logits, a decode that only appends,
  // an encode (without the rows of the embedding), make_timesteps.
  size_t velocity_bytes = 0, decode_bytes = 0, append_bytes = 0, encode_bytes = 0, timestep_bytes = 0;
};

// A named intermediate result of some rows of a call, for tests and tools.
struct ColaTap {
  const char* part = "";  // "encoder", "decoder" or "dit"
  // "hidden": the residual stream after the layer (layer -1: before the first). "q", "k" before RoPE, "attn", "mlp":
  // what the two halves of a layer put out, before gates and norms of it.
  const char* name = "";
  int layer = 0;
  int64_t first_row = 0;  // of the call's batch that data holds
  int64_t rows = 0, width = 0, stride = 0;
  const float* data = nullptr;  // [rows, width], rows `stride` floats apart
};
class ColaObserver {
 public:
  virtual ~ColaObserver() = default;
  virtual void on_tensor(const ColaTap& tap) = 0;
};

// Loaded weights, and what all sequences share. Calls run one after the other (as a Context's ops do).
// A row's result does not depend on the other sequences of its call but for linear()'s choice between its small-M and
// large-M bodies (kernels/linear.h), nor on the number of threads.
// Errors: BadInput for sizes and ids that do not fit; CorruptData for results that are not finite (checked on means,
// velocities and logits).
class ColaModel {
 public:
  // Weights as stored (f32, f16, bf16, or int8 with a scale a row) or quantised at load; both model folders are in the
  // Hugging Face layout, sharded or not. `block`, if not 0, replaces the DiT's block_size.
  // options.spikes and options.window mean nothing here; spikes are Unsupported.
  static std::unique_ptr<ColaModel> load(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options = {},
                                         int64_t block = 0);
  ~ColaModel();

  const ColaInfo& info() const;
  const ColaConfig& config() const { return info().config; }
  ColaState new_state(MemoryAccount& account, const KvOptions& options = {}) const;

  // Posterior of each sequence's latents: ids one after the other, lengths[i] of sequence i, each a multiple of
  // patch (the published code pads to whole DiT blocks; with a VAE block of 1 padding changes nothing before it, with
  // others it does). Ids 0 … vocab, the last being training's mask token. mean, logvar [sum of lengths / patch,
  // latent_dim]; logvar, clamped to [-30, 20], may be null. Not yet what the DiT takes: to_prior(). The encoder's keys and
  // values, f32 and charged to kKv, live as long as the call.
  void encode(Context& ctx, std::span<const int32_t> ids, std::span<const int64_t> lengths, float* mean, float* logvar);
  // (z - shifting_factor) * scaling_factor, in place.
  void to_prior(std::span<float> latents) const;

  // Logits [rows * patch, vocab] of latents z [rows, latent_dim]: row i * patch + p is token p of latent i itself (not
  // the next one). Null logits: only appends, and neither head nor what does not reach a cache is computed.
  void decode(Context& ctx, const float* z, std::span<const LatentRows> rows, float* logits);

  // One sweep over the adaptive norms' weights for all of t (0, clean, to 1000, noise).
  TimestepTable make_timesteps(Context& ctx, std::span<const float> t,
                               TimestepRounding rounding = TimestepRounding::kNone);

  // Velocity v [M, latent_dim] (towards noise: z1 - z0) of x [M, latent_dim], row i at timestep[i], an index into the
  // table. One sweep over the weights for all rows of up to kChunkRows; kept rows should be at timestep 0.
  // So conditional and unconditional rows of many sequences run together, and so may a clean block (kept) together
  // with the noise of the block after it (16 sweeps a block at 16 steps).
  // Null v: only appends; what does not reach a cache is not computed.
  void velocity(Context& ctx, const TimestepTable& table, std::span<const int32_t> timestep, const float* x,
                std::span<const LatentRows> rows, float* v);

  // Rows that one sweep takes; longer calls are cut between blocks, but a sequence without a state never is.
  static constexpr int64_t kChunkRows = 512;

  void observe(ColaObserver* observer);  // null: nobody

 private:
  struct Body;
  explicit ColaModel(std::unique_ptr<Body> body);
  std::unique_ptr<Body> body_;
};

}  // namespace lacuna

// models: one file an architecture, a registry, and the layer-major walk over a model.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/kv_cache.h"
#include "cache/recurrent_state.h"
#include "kernels/linear.h"
#include "models/spike_coding.h"

namespace lacuna {

// What an attention layer looks like from outside: all that scoring a cached token needs.
struct AttentionLayer {
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
  int64_t window = 0;  // sliding window in tokens, the query's own included; 0 = full attention
  LinearWeight output;  // o_proj [D, H*d]: columns h*d … (h+1)*d multiply query head h
  std::span<const float> inv_freq;  // RoPE angles per position [d/2]
  float rope_factor = 1;            // multiplies cos and sin (yarn)
};

struct ModelInfo {
  std::string architecture;  // config.json's model_type
  int layers = 0;
  int64_t hidden = 0, vocab = 0, max_positions = 0;
  int64_t parameters = 0;
  DType weight_dtype = DType::kF32;  // of the layers' matrices, as held
  size_t weight_bytes = 0;         // as held in memory or mapped
  size_t token_weight_bytes = 0;   // weights that one decode step must read (all but the embedding table's other rows)
};

struct KvOptions {
  DType dtype = DType::kF32;
  int page_slots = 32;
};

// All that a model remembers of one sequence.
struct SequenceState {
  KvCache kv;
  RecurrentState recurrent;   // of layers with a state instead of, or beside, keys and values
  int64_t next_position = 0;  // original position of the next token
  // A snapshot: a prefix kept for reuse, with its own memory.
  SequenceState copy(Context& ctx) const { return {kv.copy(ctx), recurrent.copy(ctx.memory), next_position}; }
};

// One sequence's rows in a batch: `tokens` new tokens at positions first_position, …
struct BatchRows {
  SequenceState* state = nullptr;
  int64_t first_row = 0;
  int64_t tokens = 0;
  int64_t first_position = 0;
  int64_t sequence_length = 0;  // positions in all once this whole call (every chunk of it) is done: dynamic RoPE
};

// What one attention layer shows of one chunk of one sequence.
struct LayerTap {
  int layer = 0;
  int64_t first_token = 0;  // index of row 0 among this call's tokens
  int64_t tokens = 0;
  int64_t call_tokens = 0;  // tokens of the whole call
  int64_t first_position = 0;
  const float* q_raw = nullptr;  // [T, H, d] before RoPE, after any q norm; only if wants_raw_queries()
  const float* q = nullptr;      // [T, H, d] after RoPE
  const float* mixed = nullptr;  // [T, H, d] attention output before o_proj
  // [T, H]: the part of each query's probability that falls on the cache's slots; null: all of it. The rest is on
  // sinks, which no cache holds.
  const float* cache_share = nullptr;
};

// A named intermediate result of one layer for one chunk of one sequence, for activation capture.
struct TensorTap {
  const char* name = "";  // "normed", "q", "k", "v", "o", "resid_mid", …: the architecture's own words
  int layer = 0;
  int64_t first_token = 0;  // index of row 0 among this call's tokens
  int64_t tokens = 0;
  int64_t width = 0;
  const float* data = nullptr;  // [tokens, width]
};

// Spike counts of one place in a layer for one chunk of one sequence.
struct SpikeTap {
  int layer = 0;
  SpikeSite site = SpikeSite::kAttnIn;
  int64_t first_token = 0;  // index of row 0 among this call's tokens
  int64_t tokens = 0;
  SpikeBatch counts;        // a row a token, or a query head of a token
  int64_t fan_out = 0;      // outputs of all coded linear layers that take these counts
};

// Watches, and may evict, while a sequence runs through the layers. Serves prefill and decode.
class LayerObserver {
 public:
  virtual ~LayerObserver() = default;
  virtual bool wants_raw_queries() const { return false; }
  virtual void on_chunk(const LayerTap& tap, SequenceState& state) {}
  // All of the call's tokens are through `layer`; its keys and values are in the cache and may be evicted.
  virtual void on_layer_end(int layer, SequenceState& state) {}
  // Residual stream [tokens, D] after embedding (layer = -1) and after each layer; after the last layer
  // the final norm is applied first, as Hugging Face's hidden_states do.
  virtual bool wants_hidden() const { return false; }
  virtual void on_hidden(int layer, int64_t first_token, int64_t tokens, const float* hidden) {}
  // What a layer computes on its way.
  virtual bool wants_tensors() const { return false; }
  virtual void on_tensor(const TensorTap& tap) {}
  // What a layer's coded inputs fired.
  virtual bool wants_spikes() const { return false; }
  virtual void on_spikes(const SpikeTap& tap) {}
};

// A loaded architecture. forward_layer is the same function for prefill chunks and for decode.
class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelInfo& info() const = 0;
  // nullptr for a layer that has no attention with keys and values.
  virtual const AttentionLayer* attention(int layer) const = 0;
  virtual SequenceState new_state(MemoryAccount& account, const KvOptions& options) const = 0;

  // hidden [count, D]
  virtual void embed(Context& ctx, std::span<const int32_t> ids, float* hidden) const = 0;
  // One layer over all rows of `hidden` [rows, D], in place; reads and extends each sequence's state.
  // observers[i] (or null) watches rows[i]; first_token is the chunk's offset for taps.
  virtual void forward_layer(Context& ctx, int layer, float* hidden, int64_t row_count, std::span<const BatchRows> rows,
                             std::span<LayerObserver* const> observers, int64_t first_token, int64_t call_tokens) = 0;
  // Final norm, in place allowed: out [m, D].
  virtual void final_norm(Context& ctx, const float* hidden, int64_t m, float* out) const = 0;
  // logits [m, V] from normed rows [m, D].
  virtual void head(Context& ctx, const float* normed, int64_t m, float* logits) const = 0;
};

enum class WeightMode : uint8_t { kStored, kInt8 };

// Where stored weights lie: kMapped, the file's own pages, shared between processes and the system's to take back,
// of 4 KB each; kCopied, read into the account's memory in pages of 2 MB, which streams up to twice as fast
// (bench/NOTES.md); kAuto, copied if the files take at most half of what the account may allocate.
// Weights quantised at load and weights of spike counts, which are packed, are never copied first.
enum class WeightPlace : uint8_t { kMapped, kCopied, kAuto };

// Keys that a query of a sliding-window layer of width W sees, itself included, in models whose
// published code disagrees with itself (SpikingBrain). kConfig: what config.json says, or kOfficial.
enum class WindowRule : uint8_t {
  kConfig,
  kOfficial,  // W + 1 in a call that starts a sequence, W in later calls: Hugging Face's flash path
  kExact,     // W
  kPlusOne,   // W + 1: the vLLM plugin
};

struct LoadOptions {
  WeightMode weights = WeightMode::kStored;
  WeightPlace place = WeightPlace::kMapped;
  WindowRule window = WindowRule::kConfig;
  SpikeOptions spikes;
  bool check_finite = true;  // reads every weight once and refuses NaN and infinity
};

// Loads a model directory in the Hugging Face layout. Weights are charged to kWeights, mapped or not.
std::unique_ptr<Model> load_model(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options = {});

// A model by its config.json alone: what it is, without reading a weight.
struct ModelOutline {
  std::string architecture;
  int layers = 0;
  int64_t hidden = 0, intermediate = 0, vocab = 0, max_positions = 0;
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  bool tied_embeddings = false;
  double rope_theta = 0;
  std::vector<int32_t> eos_ids;
  int attention_layers = 0;  // with keys and values
  int window_layers = 0;     // … of which so many see a sliding window
  int64_t window = 0;        // of the widest of them
  int recurrent_layers = 0;
  int64_t state_bytes = 0;   // recurrent states of one sequence
  int expert_layers = 0;     // with a mixture of experts
  int experts = 0, experts_per_token = 0, shared_experts = 0;  // in each of them: routed, of those run, always on
  int sinks = 0;             // learnable tokens before the text
};
ModelOutline outline_model(const std::filesystem::path& dir);

// model_type values that load_model knows.
std::vector<std::string> known_architectures();

}  // namespace lacuna

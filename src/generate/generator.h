#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "evict/evictor.h"
#include "formats/sampling_params.h"
#include "models/state_file.h"

namespace lacuna {

// How a request's cache is held small; see docs/policies.md for policies and budgets.
struct EvictionRequest {
  std::string policy;  // "laprox", "snapkv", "laprox:gqa=exact", …
  std::string budget;  // "5%", "256", "64MiB", "mass:0.99"
  bool during_decode = false;       // evict again when generation outgrows the budget
  std::vector<int32_t> question;    // non-empty: the prompt is compressed first, then this is read (question-agnostic)
};

struct GenerateRequest {
  std::vector<int32_t> prompt;
  const StoredState* after = nullptr;  // read before the prompt, once for all requests that name it; outlives the call
  SamplingParams sampling;
  std::optional<EvictionRequest> eviction;
  // Block diffusion only: what stands after the prompt, an id where it is given and -1 where it is to be generated.
  // All of it is the result, and its end is the text's: max_new_tokens, stop strings and end-of-text ids do not count.
  std::vector<int32_t> infill;
};

enum class FinishReason : uint8_t { kEndOfText, kStopString, kLength, kContextFull };
std::string_view finish_reason_name(FinishReason reason);

struct GenerateResult {
  std::vector<int32_t> ids;  // generated ids, end-of-text excluded
  std::string text;          // decoded, cut before a stop string
  FinishReason finish = FinishReason::kLength;
  double prefill_seconds = 0;
  int64_t prompt_tokens = 0;       // read in this call
  size_t kv_bytes = 0;             // allocated to this sequence when it finished
  int64_t kv_slots = 0;
  size_t state_bytes = 0;          // recurrent states
  std::optional<EvictionReport> eviction;
};

// What block diffusion did beside GenerateStats.
struct DiffusionStats {
  int64_t blocks = 0;          // denoised, over all sequences
  int64_t sweeps = 0;          // passes over the DiT's weights to denoise and commit blocks
  int64_t rows = 0;            // latents in those passes
  double timestep_seconds = 0; // adaptive norms of all timesteps, once for a generator and grid
  double encode_seconds = 0, prefill_seconds = 0;  // prompts: the VAE's encoder; both caches
  double denoise_seconds = 0, decode_seconds = 0;  // the block loop: the DiT; the VAE's decoder
  OpTotals prefill_ops, denoise_ops, vae_ops;      // encoder and caches; DiT; decoder. Empty as decode_ops is
};

struct GenerateStats {
  double decode_seconds = 0;
  int64_t decode_steps = 0;    // batched steps; block diffusion: passes over the DiT's weights
  int64_t decode_tokens = 0;   // tokens produced in those steps
  OpTotals decode_ops;         // operators of the decode steps; empty when the context has a ledger of its own
  size_t kv_peak_bytes = 0;    // all sequences, prefill and decode
  size_t kv_now_bytes = 0;
  std::optional<DiffusionStats> diffusion;
};

struct GenerateCallbacks {
  // Newly decoded text of one request; whole UTF-8 characters only.
  std::function<void(size_t request, std::string_view text)> on_text;
  std::function<void(size_t request, int64_t done, int64_t total)> on_prefill;
  // A prompt is read; `ids` are all tokens that the state has seen.
  std::function<void(size_t request, const SequenceState& state, std::span<const int32_t> ids)> on_read;
  // Block diffusion: after each step the text that the block being denoised would be, were its latents the clean
  // ones that the step's velocity points at. Costs a pass of the VAE's decoder a step.
  std::function<void(size_t request, int64_t block, int step, std::string_view text)> on_denoise;
  std::function<bool()> cancelled;  // true stops with Cancelled
};

// One interface for every kind of language model: autoregressive or block diffusion (generate/open.h picks).
class Generator {
 public:
  virtual ~Generator() = default;
  // Sequences are independent, of any lengths, and stop on their own. A request's result does not
  // depend on the others beyond rounding.
  virtual std::vector<GenerateResult> generate(std::span<const GenerateRequest> requests,
                                               const GenerateCallbacks& callbacks = {}) = 0;
  virtual const GenerateStats& stats() const = 0;
};

}  // namespace lacuna

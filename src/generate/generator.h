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

struct GenerateStats {
  double decode_seconds = 0;
  int64_t decode_steps = 0;    // batched steps
  int64_t decode_tokens = 0;   // tokens produced in those steps
  OpTotals decode_ops;         // operators of the decode steps; empty when the context has a ledger of its own
  size_t kv_peak_bytes = 0;    // all sequences, prefill and decode
  size_t kv_now_bytes = 0;
};

struct GenerateCallbacks {
  // Newly decoded text of one request; whole UTF-8 characters only.
  std::function<void(size_t request, std::string_view text)> on_text;
  std::function<void(size_t request, int64_t done, int64_t total)> on_prefill;
  // A prompt is read; `ids` are all tokens that the state has seen.
  std::function<void(size_t request, const SequenceState& state, std::span<const int32_t> ids)> on_read;
  std::function<bool()> cancelled;  // true stops with Cancelled
};

// One interface for every kind of language model: autoregressive now, block diffusion later.
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

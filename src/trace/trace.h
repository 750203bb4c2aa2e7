// trace: the event ledger. Kernels report what they did; nobody computes it from a formula.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string_view>
#include <vector>

namespace lacuna {

// Operator classes of the ledger (shared/spec/hardware.md 3.1 uses the same words).
enum class OpKind : uint8_t {
  kGemm, kAttention, kNorm, kActivation, kRope, kEmbed, kQuantize, kEvictScore, kEvictSelect,
  kCompact, kKvAppend, kSample, kCopy,
  kScan, kRouter, kExpert, kSpike,  // recurrent states, mixture of experts, spike coding
  kCount
};
std::string_view op_kind_name(OpKind kind);

// What one call of an op really did. Bytes are those of the operands the body touched, once each.
struct OpRecord {
  OpKind kind = OpKind::kGemm;
  int32_t layer = -1;
  int64_t m = 0, n = 0, k = 0;       // problem size in the op's own terms; kExpert: m tokens of expert n
  int64_t macs = 0;                  // dense multiply-accumulates executed
  int64_t weight_bytes = 0;
  int64_t activation_bytes = 0;      // read + written
  int64_t kv_read_bytes = 0;
  int64_t kv_write_bytes = 0;
  int64_t kv_tokens_kept = 0;
  int64_t kv_tokens_evicted = 0;
  int64_t state_bytes = 0;           // recurrent states, read + written
  int64_t inputs = 0;                // spike-coded layers: input activations, over all rows
  int64_t silent_inputs = 0;         // … those with a spike count of 0
  int64_t spikes = 0;                // … ones over all time steps (popcount of |count|)
  int64_t synaptic_ops = 0;          // … additions of a weight executed for a spike
  int64_t experts = 0;               // expert bodies run (those with at least one token)
  int64_t duration_ns = 0;
};

// Receives records. Implementations must be cheap: they are called between kernels.
class TraceSink {
 public:
  virtual ~TraceSink() = default;
  virtual void record(const OpRecord& record) = 0;
};

// Sums by operator class: what `bench` and `run` print beside the measured limits.
class OpTotals : public TraceSink {
 public:
  struct Sum {
    int64_t calls = 0, macs = 0, weight_bytes = 0, activation_bytes = 0, kv_read_bytes = 0, kv_write_bytes = 0,
            state_bytes = 0, inputs = 0, silent_inputs = 0, spikes = 0, synaptic_ops = 0, experts = 0, duration_ns = 0;
    int64_t bytes() const { return weight_bytes + activation_bytes + kv_read_bytes + kv_write_bytes + state_bytes; }
    Sum& operator+=(const Sum& other);
  };
  void record(const OpRecord& r) override;
  OpTotals& operator+=(const OpTotals& other);
  const Sum& of(OpKind kind) const { return sums_[static_cast<size_t>(kind)]; }
  Sum total() const;
  // Tokens that each expert of each layer ran: [layer][expert], from the records of kRouter (which say how
  // many experts a layer has) and kExpert. Layers without experts are empty; none at all: an empty list.
  const std::vector<std::vector<int64_t>>& expert_tokens() const { return expert_tokens_; }
  void reset() {
    sums_ = {};
    expert_tokens_.clear();
  }

 private:
  std::array<Sum, static_cast<size_t>(OpKind::kCount)> sums_{};
  std::vector<std::vector<int64_t>> expert_tokens_;
};

}  // namespace lacuna

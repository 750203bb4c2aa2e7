#include "trace/trace.h"

#include <algorithm>

namespace lacuna {

std::string_view op_kind_name(OpKind kind) {
  static constexpr std::array<std::string_view, static_cast<size_t>(OpKind::kCount)> kNames = {
      "gemm", "attention", "norm", "activation", "rope", "embed", "quantize", "evict_score", "evict_select",
      "compact", "kv_append", "sample", "copy", "scan", "router", "expert", "spike"};
  return kNames[static_cast<size_t>(kind)];
}

void OpTotals::record(const OpRecord& r) {
  sums_[static_cast<size_t>(r.kind)] +=
      {1,             r.macs,   r.weight_bytes,    r.activation_bytes, r.kv_read_bytes, r.kv_write_bytes, r.state_bytes, r.inputs,
       r.silent_inputs, r.spikes, r.synaptic_ops, r.experts,          r.duration_ns};
  if (r.layer < 0 || (r.kind != OpKind::kRouter && r.kind != OpKind::kExpert)) return;
  const auto layer = static_cast<size_t>(r.layer), experts = static_cast<size_t>(r.n);
  if (expert_tokens_.size() <= layer) expert_tokens_.resize(layer + 1);
  std::vector<int64_t>& tokens = expert_tokens_[layer];
  if (r.kind == OpKind::kRouter)
    tokens.resize(std::max(tokens.size(), experts));
  else if (experts < tokens.size())
    tokens[experts] += r.m;
}

OpTotals& OpTotals::operator+=(const OpTotals& other) {
  for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += other.sums_[i];
  expert_tokens_.resize(std::max(expert_tokens_.size(), other.expert_tokens_.size()));
  for (size_t layer = 0; layer < other.expert_tokens_.size(); ++layer) {
    const std::vector<int64_t>& from = other.expert_tokens_[layer];
    std::vector<int64_t>& to = expert_tokens_[layer];
    to.resize(std::max(to.size(), from.size()));
    for (size_t e = 0; e < from.size(); ++e) to[e] += from[e];
  }
  return *this;
}

OpTotals::Sum& OpTotals::Sum::operator+=(const Sum& o) {
  calls += o.calls;
  macs += o.macs;
  weight_bytes += o.weight_bytes;
  activation_bytes += o.activation_bytes;
  kv_read_bytes += o.kv_read_bytes;
  kv_write_bytes += o.kv_write_bytes;
  state_bytes += o.state_bytes;
  inputs += o.inputs;
  silent_inputs += o.silent_inputs;
  spikes += o.spikes;
  synaptic_ops += o.synaptic_ops;
  experts += o.experts;
  duration_ns += o.duration_ns;
  return *this;
}

OpTotals::Sum OpTotals::total() const {
  Sum t;
  for (const Sum& s : sums_) t += s;
  return t;
}

}  // namespace lacuna

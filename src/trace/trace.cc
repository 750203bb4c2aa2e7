#include "trace/trace.h"

namespace lacuna {

std::string_view op_kind_name(OpKind kind) {
  static constexpr std::array<std::string_view, static_cast<size_t>(OpKind::kCount)> kNames = {
      "gemm", "attention", "norm", "activation", "rope", "embed", "quantize", "evict_score", "evict_select",
      "compact", "kv_append", "sample", "copy", "scan", "router", "expert", "spike"};
  return kNames[static_cast<size_t>(kind)];
}

void OpTotals::record(const OpRecord& r) {
  Sum& s = sums_[static_cast<size_t>(r.kind)];
  ++s.calls;
  s.macs += r.macs;
  s.weight_bytes += r.weight_bytes;
  s.activation_bytes += r.activation_bytes;
  s.kv_read_bytes += r.kv_read_bytes;
  s.kv_write_bytes += r.kv_write_bytes;
  s.duration_ns += r.duration_ns;
}

OpTotals::Sum OpTotals::total() const {
  Sum t;
  for (const Sum& s : sums_) {
    t.calls += s.calls;
    t.macs += s.macs;
    t.weight_bytes += s.weight_bytes;
    t.activation_bytes += s.activation_bytes;
    t.kv_read_bytes += s.kv_read_bytes;
    t.kv_write_bytes += s.kv_write_bytes;
    t.duration_ns += s.duration_ns;
  }
  return t;
}

}  // namespace lacuna

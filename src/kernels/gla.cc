#include "kernels/gla.h"

#include <limits>

#include "base/error.h"
#include "kernels/cpu/gla_cpu.h"

namespace lacuna {

void gated_linear_attention(Context& ctx, const GlaShape& shape, std::span<const GlaSequence> sequences) {
  constexpr const char* kOp = "gated_linear_attention";
  if (shape.kv_heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.kv_heads != 0)
    throw BadInput("{}: {} query heads over {} KV heads; expected a whole number of query heads to a KV head", kOp,
                   shape.query_heads, shape.kv_heads);
  for (const int d : {shape.key_dim, shape.value_dim})
    if (d < 1 || d > 65536)
      throw BadInput("{}: a state of {} x {}; expected 1 to 65536 channels each way", kOp, shape.key_dim, shape.value_dim);
  if (!(shape.scale > 0) || shape.scale > std::numeric_limits<float>::max())
    throw BadInput("{}: scale is {}; expected a positive number", kOp, shape.scale);
  int64_t tokens = 0, used = 0;
  for (const GlaSequence& s : sequences) {
    if (s.tokens < 0) throw BadInput("{}: {} tokens; expected 0 or more", kOp, s.tokens);
    if (s.tokens == 0) continue;
    if (!s.q || !s.k || !s.v || !s.log_decay || !s.out || !s.state)
      throw BadInput("{}: a sequence of {} tokens lacks q, k, v, log_decay, out or state", kOp, s.tokens);
    tokens += s.tokens;
    ++used;
  }
  if (tokens == 0) return;

  OpScope scope(ctx, OpKind::kScan);
  cpu::gated_linear_attention(ctx, shape, sequences);
  if (!scope.on()) return;
  const int64_t q = int64_t{shape.query_heads} * shape.key_dim, k = int64_t{shape.kv_heads} * shape.key_dim,
                v = int64_t{shape.kv_heads} * shape.value_dim, out = int64_t{shape.query_heads} * shape.value_dim;
  scope.record.m = tokens;
  scope.record.n = shape.value_dim;
  scope.record.k = shape.key_dim;
  for (const GlaSequence& s : sequences) scope.record.macs += cpu::gla_macs(shape, s.tokens);
  scope.record.activation_bytes = tokens * (q + 2 * k + v + out) * 4;
  scope.record.state_bytes = used * 2 * k * shape.value_dim * 4;
}

}  // namespace lacuna

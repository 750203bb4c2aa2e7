#include "kernels/latent_heads.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/attention_cpu.h"
#include "kernels/cpu/latent_heads.h"
#include "kernels/elementwise.h"
#include "kernels/rows.h"

namespace lacuna {
namespace {

bool has_body(const KvLayout& layout, const HeadPreparation& how, int heads) {
  return cpu::prepare_rows(cpu_isa()) && layout.dtype == DType::kBF16 && layout.head_dim == cpu::kPreparedDim &&
         heads <= cpu::kPreparedHeads && how.rotated % 16 == 0 && how.q_norm.weight && how.q_norm.bias &&
         how.k_norm.weight && how.k_norm.bias;
}

}  // namespace

void prepare_heads(Context& ctx, const KvLayout& layout, const HeadPreparation& how, std::span<const KvRows> sequences,
                   int heads, int64_t first, int64_t rows, float* qkv, int64_t stride, bool queries) {
  constexpr const char* kOp = "prepare_heads";
  const int d = layout.head_dim;
  const int64_t width = int64_t{heads} * d;
  if (heads < 1 || d < 1) throw BadInput("{}: {} heads of {} values; expected 1 or more of both", kOp, heads, d);
  stride = check_stride(kOp, stride, 3 * width);
  float *q = qkv, *k = qkv + width, *v = k + width;
  if (!has_body(layout, how, heads)) {
    if (queries) layer_norm(ctx, how.q_norm, q, rows, d, q, LinearMode::kStore, heads, stride);
    layer_norm(ctx, how.k_norm, k, rows, d, k, LinearMode::kStore, heads, stride);
    rope_pairs(ctx, queries ? q : k, rows, queries ? 2 * heads : heads, d, how.rotated, how.cosine, how.sine, stride);
    kv_append_rows(ctx, layout, sequences, heads, first, rows, k, v, stride);
    return;
  }
  check_appended(kOp, layout, sequences, heads, first, rows, k, v);
  if (how.rotated < 0 || how.rotated > d)
    throw BadInput("{}: {} of a head's {} values are turned", kOp, how.rotated, d);
  if (!(how.q_norm.eps > 0) || !(how.k_norm.eps > 0))
    throw BadInput("{}: eps is {} and {}; expected positive numbers", kOp, how.q_norm.eps, how.k_norm.eps);
  if (rows == 0) return;
  if (how.rotated > 0 && (!how.cosine || !how.sine)) throw BadInput("{}: {} rows without angles", kOp, rows);

  OpScope scope(ctx, OpKind::kKvAppend);
  const cpu::PrepareRows body = cpu::prepare_rows(cpu_isa());
  const cpu::PageMap pages(layout);
  const size_t position_offset = layout.position_offset();
  const auto half = how.rotated / 2;
  const int64_t piece = std::max<int64_t>(1, kPieceElements / (3 * width));
  const auto run = [&](int64_t index, int) {
    cpu::PreparedRows some;
    some.heads = heads;
    some.q_weight = how.q_norm.weight;
    some.q_bias = how.q_norm.bias;
    some.q_eps = how.q_norm.eps;
    some.k_weight = how.k_norm.weight;
    some.k_bias = how.k_norm.bias;
    some.k_eps = how.k_norm.eps;
    some.half = half;
    int64_t at = index * piece;  // of this call's rows
    const int64_t end = std::min(rows, at + piece);
    int64_t before = 0;  // all sequences' rows before s
    for (const KvRows& s : sequences) {
      const int64_t skip = first + at - before;
      before += s.tokens;
      if (skip >= s.tokens) continue;
      for (int64_t t = skip; t < s.tokens && at < end; ++t, ++at) {
        const auto position = static_cast<int32_t>(s.first_position + t);
        cpu::PreparedRows::Row& row = some.rows[some.count++];
        for (int h = 0; h < heads; ++h) {
          const auto slot = static_cast<uint32_t>(s.heads[h].length + t);
          std::byte* base = s.heads[h].pages[slot / pages.slots];
          const uint32_t in_page = slot % pages.slots;
          row.key[h] = base + pages.codes[0] + in_page * pages.row_bytes;
          row.value[h] = base + pages.codes[1] + in_page * pages.row_bytes;
          std::memcpy(base + position_offset + in_page * 4, &position, 4);
        }
        row.q = queries ? q + at * stride : nullptr;
        row.k = k + at * stride;
        row.v = v + at * stride;
        row.cosine = how.cosine + at * half;
        row.sine = how.sine + at * half;
        if (some.count < cpu::kPreparedRows && at + 1 < end) continue;
        body(some);
        some.count = 0;
      }
      if (at == end) break;
    }
  };
  ctx.pool.parallel_for((rows + piece - 1) / piece, std::ref(run));
  scope.record.m = rows;
  scope.record.n = heads;
  scope.record.k = d;
  scope.record.activation_bytes = (queries ? 4 : 2) * rows * width * 4;
  scope.record.kv_write_bytes = rows * heads * static_cast<int64_t>(layout.slot_bytes());
}

}  // namespace lacuna

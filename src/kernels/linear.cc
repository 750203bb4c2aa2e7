#include "kernels/linear.h"

#include "base/error.h"
#include "kernels/cpu/linear.h"
#include "kernels/elementwise.h"

namespace lacuna {
namespace {

void check_matrix(const char* op, const char* what, const Tensor& t) {
  if (!t) throw BadInput("{}: {} has no data", op, what);
  if (t.rank != 2 || t.shape[0] <= 0 || t.shape[1] <= 0)
    throw BadInput("{}: {} has shape {}; expected two positive dimensions [N, K]", op, what, t.shape_string());
}

void check_weight(const char* op, const LinearWeight& w) {
  check_matrix(op, "the weight", w.weight);
  switch (w.weight.dtype) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16: return;
    case DType::kI8:
      if (!w.row_scale)
        throw BadInput("{}: the weight {} is int8 but has no row scales", op, w.weight.shape_string());
      return;
    default:
      throw BadInput("{}: the weight {} has dtype {}; expected f32, f16, bf16 or int8", op, w.weight.shape_string(),
                     dtype_name(w.weight.dtype));
  }
}

int64_t scale_bytes(const LinearWeight& w, int64_t rows) {
  return w.weight.dtype == DType::kI8 ? rows * static_cast<int64_t>(sizeof(float)) : 0;
}

void report_product(OpScope& scope, const Context& ctx, const LinearWeight& w, int64_t m, int64_t activation_bytes) {
  if (!scope.on()) return;
  OpRecord& r = scope.record;
  r.m = m;
  r.n = w.out();
  r.k = w.in();
  r.macs = m * r.n * r.k;
  const size_t panels = w.panels ? cpu::panel_bytes(ctx.activations, w.weight) : 0;
  r.weight_bytes =
      static_cast<int64_t>(panels ? panels : w.weight.bytes()) + scale_bytes(w, r.n) + (w.bias ? r.n * 4 : 0);
  r.activation_bytes = activation_bytes;
}

}  // namespace

void linear(Context& ctx, const LinearWeight& w, const float* x, int64_t m, float* y, LinearMode mode, int64_t x_stride,
            int64_t y_stride) {
  check_weight("linear", w);
  const int64_t n = w.out(), k = w.in();
  if (x_stride == 0) x_stride = k;
  if (y_stride == 0) y_stride = n;
  if (m < 0) throw BadInput("linear: x has {} rows", m);
  if (m == 0) return;
  if (!x || !y) throw BadInput("linear: {} has no data", x ? "y" : "x");
  // Rows of x may overlap (they are only read); rows of y may not.
  if (x_stride < 0) throw BadInput("linear: rows of x are {} floats apart; expected 0 or more", x_stride);
  if (m > 1 && y_stride < n)
    throw BadInput("linear: rows of y are {} floats apart, but each holds {} values", y_stride, n);

  OpScope scope(ctx, OpKind::kGemm);
  cpu::linear(ctx, w, x, m, y, mode, x_stride, y_stride);
  report_product(scope, ctx, w, m, 4 * m * (k + n * (mode == LinearMode::kAccumulate ? 2 : 1)));
}

void gelu_mlp(Context& ctx, const LinearWeight& in, const LinearWeight& out, const float* x, int64_t m, float* wide,
              float* y) {
  check_weight("gelu_mlp", in);
  check_weight("gelu_mlp", out);
  if (out.in() != in.out()) throw BadInput("gelu_mlp: {} inputs after {} outputs", out.in(), in.out());
  if (m < 0) throw BadInput("gelu_mlp: x has {} rows", m);
  if (m == 0) return;
  if (!x || !wide || !y) throw BadInput("gelu_mlp: {} rows without x, y or a place for what comes between", m);
  if (!cpu::packs_gelu(ctx, in, out)) {
    linear(ctx, in, x, m, wide);
    gelu_tanh(ctx, wide, m * in.out());
    linear(ctx, out, wide, m, y);
    return;
  }
  const float* packed = nullptr;
  {
    OpScope scope(ctx, OpKind::kGemm);
    packed = cpu::linear_gelu(ctx, in, x, m);
    report_product(scope, ctx, in, m, m * (4 * in.in() + 2 * in.out()));
  }
  OpScope scope(ctx, OpKind::kGemm);
  cpu::linear_packed(ctx, out, packed, m, y);
  report_product(scope, ctx, out, m, m * (2 * out.in() + 4 * out.out()));
}

size_t panel_bytes(const Context& ctx, const LinearWeight& w) {
  check_weight("panel_bytes", w);
  return cpu::panel_bytes(ctx.activations, w.weight);
}

Buffer pack_panels(Context& ctx, std::span<LinearWeight* const> weights, size_t most) {
  size_t bytes = 0;
  for (const LinearWeight* w : weights) {
    const size_t own = panel_bytes(ctx, *w);
    if (own == 0) return {};
    bytes += own;
  }
  if (bytes > most) return {};
  Buffer buffer(ctx.memory, MemoryTag::kWeights, bytes);
  std::byte* to = buffer.as<std::byte>();
  for (LinearWeight* w : weights) {
    cpu::pack_panels(ctx, w->weight, to);
    w->panels = to;
    w->panel_bytes = panel_bytes(ctx, *w);
    to += w->panel_bytes;
  }
  return buffer;
}

void quantize_rows(Context& ctx, const Tensor& weight, int8_t* codes, float* scales) {
  check_matrix("quantize_rows", "the weight", weight);
  if (weight.dtype != DType::kF32 && weight.dtype != DType::kF16 && weight.dtype != DType::kBF16)
    throw BadInput("quantize_rows: the weight {} has dtype {}; expected f32, f16 or bf16", weight.shape_string(),
                   dtype_name(weight.dtype));
  if (!codes || !scales) throw BadInput("quantize_rows: {} has no memory", codes ? "scales" : "codes");

  OpScope scope(ctx, OpKind::kQuantize);
  cpu::quantize_rows(ctx, weight, codes, scales);
  if (scope.on()) {
    OpRecord& r = scope.record;
    r.m = weight.shape[0];
    r.k = weight.shape[1];
    r.weight_bytes = static_cast<int64_t>(weight.bytes()) + weight.elements() + 4 * weight.shape[0];
  }
}

void embed_rows(Context& ctx, const LinearWeight& table, const int32_t* ids, int64_t count, float* out) {
  check_weight("embed_rows", table);
  if (count < 0) throw BadInput("embed_rows: {} ids were asked for", count);
  if (count == 0) return;
  if (!ids || !out) throw BadInput("embed_rows: {} has no data", ids ? "out" : "ids");
  const int64_t rows = table.out(), d = table.in();
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= rows)
      throw BadInput("embed_rows: id {} at index {} is outside the table of {} rows", ids[i], i, rows);
  }

  OpScope scope(ctx, OpKind::kEmbed);
  cpu::embed_rows(ctx, table, ids, count, out);
  if (scope.on()) {
    OpRecord& r = scope.record;
    r.m = count;
    r.n = d;
    r.weight_bytes = count * d * static_cast<int64_t>(dtype_size(table.weight.dtype)) + scale_bytes(table, count);
    r.activation_bytes = 4 * count * d;
  }
}

}  // namespace lacuna

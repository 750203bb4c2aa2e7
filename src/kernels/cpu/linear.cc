#include "kernels/cpu/linear.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <optional>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

// A large-M product is cut into at least this many pieces, if its columns allow: a few for each core of
// the machines this is run on, so that none idles for long at the end.
constexpr int64_t kWantedPieces = 32;

// f32 and f16 weights lose bits in bf16, so they stay wide whatever the activations are.
bool is_wide(DType weights) { return weights != DType::kBF16 && weights != DType::kI8; }

Operand operand_for(ActivationType activations, DType weights, const LinearBodies& b) {
  if (activations == ActivationType::kF32) return Operand::kF32;
  return !is_wide(weights) && b.bf16_pairs ? Operand::kBf16Pair : Operand::kF32Rounded;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The product restricted to rows [row, row + m) and columns [column, column + count); x is set by the caller.
LinearPiece piece(const LinearWeight& w, Operand operand, int64_t row, int64_t m, int64_t column, int64_t count,
                  float* y, int64_t y_stride, LinearMode mode) {
  LinearPiece p;
  p.dtype = w.weight.dtype;
  p.operand = operand;
  p.weight = w.weight.as<std::byte>() + column * w.in() * static_cast<int64_t>(dtype_size(p.dtype));
  p.row_scale = w.weight.dtype == DType::kI8 ? w.row_scale + column : nullptr;
  p.bias = w.bias ? w.bias + column : nullptr;
  p.count = count;
  p.k = w.in();
  p.m = m;
  p.y = y + row * y_stride + column;
  p.y_stride = y_stride;
  p.accumulate = mode == LinearMode::kAccumulate;
  return p;
}

void linear_small(Context& ctx, const LinearBodies& b, Operand operand, const LinearWeight& w, const float* x,
                  int64_t m, float* y, LinearMode mode, int64_t x_stride, int64_t y_stride) {
  const int64_t n = w.out(), k = w.in();
  const bool narrow = w.weight.dtype == DType::kI8 && k < kMaxDigitK && m <= kMaxSmallRows;
  const bool widens = b.bf16_pairs && has_full_width_units();
  const DigitBodies* digits = narrow && b.digits && !widens ? &b.digits() : nullptr;
  const int64_t row_words = digits ? digits->words(k) : b.small_words(words(operand, k));
  float* packed = ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(m * row_words));
  for (int64_t i = 0; i < m; ++i)
    if (digits)
      digits->pack(operand != Operand::kF32, x + i * x_stride, k, packed + i * row_words);
    else
      b.pack_small(operand, x + i * x_stride, k, packed + i * row_words);

  const int64_t row_bytes = k * static_cast<int64_t>(dtype_size(w.weight.dtype));
  const int64_t rows = std::max<int64_t>(1, kSmallPieceBytes / row_bytes / kMaxSmallRows) * kMaxSmallRows;
  ctx.pool.parallel_runs(ceil_div(n, rows), [&](int64_t index, int) {
    const int64_t first = index * rows;
    for (int64_t row = 0; row < m; row += kMaxSmallRows) {
      LinearPiece p = piece(w, operand, row, std::min<int64_t>(kMaxSmallRows, m - row), first,
                            std::min(rows, n - first), y, y_stride, mode);
      p.x = packed + row * row_words;
      digits ? digits->small(p) : b.small(p);
    }
  });
}

// The operand of products with panels, whose words are what panels hold; none: no such products. Weights that bf16 holds
// are f32 there as well where pairs are slower.
std::optional<Operand> panel_operand(ActivationType activations, DType weights, const LinearBodies& b) {
  if (!b.panels) return {};
  const Operand own = operand_for(activations, weights, b);
  if (is_wide(weights)) return own;
  if (own != Operand::kBf16Pair) return {};
  return has_fast_bf16_pairs() ? own : Operand::kF32Rounded;
}
std::optional<Operand> panel_operand(const Context& ctx, const LinearWeight& w) {
  return w.panels ? panel_operand(ctx.activations, w.weight.dtype, linear_bodies()) : std::nullopt;
}

// Words of a row of k values for products with panels: where the small-M bodies want them.
int64_t panel_words(const LinearBodies& b, Operand operand, int64_t k) { return b.small_words(words(operand, k)); }

void pack_for_panels(Context& ctx, const LinearBodies& b, Operand operand, const float* x, int64_t m, int64_t k,
                     int64_t x_stride, float* packed) {
  const int64_t x_words = panel_words(b, operand, k);
  const auto pack = [&](int64_t index, int) {
    for (int64_t i = index * kPanelRows; i < std::min(m, (index + 1) * kPanelRows); ++i)
      b.pack_small(operand, x + i * x_stride, k, packed + i * x_words);
  };
  ctx.pool.parallel_for(ceil_div(m, kPanelRows), std::ref(pack));
}

// y of packed x, or, if gelu is not null, GELU of it packed there.
void panel_products(Context& ctx, const LinearBodies& b, Operand operand, const LinearWeight& w, const float* packed,
                    int64_t m, float* y, LinearMode mode, int64_t y_stride, float* gelu = nullptr) {
  const PanelBodies& panels = b.panels();
  const int64_t n = w.out(), k_words = words(operand, w.in()), x_words = panel_words(b, operand, w.in());
  const int64_t row_pieces = ceil_div(m, kPanelRows), column_pieces = ceil_div(n, kPanelColumns);
  if (gelu)
    for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<float>(t, kPanelRows * kPanelColumns);
  const auto product = [&](int64_t index, int thread) {
    const int64_t row = index / column_pieces * kPanelRows, first = index % column_pieces * kPanelColumns;
    LinearPiece p = piece(w, operand, row, std::min(kPanelRows, m - row), first, std::min(kPanelColumns, n - first), y,
                          y_stride, mode);
    p.weight = static_cast<const float*>(w.panels) + first * k_words;
    p.x = packed + row * x_words;
    if (gelu) {
      p.y = ctx.workspace<float>(thread, kPanelRows * kPanelColumns);
      p.y_stride = kPanelColumns;
    }
    panels.product(p, x_words);
    const int64_t gelu_words = panel_words(b, operand, n);
    if (gelu)
      panels.pack_gelu(operand, p.y, p.y_stride, p.m, p.count, gelu + row * gelu_words + words(operand, first),
                       gelu_words);
  };
  ctx.pool.parallel_for(row_pieces * column_pieces, std::ref(product));
}

void linear_panels(Context& ctx, const LinearBodies& b, Operand operand, const LinearWeight& w, const float* x,
                   int64_t m, float* y, LinearMode mode, int64_t x_stride, int64_t y_stride) {
  float* packed =
      ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(m * panel_words(b, operand, w.in())));
  pack_for_panels(ctx, b, operand, x, m, w.in(), x_stride, packed);
  panel_products(ctx, b, operand, w, packed, m, y, mode, y_stride);
}

void linear_large(Context& ctx, const LinearBodies& b, Operand operand, const LinearWeight& w, const float* x,
                  int64_t m, float* y, LinearMode mode, int64_t x_stride, int64_t y_stride) {
  const int64_t n = w.out(), k = w.in(), k_words = words(operand, k);
  const int64_t groups = ceil_div(m, b.lanes), group_words = k_words * b.lanes;
  float* packed = ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(groups * group_words));
  const int64_t blocks = ceil_div(k_words, kBlockWords);
  ctx.pool.parallel_for(groups * blocks, [&](int64_t index, int) {
    const int64_t group = index / blocks, begin = index % blocks * kBlockWords;
    const int64_t row = group * b.lanes;
    b.pack_group(operand, x + row * x_stride, x_stride, std::min<int64_t>(b.lanes, m - row), k, begin,
                 std::min(begin + kBlockWords, k_words), packed + group * group_words);
  });

  const int64_t row_pieces = ceil_div(m, kTaskRows);
  int64_t columns = kMaxTaskColumns;
  while (columns > kMaxLanes && row_pieces * ceil_div(n, columns) < kWantedPieces) columns /= 2;
  const int64_t column_pieces = ceil_div(n, columns);
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<float>(t, large_workspace());
  ctx.pool.parallel_for(row_pieces * column_pieces, [&](int64_t index, int thread) {
    const int64_t row = index / column_pieces * kTaskRows, first = index % column_pieces * columns;
    LinearPiece p =
        piece(w, operand, row, std::min(kTaskRows, m - row), first, std::min(columns, n - first), y, y_stride, mode);
    p.x = packed + row / b.lanes * group_words;
    b.large(p, ctx.workspace<float>(thread, large_workspace()));
  });
}

}  // namespace

const LinearBodies& linear_bodies() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kScalar: break;
    case Isa::kAvx2: return linear_avx2();
    case Isa::kAvx512: return linear_avx512();
    case Isa::kAvx512Bf16: return linear_avx512_bf16();
  }
#endif
  return linear_portable();
}

void linear(Context& ctx, const LinearWeight& w, const float* x, int64_t m, float* y, LinearMode mode,
            int64_t x_stride, int64_t y_stride) {
  const LinearBodies& b = linear_bodies();
  const Operand operand = operand_for(ctx.activations, w.weight.dtype, b);
  if (const auto packed = panel_operand(ctx, w))
    return linear_panels(ctx, b, *packed, w, x, m, y, mode, x_stride, y_stride);
  const bool pair_codes = w.weight.dtype == DType::kI8 && operand == Operand::kBf16Pair;
  if (m <= (pair_codes ? kMaxSmallCodeRows : kMaxSmallRows))
    return linear_small(ctx, b, operand, w, x, m, y, mode, x_stride, y_stride);
#if defined(__x86_64__)
  // The same operands, rounded likewise, as f32.
  if (operand == Operand::kBf16Pair && !has_fast_bf16_pairs())
    return linear_large(ctx, linear_avx512(), Operand::kF32Rounded, w, x, m, y, mode, x_stride, y_stride);
#endif
  linear_large(ctx, b, operand, w, x, m, y, mode, x_stride, y_stride);
}

bool packs_gelu(const Context& ctx, const LinearWeight& in, const LinearWeight& out) {
  const auto a = panel_operand(ctx, in), b = panel_operand(ctx, out);
  return a && a == b && a != Operand::kF32 && in.out() % 32 == 0;
}

const float* linear_gelu(Context& ctx, const LinearWeight& w, const float* x, int64_t m) {
  const Operand operand = *panel_operand(ctx, w);
  const LinearBodies& b = linear_bodies();
  const int64_t x_size = m * panel_words(b, operand, w.in());
  float* packed =
      ctx.workspace<float>(ctx.shared_slot(), static_cast<size_t>(x_size + m * panel_words(b, operand, w.out())));
  pack_for_panels(ctx, b, operand, x, m, w.in(), w.in(), packed);
  panel_products(ctx, b, operand, w, packed, m, nullptr, LinearMode::kStore, 0, packed + x_size);
  return packed + x_size;
}

void linear_packed(Context& ctx, const LinearWeight& w, const float* packed, int64_t m, float* y) {
  panel_products(ctx, linear_bodies(), *panel_operand(ctx, w), w, packed, m, y, LinearMode::kStore, w.out());
}

size_t panel_bytes(ActivationType activations, const Tensor& weight) {
  const LinearBodies& b = linear_bodies();
  const auto operand = panel_operand(activations, weight.dtype, b);
  if (!operand) return 0;
  const int64_t lanes = b.panels().lanes;
  return static_cast<size_t>(ceil_div(weight.shape[0], lanes) * lanes * words(*operand, weight.shape[1]) * 4);
}

void pack_panels(Context& ctx, const Tensor& weight, void* panels) {
  const LinearBodies& b = linear_bodies();
  const Operand operand = *panel_operand(ctx.activations, weight.dtype, b);
  const bool pairs = operand == Operand::kBf16Pair;
  const int64_t n = weight.shape[0], k = weight.shape[1], lanes = b.panels().lanes, k_words = words(operand, k);
  // A piece of columns as f32 rows, and from there into the order of the panels.
  const auto pack = [&](int64_t index, int) {
    const int64_t first = index * kPanelColumns, count = std::min(kPanelColumns, n - first);
    std::vector<float> rows(static_cast<size_t>(count * k));
    const std::byte* from = weight.as<std::byte>() + first * k * static_cast<int64_t>(dtype_size(weight.dtype));
    b.widen(weight.dtype, from, count * k, rows.data());
    const auto value = [&](int64_t row, int64_t i) {
      return row < count && i < k ? rows[static_cast<size_t>(row * k + i)] : 0.0f;
    };
    const auto word = [&](int64_t row, int64_t j) -> uint32_t {
      if (!pairs) return std::bit_cast<uint32_t>(value(row, j));
      return to_bf16(value(row, 2 * j)).bits | static_cast<uint32_t>(to_bf16(value(row, 2 * j + 1)).bits) << 16;
    };
    uint32_t* to = static_cast<uint32_t*>(panels) + first * k_words;
    const int64_t vectors = ceil_div(count, lanes);
    for (int64_t v = 0, take; v < vectors; v += take) {
      take = panel_vectors(vectors - v);
      for (int64_t j = 0; j < k_words; ++j)
        for (int64_t row = v * lanes; row < (v + take) * lanes; ++row) *to++ = word(row, j);
    }
  };
  ctx.pool.parallel_for(ceil_div(n, kPanelColumns), std::ref(pack));
}

}  // namespace lacuna::cpu

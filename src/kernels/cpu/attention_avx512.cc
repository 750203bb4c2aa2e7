// Attention bodies for AVX-512, and the tile of bf16 pair dot products for those that have them.
#if defined(__x86_64__)

#include <cstring>

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_vec.h"

namespace lacuna::cpu {
namespace {
#include "kernels/cpu/attention_body.h"

// ---- bf16 pairs -----------------------------------------------------------------------------------
// The same 12 x 2 register tile; a 32-bit word of either operand is two neighbours in k, so a
// multiply-add does twice the work of f32 and the packed operands take half the bytes.

inline __m512i words(const void* p) { return _mm512_loadu_si512(p); }
inline __m512bh pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }
inline __m512i bits(__m512bh x) { return reinterpret_cast<__m512i>(x); }

template <DType kType>
void rows_as_bf16(const void* codes, const float* scales, int64_t count, int d, uint16_t* out, int64_t ld) {
  const auto* p = static_cast<const typename CodeOf<kType>::T*>(codes);
  const int whole = d / kPanel * kPanel;
  for (int64_t i = 0; i < count; ++i, p += d, out += ld) {
    const Vec s = set1(kType == DType::kI8 ? scales[i] : 1.0f);
    int c = 0;
    for (; c < whole; c += kPanel) {
      const Vec x = CodeOf<kType>::load_codes(p + c), y = CodeOf<kType>::load_codes(p + c + kLanes);
      const bool scaled = kType == DType::kI8;
      _mm512_storeu_si512(out + c, bits(_mm512_cvtne2ps_pbh(scaled ? (y * s).v : y.v, scaled ? (x * s).v : x.v)));
    }
    for (; c < ld; c += kLanes) {
      const int n = d - c < kLanes ? d - c : kLanes;
      const Vec x = n > 0 ? load_tail<kType>(p + c, n) : zero();
      const __m256bh half = _mm512_cvtneps_pbh(kType == DType::kI8 ? (x * s).v : x.v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), reinterpret_cast<__m256i>(half));
    }
  }
}

void rows_bf16(DType dtype, const void* codes, const float* scales, int64_t count, int d, void* out, int64_t ld) {
  auto* o = static_cast<uint16_t*>(out);
  if (dtype == DType::kF32) return rows_as_bf16<DType::kF32>(codes, scales, count, d, o, ld);
  if (dtype == DType::kBF16) return rows_as_bf16<DType::kBF16>(codes, scales, count, d, o, ld);
  rows_as_bf16<DType::kI8>(codes, scales, count, d, o, ld);
}

// Pairs along d are words of a key's row already: the f32 transposition moves them.
void pack_keys_bf16(const void* rows, int64_t ld, int d, void* out) { pack_keys_f32(rows, ld / 2, (d + 1) / 2, out); }

void pack_values_bf16(const void* rows, int64_t ld, int d, void* out) {
  const auto* src = static_cast<const uint16_t*>(rows);
  auto* dst = static_cast<uint16_t*>(out);
  // Word j of a panel row: column j of an even key, then of the odd key after it.
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
  }
  const __m512i low = words(order[0]), high = words(order[1]);
  for (int c = 0; c < d; c += kPanel)
    for (int key = 0; key < kKeyTile; key += 2, dst += 2 * kPanel) {
      const __m512i even = words(src + key * ld + c), odd = words(src + (key + 1) * ld + c);
      _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(dst + kPanel, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// k counts pairs; strides count words.
template <int kR, int kW, bool kAdd>
void tile_bf16(const float* a, int64_t lda, const float* b, int k, const float* shrink, float* c, int64_t ldc) {
  __m512 sums[kR * kW];
#pragma GCC unroll 32
  for (int i = 0; i < kR * kW; ++i) sums[i] = _mm512_setzero_ps();
  for (int x = 0; x < k; ++x, b += kPanel) {
    __m512bh bw[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) bw[w] = pairs(words(b + w * kLanes));
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const __m512bh ai = pairs(_mm512_castps_si512(_mm512_set1_ps(a[i * lda + x])));
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) sums[i * kW + w] = _mm512_dpbf16_ps(sums[i * kW + w], ai, bw[w]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) {
      float* out = c + i * ldc + w * kLanes;
      const Vec sum = {sums[i * kW + w]};
      store(out, kAdd ? fma(set1(shrink[i]), load(out), sum) : sum);
    }
  }
}

template <int kW, bool kAdd, int kR = kRows>
void panel_bf16(const float* a, int64_t lda, const float* b, int k, int rows, const float* shrink, float* c,
                int64_t ldc) {
  for (; rows >= kR; rows -= kR, a += kR * lda, c += kR * ldc) {
    tile_bf16<kR, kW, kAdd>(a, lda, b, k, shrink, c, ldc);
    if (kAdd) shrink += kR;
  }
  if constexpr (kR > 1) {
    if (rows) panel_bf16<kW, kAdd, kR - 1>(a, lda, b, k, rows, shrink, c, ldc);
  }
}

void scores_bf16(const void* a, int64_t lda, const void* b, int k, int rows, int columns, float* c, int64_t ldc) {
  const auto* panel = static_cast<const float*>(b);
  const int words = (k + 1) / 2;
  for (int x = 0; x < columns; x += kPanel, panel += static_cast<int64_t>(words) * kPanel)
    panel_bf16<kWide, false>(static_cast<const float*>(a), lda / 2, panel, words, rows, nullptr, c + x, ldc);
}

void values_bf16(const void* a, int64_t lda, const void* b, int from, int k, int rows, int d, const float* shrink,
                 float* c, int64_t ldc) {
  const auto* panel = static_cast<const float*>(b) + static_cast<int64_t>(from / 2) * kPanel;
  const float* p = static_cast<const float*>(a) + from / 2;
  for (int x = 0; x < d; x += kPanel, panel += static_cast<int64_t>(kKeyTile / 2) * kPanel) {
    if (d - x > kLanes)
      panel_bf16<kWide, true>(p, lda / 2, panel, k / 2, rows, shrink, c + x, ldc);
    else
      panel_bf16<1, true>(p, lda / 2, panel, k / 2, rows, shrink, c + x, ldc);
  }
}

// ---- softmax --------------------------------------------------------------------------------------

template <bool kPairs>
inline void put(void* p, Vec x, Vec y) {
  if constexpr (kPairs) {
    _mm512_storeu_si512(p, bits(_mm512_cvtne2ps_pbh(y.v, x.v)));
  } else {
    store(static_cast<float*>(p), x);
    store(static_cast<float*>(p) + kLanes, y);
  }
}

// 4 * kFours rows at a time: what a row needs once (two horizontal folds, the maximum's update, an
// exponential) costs as much as three vectors of probabilities, unless sixteen rows share it.
template <bool kPairs, int kFours>
void softmax_rows(const SoftmaxStep& s, int first, int rows) {
  constexpr int kDegree = kPairs ? 3 : 5;
  constexpr int64_t kElement = kPairs ? 2 : 4;
  const auto full = [&](int i) { return s.begin[i] <= s.from && s.end[i] >= s.to; };
  const Vec scale = set1(s.scale);
  Vec part[4 * kFours];
  for (int i = 0; i < 4 * kFours; ++i) part[i] = set1(kMinusInf);
  for (int i = 0; i < rows; ++i) {
    const float* row = s.scores + (first + i) * s.ld;
    const int begin = s.begin[first + i], end = s.end[first + i];
    Vec x = part[i], y = part[i];
    if (full(first + i)) {
      for (int c = s.from; c < s.to; c += kPanel) {
        x = vmax(x, load(row + c));
        y = vmax(y, load(row + c + kLanes));
      }
    } else {
      for (int c = s.from; c < s.to; c += kLanes)
        x = {_mm512_mask_max_ps(x.v, visible(c, begin, end), x.v, load(row + c).v)};
    }
    part[i] = vmax(x, y);
  }
  const Vec before = load_part(s.max + first, rows);
  const Vec now = vmax(before, maxima_of<kFours>(part) * scale);
  // Equal also where nothing was or is visible: both are -inf, whose difference is NaN.
  const __mmask16 same = _mm512_cmp_ps_mask(before.v, now.v, _CMP_EQ_OQ);
  const Vec shrink = {_mm512_mask_mov_ps(exp2<5>(before - now).v, same, set1(1.0f).v)};
  store_part(s.max + first, now, rows);
  store_part(s.shrink + first, shrink, rows);

  for (int i = 0; i < 4 * kFours; ++i) part[i] = zero();
  for (int i = 0; i < rows; ++i) {
    const float* row = s.scores + (first + i) * s.ld;
    auto* p = static_cast<std::byte*>(s.p) + (first + i) * s.ld * kElement;
    const Vec max = set1(-s.max[first + i]);
    const int begin = s.begin[first + i], end = s.end[first + i];
    Vec u = zero(), v = zero();
    if (full(first + i)) {
      for (int c = s.from; c < s.to; c += kPanel) {
        const Vec x = exp2<kDegree>(fma(load(row + c), scale, max));
        const Vec y = exp2<kDegree>(fma(load(row + c + kLanes), scale, max));
        u = u + x;
        v = v + y;
        put<kPairs>(p + c * kElement, x, y);
      }
    } else {
      for (int c = s.from; c < s.to; c += kPanel) {
        const __mmask16 mx = visible(c, begin, end), my = visible(c + kLanes, begin, end);
        const Vec x = {_mm512_maskz_mov_ps(mx, exp2<kDegree>(fma(load(row + c), scale, max)).v)};
        const Vec y = {_mm512_maskz_mov_ps(my, exp2<kDegree>(fma(load(row + c + kLanes), scale, max)).v)};
        u = u + x;
        v = v + y;
        put<kPairs>(p + c * kElement, x, y);
      }
    }
    part[i] = u + v;
  }
  store_part(s.sum + first, fma(load_part(s.sum + first, rows), shrink, sums_of<kFours>(part)), rows);
}

template <bool kPairs>
void softmax_tile(const SoftmaxStep& s) {
  for (int i = 0; i < s.rows; i += 16) {
    const int rows = s.rows - i < 16 ? s.rows - i : 16;
    if (rows <= 4)
      softmax_rows<kPairs, 1>(s, i, rows);
    else if (rows <= 8)
      softmax_rows<kPairs, 2>(s, i, rows);
    else
      softmax_rows<kPairs, 4>(s, i, rows);
  }
}

constexpr TileOps kTileBf16 = {2, kPanel, rows_bf16, pack_keys_bf16, pack_values_bf16, scores_bf16, values_bf16,
                               softmax_tile<true>};
constexpr AttentionOps with_tiles(AttentionOps ops, const TileOps* bf16) {
  ops.f32.softmax = softmax_tile<false>;
  ops.bf16 = bf16;
  return ops;
}
constexpr AttentionOps kOps = with_tiles(kF32Ops, nullptr);
constexpr AttentionOps kBf16Ops = with_tiles(kF32Ops, &kTileBf16);

}  // namespace

const AttentionOps& attention_ops_avx512() { return kOps; }
const AttentionOps& attention_ops_avx512_bf16() {
  static const AttentionOps ops = [] {
    AttentionOps o = kBf16Ops;
    o.narrow = &attention_narrow_avx512();
    o.heads = &attention_heads_avx512();
    o.lanes = &attention_lanes_avx512();
    return o;
  }();
  return ops;
}

}  // namespace lacuna::cpu

#endif

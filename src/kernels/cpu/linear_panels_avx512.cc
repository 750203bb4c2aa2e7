// Products with weights that were packed once, for matrices that stay in the caches. Vectors run along N, so that a
// load gives one word of k for 16 weight rows, words of x are broadcast as they lie, and rows of y come out as rows:
// nothing is transposed in a call. A matrix is read from one end to the other, what the hardware asks for ahead. Sums
// and their order are those of the large-M body, bit for bit.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

constexpr int kLanes = 16;
// Eight rows of x by three vectors of weights: 24 sums, the vectors and a broadcast fit 32 registers, and 11 loads
// serve 24 multiply-adds. K = 192 of three vectors are 18 KB, which stay in the L1 for all rows of x.
constexpr int kMostRows = 8;

template <bool kPairs>
inline __m512 multiply_add(__m512 sum, __m512 x, __m512 w) {
  if constexpr (kPairs) return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  return _mm512_fmadd_ps(x, w, sum);
}

// kRows rows of x times a panel of kVectors; column 0 of y is the panel's first.
template <bool kPairs, int kRows, int kVectors>
void panel_tile(const LinearPiece& p, const float* x, int64_t x_words, const float* w, int64_t words, int64_t column,
                float* y) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t j = 0; j < words; ++j, w += kVectors * kLanes) {
    __m512 wv[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) wv[v] = _mm512_loadu_ps(w + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 xr = _mm512_set1_ps(x[r * x_words + j]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add<kPairs>(sum[r][v], xr, wv[v]);
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = column + v * kLanes, left = p.count - first;
    const __mmask16 live = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(live, p.bias + first) : _mm512_setzero_ps();
    const __m512 scale = p.row_scale ? _mm512_maskz_loadu_ps(live, p.row_scale + first) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* to = y + r * p.y_stride + first;
      __m512 value = _mm512_fmadd_ps(sum[r][v], scale, bias);
      if (p.accumulate) value = _mm512_add_ps(_mm512_maskz_loadu_ps(live, to), value);
      _mm512_mask_storeu_ps(to, live, value);
    }
  }
}

template <bool kPairs, int kVectors, int kRows = kMostRows>
void panel_rows(const LinearPiece& p, int64_t row, int64_t x_words, const float* w, int64_t words, int64_t column) {
  for (; row + kRows <= p.m; row += kRows)
    panel_tile<kPairs, kRows, kVectors>(p, static_cast<const float*>(p.x) + row * x_words, x_words, w, words, column,
                                        p.y + row * p.y_stride);
  if constexpr (kRows > 1)
    if (row < p.m) panel_rows<kPairs, kVectors, kRows - 1>(p, row, x_words, w, words, column);
}

template <bool kPairs>
void product_of(const LinearPiece& p, int64_t x_words) {
  const int64_t words = kPairs ? (p.k + 1) / 2 : p.k, vectors = (p.count + kLanes - 1) / kLanes;
  const float* w = static_cast<const float*>(p.weight);
  for (int64_t v = 0, take; v < vectors; v += take) {
    take = panel_vectors(vectors - v);
    const auto rows = take == 3 ? panel_rows<kPairs, 3> : take == 2 ? panel_rows<kPairs, 2> : panel_rows<kPairs, 1>;
    rows(p, 0, x_words, w + v * words * kLanes, words, v * kLanes);
  }
}

void product(const LinearPiece& p, int64_t x_words) {
  p.operand == Operand::kBf16Pair ? product_of<true>(p, x_words) : product_of<false>(p, x_words);
}

// elementwise_body.h's gelu_tanh in 11 instructions instead of 22, since two a cycle bound it: exp2<3>'s polynomial
// (7.5e-5), of what lies above the next integer below, which VREDUCEPS gives and VSCALEFPS puts back; both take
// infinities, so that a cube may overflow: beyond 20 the result is x or 0 anyway. A reciprocal of 14 bits (6e-5).
inline __m512 gelu(__m512 x) {
  const __m512 cubic = _mm512_set1_ps(-2.30220819813f * 0.044715f), linear = _mm512_set1_ps(-2.30220819813f);
  const __m512 t = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cubic, linear));  // -2 sqrt(2/pi) log2(e) …
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(7.802452269e-02f), f, _mm512_set1_ps(2.260671554e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.958335406e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999252185e-01f));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, t))));
}

template <bool kPairs>
void pack_gelu_of(const float* y, int64_t y_stride, int64_t rows, int64_t count, float* words, int64_t x_words) {
  for (int64_t r = 0; r < rows; ++r, y += y_stride, words += x_words)
    for (int64_t c = 0; c < count; c += 2 * kLanes) {
      const __m512 a = gelu(_mm512_loadu_ps(y + c)), b = gelu(_mm512_loadu_ps(y + c + kLanes));
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
      if constexpr (kPairs) {
        _mm512_storeu_si512(words + c / 2, both);
        continue;
      }
      for (int half = 0; half < 2; ++half) {
        const __m256i some = half ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both);
        _mm512_storeu_si512(words + c + half * kLanes, _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
      }
    }
}

void pack_gelu(Operand operand, const float* y, int64_t y_stride, int64_t rows, int64_t count, float* words,
               int64_t x_words) {
  const auto pack = operand == Operand::kBf16Pair ? pack_gelu_of<true> : pack_gelu_of<false>;
  pack(y, y_stride, rows, count, words, x_words);
}

constexpr PanelBodies kBodies{kLanes, product, pack_gelu};

}  // namespace

const PanelBodies& linear_panels_avx512() { return kBodies; }

}  // namespace lacuna::cpu

#endif

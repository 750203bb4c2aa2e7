// Products with weights that were packed once, for matrices that stay in the caches. Vectors run along N, so that a
// load gives one word of k for 16 weight rows, words of x are broadcast as they lie, and rows of y come out as rows:
// nothing is transposed in a call. Sums and their order are those of the large-M body, bit for bit.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

constexpr int kLanes = 16;
// Eight rows of x by three vectors of weights: 24 sums, the vectors and a broadcast fit 32 registers, and 11 loads
// serve 24 multiply-adds. K = 192 of three vectors are 18 KB, which stay in the L1 for all rows of x.
constexpr int kMostRows = 8, kMostVectors = 3;

// kRows rows of x times kVectors panels; column 0 of y is the first panel's first.
template <int kRows, int kVectors>
void panel_tile(const LinearPiece& p, const float* x, int64_t x_words, const float* w, int64_t words, int64_t column,
                float* y) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  const int64_t panel = words * kLanes;
  for (int64_t j = 0; j < words; ++j) {
    __m512bh wv[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) wv[v] = reinterpret_cast<__m512bh>(_mm512_loadu_ps(w + v * panel + j * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto xr = reinterpret_cast<__m512bh>(_mm512_set1_ps(x[r * x_words + j]));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], xr, wv[v]);
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

template <int kVectors, int kRows = kMostRows>
void panel_rows(const LinearPiece& p, int64_t row, int64_t x_words, const float* w, int64_t words, int64_t column) {
  for (; row + kRows <= p.m; row += kRows)
    panel_tile<kRows, kVectors>(p, static_cast<const float*>(p.x) + row * x_words, x_words, w, words, column,
                                p.y + row * p.y_stride);
  if constexpr (kRows > 1)
    if (row < p.m) panel_rows<kVectors, kRows - 1>(p, row, x_words, w, words, column);
}

void product(const LinearPiece& p, int64_t x_words) {
  const int64_t words = (p.k + 1) / 2, vectors = (p.count + kLanes - 1) / kLanes;
  const float* w = static_cast<const float*>(p.weight);
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    // Four are two and two: few sums do not cover the latency of the products.
    const int64_t take = left >= kMostVectors && left != kMostVectors + 1 ? kMostVectors : left >= 2 ? 2 : 1;
    const auto rows = take == 3 ? panel_rows<3> : take == 2 ? panel_rows<2> : panel_rows<1>;
    rows(p, 0, x_words, w + v * words * kLanes, words, v * kLanes);
    v += take;
  }
}

// elementwise_body.h's gelu_tanh in 14 instructions instead of 22, since two a cycle bound it: exp2<3>'s polynomial
// (7.5e-5) with the exponent taken and put back by instructions made for it, which also saturate, and a reciprocal of
// 14 bits (6e-5). Magnitudes are held at 2^20, so that a cube does not overflow: beyond 20 the result is x or 0 anyway.
inline __m512 gelu(__m512 x) {
  const Vec cubic = set1(-2.30220819813f * 0.044715f), linear = set1(-2.30220819813f);  // -2 sqrt(2/pi) log2(e)
  const Vec a = {_mm512_range_ps(x, set1(1048576.0f).v, 2)};  // the smaller magnitude, with the sign of x
  const Vec t = a * fma(a * a, cubic, linear);
  const Vec n = {_mm512_roundscale_ps(t.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const Vec f = t - n;
  Vec p = fma(set1(5.517166909e-02f), f, set1(2.426111222e-01f));
  p = fma(p, f, set1(6.932609855e-01f));
  p = fma(p, f, set1(9.999280735e-01f));
  return _mm512_mul_ps(x, _mm512_rcp14_ps((set1(1.0f) + Vec{_mm512_scalef_ps(p.v, n.v)}).v));
}

void pack_gelu(const float* y, int64_t y_stride, int64_t rows, int64_t count, float* words, int64_t x_words) {
  for (int64_t r = 0; r < rows; ++r, y += y_stride, words += x_words)
    for (int64_t c = 0; c < count; c += 2 * kLanes) {
      const __m512 a = gelu(_mm512_loadu_ps(y + c)), b = gelu(_mm512_loadu_ps(y + c + kLanes));
      _mm512_storeu_ps(words + c / 2, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(b, a)));
    }
}

constexpr PanelBodies kBodies{kLanes, product, pack_gelu};

}  // namespace

const PanelBodies& linear_panels_avx512() { return kBodies; }

}  // namespace lacuna::cpu

#endif

// The second half of attention_decode_avx512.cc, which says what it computes and how exactly: probabilities from
// scores, and what they weigh.
#if defined(__x86_64__)

#include "kernels/cpu/attention_decode_narrow.h"

namespace lacuna::cpu {
namespace {

// ---- softmax --------------------------------------------------------------------------------------

inline __mmask16 visible(int at, int begin, int end) {
  const int lo = begin - at, hi = end - at;
  const uint32_t above = lo <= 0 ? 0xffffu : lo >= 16 ? 0u : 0xffffu << lo;
  const uint32_t below = hi <= 0 ? 0u : hi >= 16 ? 0xffffu : (1u << hi) - 1u;
  return static_cast<__mmask16>(above & below);
}

// A running maximum that is too small by so much is left alone: probabilities up to 2^8 lose nothing in
// floating point. Nearly every step then finds nothing to change, and since that is predicted, the
// exponentials don't wait for the comparison, nor is anything folded.
constexpr float kSlack = 8;

template <bool kPairs>
[[gnu::always_inline]] inline void put_probabilities(const SoftmaxStep& s, int i, int c, Vec x, Vec y) {
  if constexpr (kPairs) {
    const __m512bh p = _mm512_cvtne2ps_pbh(y.v, x.v);
    _mm512_storeu_si512(static_cast<uint16_t*>(s.p) + i * s.ld + c, reinterpret_cast<__m512i>(p));
  } else {
    store(static_cast<float*>(s.p) + i * s.ld + c, x);
    store(static_cast<float*>(s.p) + i * s.ld + c + kLanes, y);
  }
}

// Any row.
template <bool kPairs>
[[gnu::noinline]] void softmax_row(const SoftmaxStep& s, int i) {
  constexpr int kDegree = kPairs ? 3 : 5;
  const Vec scale = set1(s.scale);
  const float* row = s.scores + i * s.ld;
  const int begin = s.begin[i], end = s.end[i];
  const Vec most = set1(s.max[i] + kSlack);
  __mmask16 above = 0;
  for (int c = s.from; c < s.to; c += kLanes)
    above = static_cast<__mmask16>(
        above | _mm512_mask_cmp_ps_mask(visible(c, begin, end), (load(row + c) * scale).v, most.v, _CMP_GT_OQ));
  Vec sum = load(s.sum + i * kLanes);
  s.shrink[i] = 1;
  if (above) {
    Vec top = set1(s.max[i]);
    for (int c = s.from; c < s.to; c += kLanes)
      top = {_mm512_mask_max_ps(top.v, visible(c, begin, end), (load(row + c) * scale).v, top.v)};
    const float now = largest(top);
    // exp2 of -inf, before anything was seen, is as good as 0: the sums are 0.
    s.shrink[i] = _mm512_cvtss_f32(exp2<5>(set1(s.max[i] - now)).v);
    s.max[i] = now;
    sum = sum * set1(s.shrink[i]);
  }
  const Vec max = set1(-s.max[i]);
  for (int c = s.from; c < s.to; c += 2 * kLanes) {
    const Vec x = {_mm512_maskz_mov_ps(visible(c, begin, end), exp2<kDegree>(fma(load(row + c), scale, max)).v)};
    const Vec y = {
        _mm512_maskz_mov_ps(visible(c + kLanes, begin, end), exp2<kDegree>(fma(load(row + c + kLanes), scale, max)).v)};
    sum = sum + (x + y);
    put_probabilities<kPairs>(s, i, c, x, y);
  }
  store(s.sum + i * kLanes, sum);
}

template <bool kPairs>
void softmax_rows(const SoftmaxStep& s) {
  constexpr int kDegree = kPairs ? 3 : 5;
  const Vec scale = set1(s.scale);
  for (int i = 0; i < s.rows; ++i) {
    // What nearly every row is: 32 columns, all of them seen, none above.
    const float* row = s.scores + i * s.ld + s.from;
    const Vec a = load(row), b = load(row + kLanes);
    const bool full = s.to - s.from == 2 * kLanes && s.begin[i] <= s.from && s.end[i] >= s.to;
    const __mmask16 above = _mm512_cmp_ps_mask((vmax(a, b) * scale).v, set1(s.max[i] + kSlack).v, _CMP_GT_OQ);
    if (!full || above) {
      softmax_row<kPairs>(s, i);
      continue;
    }
    const Vec max = set1(-s.max[i]);
    const Vec x = exp2<kDegree>(fma(a, scale, max)), y = exp2<kDegree>(fma(b, scale, max));
    s.shrink[i] = 1;
    store(s.sum + i * kLanes, load(s.sum + i * kLanes) + (x + y));
    put_probabilities<kPairs>(s, i, s.from, x, y);
  }
}

}  // namespace

void narrow_softmax(DType dtype, const SoftmaxStep& step) {
  if (dtype == DType::kBF16) return softmax_rows<true>(step);
  softmax_rows<false>(step);
}

namespace {

// ---- values ---------------------------------------------------------------------------------------

// Slots whose digits and interleaved values are alive at a time: 2 KB of values, 1 KB of digits.
constexpr int kBlock = 32;

struct Digits {
  alignas(64) uint8_t hi[kMaxRows][kBlock], lo[kMaxRows][kBlock];
  float scale[kMaxRows + 3];  // fours are written
};

// p[i] * scales[i] = scale (256 hi + lo) for a block of kQ <= 4 rows, zero digits up to kBlock.
template <int kQ>
void take_digits(const float* p, int64_t ld, const float* scales, int count, Digits& digits, int first_row) {
  constexpr int kVectors = kBlock / kLanes;
  Vec w[kQ * kVectors], most[4] = {zero(), zero(), zero(), zero()};
  const __mmask16 live[kVectors] = {first(least(count, kLanes)), first(count > kLanes ? count - kLanes : 0)};
  const Vec scale[kVectors] = {{_mm512_maskz_loadu_ps(live[0], scales)},
                               {_mm512_maskz_loadu_ps(live[1], scales + kLanes)}};
#pragma GCC unroll 4
  for (int i = 0; i < kQ; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      w[i * kVectors + j] = Vec{_mm512_maskz_loadu_ps(live[j], p + i * ld + j * kLanes)} * scale[j];
    most[i] = vmax(w[i * kVectors], w[i * kVectors + 1]);
  }
  const __m128 top = _mm512_castps512_ps128(maxima_of<1>(most).v);
  // So small that its reciprocal overflows: nothing that a sum of probabilities can tell from 0.
  const __mmask8 some = _mm_cmp_ps_mask(top, _mm_set1_ps(1e-30f), _CMP_GT_OQ);
  float inverse[4];
  _mm_storeu_ps(inverse, _mm_maskz_div_ps(some, _mm_set1_ps(65535.0f), top));
  _mm_storeu_ps(digits.scale + first_row, _mm_maskz_mul_ps(some, _mm_set1_ps(1 / 65535.0f), top));
#pragma GCC unroll 4
  for (int i = 0; i < kQ; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const __m512i t = _mm512_cvtps_epi32((w[i * kVectors + j] * set1(inverse[i])).v);
      _mm_store_si128(reinterpret_cast<__m128i*>(digits.hi[first_row + i] + j * kLanes),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(t, 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(digits.lo[first_row + i] + j * kLanes), _mm512_cvtepi32_epi8(t));
    }
  }
}

template <int kQ>
struct TakeDigits {
  static void run(int first_row, const float* p, int64_t ld, const float* scales, int count, Digits* digits) {
    take_digits<kQ>(p + first_row * ld, ld, scales, count, *digits, first_row);
  }
};

// Four slots' codes side by side in a word. Columns stay within their quarter of a row: word 4l + i of
// vector t is column 16l + 4t + i. `restore` puts the sums in order when all slots are done.
void interleave_quads(const int8_t* v, int count, int d, __m512i* out) {
  const __m512i none = _mm512_setzero_si512();
  for (int s = 0; s < count; s += 4, v += 4 * static_cast<int64_t>(d), out += 4) {
    const int n = count - s;
    const __m512i r0 = words(v), r1 = n > 1 ? words(v + d) : none, r2 = n > 2 ? words(v + 2 * d) : none,
                  r3 = n > 3 ? words(v + 3 * d) : none;
    const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
    const __m512i x = _mm512_unpacklo_epi8(r2, r3), y = _mm512_unpackhi_epi8(r2, r3);
    out[0] = _mm512_unpacklo_epi16(a, x);
    out[1] = _mm512_unpackhi_epi16(a, x);
    out[2] = _mm512_unpacklo_epi16(b, y);
    out[3] = _mm512_unpackhi_epi16(b, y);
  }
}

template <int kQ>
struct DigitValues {
  // Adds `quads` groups of four slots to 64 columns of kQ rows of out. The lines ahead, as many as slots, are asked
  // for by the first two groups of rows, or by the only one.
  static void run(int first_row, const __m512i* values, int quads, const Digits& digits, float* out, int64_t ld,
                  int rows, const char* next) {
    constexpr int kW = kQ <= 2 ? 4 : 2;  // 8 … 16 sums
    const bool halves = rows > 4;
    int left = !next || first_row > 4 ? 0 : halves ? 2 * quads : 4 * quads;
    if (left && first_row) next += 2 * quads * 64;
    for (int t = 0; t < 4; t += kW) {
      __m512i hi[kQ * kW], lo[kQ * kW];
#pragma GCC unroll 16
      for (int i = 0; i < kQ * kW; ++i) hi[i] = lo[i] = _mm512_setzero_si512();
      for (int g = 0; g < quads; ++g) {
        if (left > 0) next = once_here(next, values + 4 * g + t);
        for (int l = halves ? kW / 2 : kW; l > 0 && left > 0; --l, --left, next += 64) prefetch(next);
        __m512i v[kW];
#pragma GCC unroll 4
        for (int w = 0; w < kW; ++w) v[w] = words(values + 4 * g + t + w);
#pragma GCC unroll 4
        for (int i = 0; i < kQ; ++i) {
          const __m512i h = word(digits.hi[first_row + i] + 4 * g), l = word(digits.lo[first_row + i] + 4 * g);
#pragma GCC unroll 4
          for (int w = 0; w < kW; ++w) {
            add_quads(hi[i * kW + w], h, v[w]);
            add_quads(lo[i * kW + w], l, v[w]);
          }
        }
      }
      // 32 slots of 255 * 127 * 256 stay below 2^31.
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
        for (int w = 0; w < kW; ++w) {
          float* o = out + (first_row + i) * ld + (t + w) * kLanes;
          const Vec sum = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi[i * kW + w], 8), lo[i * kW + w]))};
          store(o, fma(sum, set1(digits.scale[first_row + i]), load(o)));
        }
    }
  }
};

void digit_values(const int8_t* v, const float* scales, int count, int d, const float* p, int64_t ld, int rows,
                  float* out, int64_t ld_out, const void* next) {
  Digits digits;
  __m512i values[kBlock];
  for (int s = 0; s < count; s += kBlock) {
    const int n = least(kBlock, count - s), quads = (n + 3) / 4;
    each_group<4, TakeDigits>(rows, p + s, ld, scales + s, n, &digits);
    const int64_t at = static_cast<int64_t>(s) * d;
    for (int c = 0; c < d; c += 64) {
      interleave_quads(v + at + c, n, d, values);
      each_group<4, DigitValues>(rows, static_cast<const __m512i*>(values), quads, digits, out + c, ld_out, rows,
                                 next ? static_cast<const char*>(next) + at + int64_t{c} * n : nullptr);
    }
  }
}

template <int kQ>
struct PairValues {
  // p is bf16 of stride ld.
  static void run(int first_row, const uint16_t* v, int count, int d, const uint16_t* p, int64_t ld, float* out,
                  int64_t ld_out, const char* next) {
    p += first_row * ld;
    out += first_row * ld_out;
    if (first_row) next = nullptr;
    int c = 0;
    // A row or few would wait for their own sums: two lines of a slot at once.
    if constexpr (kQ <= 4)
      for (; c + 64 <= d; c += 64)
        columns<2>(v + c, count, d, p, ld, out + c, ld_out, next ? next + int64_t{c} * count * 2 : nullptr);
    for (; c < d; c += 32)
      columns<1>(v + c, count, d, p, ld, out + c, ld_out, next ? next + int64_t{c} * count * 2 : nullptr);
  }

  // 32 columns times kB.
  template <int kB>
  static void columns(const uint16_t* v, int count, int d, const uint16_t* p, int64_t ld, float* out, int64_t ld_out,
                      const char* next) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
    }
    const __m512i low = words(order[0]), high = words(order[1]);
    constexpr int kW = 2 * kB;
    __m512 sums[kQ * kW];
#pragma GCC unroll 8
    for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < kW; ++w) sums[i * kW + w] = load(out + i * ld_out + w * kLanes).v;
    for (int s = 0; s < count; s += 2, v += 2 * d) {
      const bool both = s + 1 < count;
      __m512i x[kW];
#pragma GCC unroll 2
      for (int b = 0; b < kB; ++b) {
        if (next) {
          next = once_here(next, v + b * 32);
          prefetch(next);
          prefetch(next + 64);
          next += 128;
        }
        const __m512i even = words(v + b * 32), odd = both ? words(v + d + b * 32) : _mm512_setzero_si512();
        x[2 * b] = _mm512_permutex2var_epi16(even, low, odd);
        x[2 * b + 1] = _mm512_permutex2var_epi16(even, high, odd);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kQ; ++i) {
        // Behind the last probability lies another slot's, or nobody's: even times 0 a NaN would count.
        const uint16_t* q = p + i * ld + s;
        const __m512i y = both ? word(q) : _mm512_set1_epi32(*q);
#pragma GCC unroll 4
        for (int w = 0; w < kW; ++w) add_pairs(sums[i * kW + w], x[w], y);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < kW; ++w) store(out + i * ld_out + w * kLanes, {sums[i * kW + w]});
  }
};

}  // namespace

void narrow_values(DType dtype, const void* codes, const float* scales, int count, int d, const void* p, int64_t ld,
                   int rows, float* out, int64_t ld_out, const void* next) {
  if (dtype == DType::kI8)
    return digit_values(static_cast<const int8_t*>(codes), scales, count, d, static_cast<const float*>(p), ld, rows,
                        out, ld_out, next);
  each_group<8, PairValues>(rows, static_cast<const uint16_t*>(codes), count, d, static_cast<const uint16_t*>(p), ld,
                            out, ld_out, static_cast<const char*>(next));
}

void narrow_restore(DType dtype, float* sums, int64_t ld, int rows, int d) {
  if (dtype != DType::kI8) return;
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < d; c += 64) {
      float* at = sums + i * ld + c;
      const __m512 a = load(at).v, b = load(at + 16).v, x = load(at + 32).v, y = load(at + 48).v;
      const __m512 s = _mm512_shuffle_f32x4(a, b, 0x44), t = _mm512_shuffle_f32x4(x, y, 0x44);
      const __m512 u = _mm512_shuffle_f32x4(a, b, 0xee), w = _mm512_shuffle_f32x4(x, y, 0xee);
      store(at, {_mm512_shuffle_f32x4(s, t, 0x88)});
      store(at + 16, {_mm512_shuffle_f32x4(s, t, 0xdd)});
      store(at + 32, {_mm512_shuffle_f32x4(u, w, 0x88)});
      store(at + 48, {_mm512_shuffle_f32x4(u, w, 0xdd)});
    }
}

}  // namespace lacuna::cpu

#endif

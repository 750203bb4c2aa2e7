// The second half of attention_decode_avx512.cc, which says what it computes and how exactly: probabilities from
// scores, and what they weigh.
#if defined(__x86_64__)

#include <type_traits>

#include "kernels/cpu/attention_decode_narrow.h"

namespace lacuna::cpu {
namespace {

// ---- softmax --------------------------------------------------------------------------------------

// Two vectors of a row: to the sum, and to p in bf16, or weighted to x for put_digits.
template <bool kPairs>
[[gnu::always_inline]] inline void put_probabilities(uint16_t* p, float* to, const float* weights, Vec x, Vec y,
                                                     Vec& sum, Vec& most) {
  sum = sum + (x + y);
  if constexpr (kPairs) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y.v, x.v)));
  } else {
    x = x * load(weights);
    y = y * load(weights + kLanes);
    most = vmax(vmax(x, y), most);
    store(to, x);
    store(to + kLanes, y);
  }
}

// Row i's columns, weighted, whose largest is `top` -> digit_scale (256 hi + lo), and those of up to 64 more.
[[gnu::always_inline]] inline void put_digits(const SoftmaxStep& s, int i, const float* weighted, float top) {
  // Packing leaves four slots together, and fours 4 v + l at word 4 l + v.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_set1_epi16(255);
  // So small that its reciprocal overflows: nothing that a sum of probabilities can tell from 0.
  const bool some = top > 1e-30f;
  s.digit_scale[i] = some ? top * (1 / 65535.0f) : 0.0f;
  const Vec by = set1(some ? 65535.0f / top : 0.0f);
  auto* hi = static_cast<uint8_t*>(s.p) + 2 * i * s.ld;
  uint8_t* lo = hi + s.ld;
  for (int c = s.from; c < s.to; c += 4 * kLanes) {
    __m512i t[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) t[j] = _mm512_cvtps_epi32((load(weighted + c + j * kLanes) * by).v);
    const __m512i a = _mm512_packus_epi32(t[0], t[1]), b = _mm512_packus_epi32(t[2], t[3]);
    const __m512i h = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    const __m512i l = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
    _mm512_storeu_si512(hi + c, _mm512_permutexvar_epi32(order, h));
    _mm512_storeu_si512(lo + c, _mm512_permutexvar_epi32(order, l));
  }
}

void raise(const SoftmaxStep& s, int i, Vec top) {
  const float now = largest(top);
  // exp2 of -inf, before anything was seen, is as good as 0: the sums are 0.
  s.shrink[i] = _mm512_cvtss_f32(exp2<5>(set1(s.max[i] - now)).v);
  s.max[i] = now;
}

// Any row. Returns the largest that it weighted.
template <bool kPairs>
[[gnu::noinline]] float softmax_row(const SoftmaxStep& s, const float* weights, float* weighted, int i) {
  constexpr int kDegree = kPairs ? 3 : 4;
  const Vec scale = set1(s.scale);
  const float* row = s.scores + i * s.ld;
  auto* p = static_cast<uint16_t*>(s.p) + i * s.ld;
  const int begin = s.begin[i], end = s.end[i];
  const Vec most = set1(s.max[i] + kSlack);
  __mmask16 above = 0;
  for (int c = s.from; c < s.to; c += kLanes)
    above = static_cast<__mmask16>(
        above | _mm512_mask_cmp_ps_mask(visible(c, begin, end), (load(row + c) * scale).v, most.v, _CMP_GT_OQ));
  Vec sum = load(s.sum + i * kLanes), most_weighted = zero();
  s.shrink[i] = 1;
  if (above) {
    Vec top = set1(s.max[i]);
    for (int c = s.from; c < s.to; c += kLanes)
      top = {_mm512_mask_max_ps(top.v, visible(c, begin, end), (load(row + c) * scale).v, top.v)};
    raise(s, i, top);
    sum = sum * set1(s.shrink[i]);
  }
  const Vec max = set1(-s.max[i]);
  for (int c = s.from; c < s.to; c += 2 * kLanes) {
    const Vec x = {_mm512_maskz_mov_ps(visible(c, begin, end), power<kDegree>(fma(load(row + c), scale, max)).v)};
    const Vec y = {_mm512_maskz_mov_ps(visible(c + kLanes, begin, end),
                                       power<kDegree>(fma(load(row + c + kLanes), scale, max)).v)};
    put_probabilities<kPairs>(p + c, weighted + c, weights + c, x, y, sum, most_weighted);
  }
  store(s.sum + i * kLanes, sum);
  return kPairs ? 0.0f : largest(most_weighted);
}

// What nearly every row is: all columns seen, kTwos times 32 of them.
template <bool kPairs, int kTwos>
[[gnu::always_inline]] inline float softmax_full_row(const SoftmaxStep& s, const float* weights, float* weighted,
                                                     int i) {
  constexpr int kDegree = kPairs ? 3 : 4, kVectors = 2 * kTwos;
  const Vec scale = set1(s.scale);
  const float* row = s.scores + i * s.ld + s.from;
  Vec x[kVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) x[c] = load(row + c * kLanes);
  Vec top = x[0];
#pragma GCC unroll 8
  for (int c = 1; c < kVectors; ++c) top = vmax(x[c], top);
  Vec sum = load(s.sum + i * kLanes), most = zero();
  s.shrink[i] = 1;
  if (_mm512_cmp_ps_mask((top * scale).v, set1(s.max[i] + kSlack).v, _CMP_GT_OQ)) {
    raise(s, i, top * scale);
    sum = sum * set1(s.shrink[i]);
  }
  const Vec max = set1(-s.max[i]);
  auto* p = static_cast<uint16_t*>(s.p) + i * s.ld + s.from;
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; c += 2) {
    const Vec y = power<kDegree>(fma(x[c], scale, max)), z = power<kDegree>(fma(x[c + 1], scale, max));
    const int at = s.from + c * kLanes;
    put_probabilities<kPairs>(p + c * kLanes, weighted + at, weights + at, y, z, sum, most);
  }
  store(s.sum + i * kLanes, sum);
  return kPairs ? 0.0f : largest(most);
}

// A row's digits come after the next row's exponentials: the way from the one to the other is long, and what waits
// takes the places of what could run.
template <bool kPairs, int kTwos>
void softmax_rows(const SoftmaxStep& s, const float* weights) {
  alignas(64) float weighted[2][kStreamTile + 2 * kLanes];
  for (float* w : weighted) {
    store(w + s.to, zero());
    store(w + s.to + kLanes, zero());
  }
  float before = 0;
  for (int i = 0; i <= s.rows; ++i) {
    float top = 0;
    if (i < s.rows) {
      if (s.begin[i] <= s.from && s.end[i] >= s.to)
        top = softmax_full_row<kPairs, kTwos>(s, weights, weighted[i % 2], i);
      else
        top = softmax_row<kPairs>(s, weights, weighted[i % 2], i);
    }
    if (!kPairs && i > 0) put_digits(s, i - 1, weighted[(i - 1) % 2], before);
    before = top;
  }
}

template <bool kPairs>
void softmax_rows(const SoftmaxStep& s, const float* weights) {
  static_assert(kStreamTile == 4 * 2 * kLanes);
  switch ((s.to - s.from) / (2 * kLanes)) {
    case 1:
      return softmax_rows<kPairs, 1>(s, weights);
    case 2:
      return softmax_rows<kPairs, 2>(s, weights);
    case 3:
      return softmax_rows<kPairs, 3>(s, weights);
    default:
      return softmax_rows<kPairs, 4>(s, weights);
  }
}

}  // namespace

void narrow_softmax(DType dtype, const SoftmaxStep& step, const SlotRun* runs, int n) {
  if (dtype == DType::kBF16) return softmax_rows<true>(step, nullptr);
  alignas(64) float weights[kStreamTile + kLanes];
  copy_scales(runs, n, step.to, weights);
  softmax_rows<false>(step, weights);
}

namespace {

// ---- values ---------------------------------------------------------------------------------------

// Slots whose interleaved values are alive at a time: 8 KB of values. Sums of 65535 * 127 stay below 2^31.
constexpr int kBlock = 128;

// Bytes from a row to the next, from hi to lo, from four slots to the next four.
template <int kRowBytes, int kLowBytes, int kQuadBytes>
struct DigitsOf {
  static constexpr int kRow = kRowBytes, kLow = kLowBytes, kQuad = kQuadBytes;
  static constexpr bool kAsked = kQuadBytes > 4;  // the first lines were asked for by the softmax
  const uint8_t* p;
  const float* scale;
};
using RowDigits = DigitsOf<2 * static_cast<int>(kStreamTile), static_cast<int>(kStreamTile), 4>;
using QuadDigits = DigitsOf<8, 4, 64>;

// Up to kBlock slots in runs; only the last four may be fewer.
struct Block {
  struct Run {
    const int8_t* codes;
    const char* next;
    int quads;
  };
  int count, runs;
  Run run[kBlock / 4];
};

// Four slots' codes side by side in a word, for 64 columns. Columns stay within their quarter of a row: word 4l + i of
// vector t is column 16l + 4t + i. `restore` puts the sums in order when all slots are done. `left` slots are there.
[[gnu::always_inline]] inline void interleave(const int8_t* v, int d, int left, __m512i* out) {
  __m512i r[4] = {words(v)};
  if (left >= 4) [[likely]] {
    for (int i = 1; i < 4; ++i) r[i] = words(v + i * d);
  } else {
    for (int i = 1; i < 4; ++i) r[i] = i < left ? words(v + i * d) : _mm512_setzero_si512();
  }
  const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i x = _mm512_unpacklo_epi8(r[2], r[3]), y = _mm512_unpackhi_epi8(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi16(a, x);
  out[1] = _mm512_unpackhi_epi16(a, x);
  out[2] = _mm512_unpacklo_epi16(b, y);
  out[3] = _mm512_unpackhi_epi16(b, y);
}

template <int kQ, class Digits>
struct DigitValues {
  static constexpr int kW = kQ <= 2 ? 4 : 2;  // 8 ... 16 sums

  // Adds a block's values to 64 columns, from c on, of kQ rows of out. The lines ahead, as many as slots, are asked
  // for by the passes over the first eight rows: each has a part of every run's, one to four lines at a step.
  static void run(int first_row, __m512i* values, const Block& block, const Digits& digits, float* out, int64_t ld,
                  int rows, int d, int c) {
    const bool halves = rows > 4;
    int from = c / 16 + (first_row ? 2 : 0);  // lines of a run that were asked for before, divided by its quads
    for (int t = 0; t < 4; t += kW, from += halves ? kW / 2 : kW) {
      const auto go = [&](auto pass) {
        pass(first_row, values + t, block, digits, out + c + t * kLanes, ld, from, d, c);
      };
      if (first_row > 4)
        go(pass<0, false>);
      else if (Digits::kAsked && first_row == 0 && t == 0 && c == 0)
        go(pass<0, true>);
      else if (first_row == 0 && t == 0)
        halves ? go(pass<kW / 2, true>) : go(pass<kW, true>);
      else
        halves ? go(pass<kW / 2, false>) : go(pass<kW, false>);
    }
  }

  // The first of all passes makes the values that the others read.
  template <int kLines, bool kFirst>
  [[gnu::noinline]] static void pass(int first_row, __m512i* values, const Block& block, const Digits& digits,
                                     float* out, int64_t ld, int from, int d, int c) {
    __m512i hi[kQ * kW], lo[kQ * kW];
#pragma GCC unroll 16
    for (int i = 0; i < kQ * kW; ++i) hi[i] = lo[i] = _mm512_setzero_si512();
    const uint8_t* p = digits.p + first_row * Digits::kRow;
    int left = block.count;
    for (int r = 0; r < block.runs; ++r) {
      const int quads = block.run[r].quads;
      const char* next = block.run[r].next + from * quads * 64;
      const int8_t* codes = block.run[r].codes + c;
      // A row's kSteps quads after each other: a sum that is taken up soon is not read from the registers, whose ports
      // the stores of interleaved values need (else they take a cycle each from the products).
      const auto quads_of = [&](auto steps) __attribute__((always_inline)) {
        constexpr int kSteps = steps();
        __m512i v[kSteps][4];
#pragma GCC unroll 2
        for (int x = 0; x < kSteps; ++x) {
          if (kFirst && kLines > 1) next = once_here(next, codes);
#pragma GCC unroll 4
          for (int l = 0; l < kLines; ++l, next += 64) prefetch(next);
          if constexpr (kFirst) {
            interleave(codes, d, left, v[x]);
            codes += 4 * d;
            left -= 4;
#pragma GCC unroll 4
            for (int w = 0; w < 4; ++w) _mm512_store_si512(values + x * 4 + w, v[x][w]);
          } else {
#pragma GCC unroll 4
            for (int w = 0; w < kW; ++w) v[x][w] = words(values + x * 4 + w);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 2
          for (int x = 0; x < kSteps; ++x) {
            const uint8_t* digit = p + i * Digits::kRow + x * Digits::kQuad;
            const __m512i h = word(digit), l = word(digit + Digits::kLow);
#pragma GCC unroll 4
            for (int w = 0; w < kW; ++w) {
              add_quads(hi[i * kW + w], h, v[x][w]);
              add_quads(lo[i * kW + w], l, v[x][w]);
            }
          }
        values += kSteps * 4;
        p += kSteps * Digits::kQuad;
      };
      int g = 0;
      if constexpr (kFirst && kW == 2)
        for (; g + 2 <= quads; g += 2) quads_of(std::integral_constant<int, 2>());
      for (; g < quads; ++g) quads_of(std::integral_constant<int, 1>());
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < kW; ++w) {
        float* o = out + (first_row + i) * ld + w * kLanes;
        const Vec sum = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi[i * kW + w], 8), lo[i * kW + w]))};
        store(o, fma(sum, set1(digits.scale[first_row + i]), load(o)));
      }
  }
};

template <int kQ>
struct RowDigitValues : DigitValues<kQ, RowDigits> {};

void add_block(const Block& block, int d, const RowDigits& digits, int rows, float* out, int64_t ld_out) {
  __m512i values[kBlock];
  for (int c = 0; c < d; c += 64) each_group<4, RowDigitValues>(rows, values, block, digits, out, ld_out, rows, d, c);
}
void add_block(const Block& block, int d, const QuadDigits& digits, int rows, float* out, int64_t ld_out) {
  __m512i values[kBlock];
  for (int c = 0; c < d; c += 64) {
    DigitValues<4, QuadDigits>::run(0, values, block, digits, out, ld_out, rows, d, c);
    if (rows == 8)
      DigitValues<4, QuadDigits>::run(4, values, block, digits, out, ld_out, rows, d, c);
    else
      DigitValues<3, QuadDigits>::run(4, values, block, digits, out, ld_out, rows, d, c);
  }
}

template <class Digits>
void digit_values(const SlotRun* runs, int n, int d, Digits digits, int rows, float* out, int64_t ld_out) {
  Block block;
  int slots = 0, parts = 0;
  for (int i = 0; i < n; ++i) {
    const auto* codes = static_cast<const int8_t*>(runs[i].codes);
    const auto* next = static_cast<const char*>(runs[i].next ? runs[i].next : codes);
    for (int s = 0, some; s < runs[i].count; s += some) {
      some = least(runs[i].count - s, kBlock - slots);
      block.run[parts++] = {codes + int64_t{s} * d, next + int64_t{s} * d, (some + 3) / 4};
      slots += some;
      const bool last = i + 1 == n && s + some == runs[i].count;
      if (!last && slots % 4 == 0 && slots < kBlock) continue;
      block.count = slots;
      block.runs = parts;
      add_block(block, d, digits, rows, out, ld_out);
      digits.p += slots / 4 * Digits::kQuad + slots % 4;  // no remainder but of rows
      slots = parts = 0;
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

void narrow_values(DType dtype, const SlotRun* runs, int n, int d, const void* p, const float* digit_scale, int rows,
                   float* out, int64_t ld_out) {
  if (dtype == DType::kI8)
    return digit_values(runs, n, d, RowDigits{static_cast<const uint8_t*>(p), digit_scale}, rows, out, ld_out);
  const auto* weights = static_cast<const uint16_t*>(p);
  for (int i = 0; i < n; weights += runs[i++].count)
    each_group<8, PairValues>(rows, static_cast<const uint16_t*>(runs[i].codes), runs[i].count, d, weights, kStreamTile,
                              out, ld_out, static_cast<const char*>(runs[i].next));
}

void quad_values(DType, const SlotRun* runs, int n, int d, const void* p, const float* digit_scale, int rows,
                 float* out, int64_t ld_out) {
  digit_values(runs, n, d, QuadDigits{static_cast<const uint8_t*>(p), digit_scale}, rows, out, ld_out);
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

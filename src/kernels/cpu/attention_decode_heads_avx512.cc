// Decode over int8 caches with seven or eight query rows: what attention_decode_avx512.cc computes, as exactly, but
// with rows in lanes instead of keys, so that keys are not transposed and the softmax folds nothing. Eight bytes of a
// key are broadcast, their first word to even lanes and the second to odd lanes; lanes 2 h and 2 h + 1 of the query's
// digits are those words' of row h. Rows that are not there are zeros.
#if defined(__x86_64__)

#include <type_traits>

#include "kernels/cpu/attention_decode_narrow.h"

namespace lacuna::cpu {
namespace {

constexpr int kRows = 8;
constexpr int kKeys = kHeadSlots;  // whose scores are alive at a time

// digits [d / 8][hi, lo][16] | start [16]: what the sums of lo begin with | scale [16], in the order of scores.
// Scores, and what comes of them: [pair of slots][16], lane 4 l + 2 k + i is row 2 l + i, slot k of the pair. Behind
// those of a tile: `scale`, by which they are still to be multiplied, and each lane's largest.
struct HeadQuery {
  HeadQuery(void* base, int d)
      : digits(static_cast<int32_t*>(base)), start(digits + d * 4), scale(reinterpret_cast<float*>(start + kLanes)) {}
  int32_t* digits;
  int32_t* start;
  float* scale;
};

bool takes(DType dtype, int rows, int d) {
  return dtype == DType::kI8 && (rows == kRows - 1 || rows == kRows) && (d == 64 || d == 128);
}

int64_t query_bytes(DType, int, int d) { return 4 * (d * 4 + 2 * kLanes); }

void prepare(DType, const float* q, int64_t ldq, int rows, int d, void* out) {
  const HeadQuery query(out, d);
  __builtin_memset(out, 0, static_cast<size_t>(query_bytes(DType::kI8, rows, d)));
  for (int i = 0; i < rows; ++i, q += ldq) {
    uint32_t sum[2] = {};  // a NaN's digits may overflow; its scale says what comes of them
    const float scale = digits_of(q, d, [&](int c, __m512i hi, __m512i lo) {
      const __m512i t = _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo);
      sum[0] += static_cast<uint32_t>(_mm512_mask_reduce_add_epi32(0x0f0f, t));
      sum[1] += static_cast<uint32_t>(_mm512_mask_reduce_add_epi32(0xf0f0, t));
      int32_t part[2][4];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(part[0]), _mm512_cvtepi32_epi8(hi));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(part[1]), _mm512_cvtepi32_epi8(lo));
      int32_t* to = query.digits + c / 8 * 2 * kLanes + 2 * i;
      for (int w = 0; w < 4; ++w)
        for (int j = 0; j < 2; ++j) to[w / 2 * 2 * kLanes + j * kLanes + w % 2] = part[j][w];
    });
    // vpdpbusd takes codes + 128, unsigned: that much too much is in the sum.
    for (int j = 0; j < 2; ++j) {
      query.start[2 * i + j] = static_cast<int32_t>(0 - 128 * sum[j]);
      query.scale[i / 2 * 4 + 2 * j + i % 2] = scale;
    }
  }
}

// Eight bytes of a key as unsigned, in every pair of lanes.
[[gnu::always_inline]] inline __m512i two_words(__m512i flip, const char* key) {
  __m512i k;
  asm("vpxorq %2%{1to8%}, %1, %0" : "=v"(k) : "v"(flip), "m"(*reinterpret_cast<const char(*)[8]>(key)));
  return k;
}
// Four floats -> those of two slots, as scores lie.
template <int kPair>
[[gnu::always_inline]] inline Vec of_pair(__m512 four) {
  return {_mm512_permute_ps(four, kPair == 0 ? 0x50 : 0xfa)};
}
inline __m512 fours(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

constexpr int kScale = kRows * static_cast<int>(kStreamTile), kTop = kScale + kLanes;

// Scores of eight keys, for whose lines as many of `next` are asked for. Returns the larger of them and `top`.
template <int kD>
[[gnu::noinline]] Vec score(const HeadQuery& query, const char* keys, const float* scales, const char* next, float* out,
                            Vec top) {
  __m512i hi[kKeys], lo[kKeys];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i) {
    hi[i] = _mm512_setzero_si512();
    lo[i] = words(query.start);
  }
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(0x80808080u));
  const int32_t* q = query.digits;
  for (int c = 0; c < kD; c += 64)
#pragma GCC unroll 2
    for (int w = 0; w < 8; w += 4) {
      next = once_here(next, keys + (c / 64 * 8 + w) * 64);
      __m512i h[4], l[4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x, q += 2 * kLanes, next += 64) {
        prefetch(next);
        h[x] = words(q);
        l[x] = words(q + kLanes);
      }
      // Four words of four keys after each other: sums that are taken up soon are not read from the registers, whose
      // ports `two_words` needs.
#pragma GCC unroll 2
      for (int i = 0; i < kKeys; i += 4)
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const __m512i k = two_words(flip, keys + (i + j) * kD + c + (w + x) * 8);
            add_quads(hi[i + j], k, h[x]);
            add_quads(lo[i + j], k, l[x]);
          }
    }
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; i += 2) {
    const __m512 a = reinterpret_cast<__m512>(_mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]));
    const __m512 b = reinterpret_cast<__m512>(_mm512_add_epi32(_mm512_slli_epi32(hi[i + 1], 8), lo[i + 1]));
    const __m512i even = reinterpret_cast<__m512i>(_mm512_shuffle_ps(a, b, 0x88));
    const __m512i odd = reinterpret_cast<__m512i>(_mm512_shuffle_ps(a, b, 0xdd));
    const Vec dot = {_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd))};
    const __m512 four = fours(scales + i / 4 * 4);
    const Vec x = dot * (i % 4 == 0 ? of_pair<0>(four) : of_pair<1>(four));
    store(out + i * kRows, x);
    top = vmax(x, top);
  }
  return top;
}

template <int kD>
void scores_of(const SlotRun* runs, int n, const HeadQuery& query, float* out) {
  Vec top = set1(-__builtin_huge_valf());
  store(out + kScale, load(query.scale));
  float* const to = out + kTop;
  for (const SlotRun* run = runs; run < runs + n; ++run) {
    const auto* keys = static_cast<const char*>(run->codes);
    const auto* next = static_cast<const char*>(run->next ? run->next : keys);
    int key = 0;
    for (; key + kKeys <= run->count; key += kKeys, out += kKeys * kRows)
      top = score<kD>(query, keys + key * kD, run->scales + key, next + key * kD, out, top);
    const int left = run->count - key;
    if (left == 0) continue;
    alignas(64) char rest[kKeys * kD] = {};
    alignas(64) float scales[kLanes];
    __builtin_memcpy(rest, keys + key * kD, static_cast<size_t>(left * kD));
    store(scales, load_part(run->scales + key, left));
    top = score<kD>(query, rest, scales, rest, out, top);
  }
  store(to, top);
}

void scores(DType, const SlotRun* runs, int n, int d, const void* query, int, float* out, int64_t) {
  const HeadQuery q(const_cast<void*>(query), d);
  if (d == 64) return scores_of<64>(runs, n, q, out);
  scores_of<128>(runs, n, q, out);
}

// ---- softmax --------------------------------------------------------------------------------------

// The lane of a row's first slot, and the row of a lane.
inline __m512i lanes_of_rows() { return _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0); }
inline __m512i rows_of_lanes() { return _mm512_setr_epi32(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7); }
inline Vec of_rows(const float* p, int rows) { return {_mm512_permutexvar_ps(rows_of_lanes(), load_part(p, rows).v)}; }
inline void put_rows(float* p, Vec x, int rows) { store_part(p, {_mm512_permutexvar_ps(lanes_of_rows(), x.v)}, rows); }
// The larger of both slots' lanes.
inline Vec of_both(Vec x) { return vmax(x, {_mm512_permute_ps(x.v, 0x4e)}); }

// Larger maxima for the lanes that need them.
[[gnu::noinline]] void raise(const SoftmaxStep& s, __mmask16 above, Vec top) {
  const Vec before = of_rows(s.max, s.rows), now = {_mm512_mask_mov_ps(before.v, above, top.v)};
  const Vec shrink = {_mm512_mask_mov_ps(set1(1.0f).v, above, exp2<5>(before - now).v)};
  put_rows(s.max, now, s.rows);
  put_rows(s.shrink, shrink, s.rows);
  for (int i = 0; i < s.rows; ++i) store(s.sum + i * kLanes, load(s.sum + i * kLanes) * set1(s.shrink[i]));
}

// kAll: all rows see all columns.
template <bool kAll>
[[gnu::always_inline]] inline void softmax_lanes(const SoftmaxStep& s, const SlotRun* runs, int n) {
  alignas(64) float weighted[kStreamTile * kRows];
  const int quads = s.to / 4;
  [[maybe_unused]] __m512i begin, end;
  // Of slot `at`, and the one after it.
  const auto seen = [&](int at) {
    const __m512i slot =
        _mm512_add_epi32(_mm512_set1_epi32(at), _mm512_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1));
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(begin, slot), slot, end);
  };
  Vec top = load(s.scores + kTop);
  if constexpr (!kAll) {
    begin = _mm512_permutexvar_epi32(rows_of_lanes(), _mm512_maskz_loadu_epi32(first(s.rows), s.begin));
    end = _mm512_permutexvar_epi32(rows_of_lanes(), _mm512_maskz_loadu_epi32(first(s.rows), s.end));
    top = set1(-__builtin_huge_valf());
    for (int c = 0; c < s.to; c += 2) top = {_mm512_mask_max_ps(top.v, seen(c), load(s.scores + c * kRows).v, top.v)};
  }
  const Vec scale = load(s.scores + kScale) * set1(s.scale);
  top = of_both(top) * scale;
  store_part(s.shrink, set1(1.0f), s.rows);
  const __mmask16 above = _mm512_mask_cmp_ps_mask(s.rows == kRows ? 0xffff : 0x5fff, top.v,
                                                  (of_rows(s.max, s.rows) + set1(kSlack)).v, _CMP_GT_OQ);
  if (above) [[unlikely]]
    raise(s, above, top);

  const Vec max = zero() - of_rows(s.max, s.rows);
  Vec sum[2] = {zero(), zero()}, most[2] = {zero(), zero()};
  const auto pair = [&]<int kPair>(std::integral_constant<int, kPair>, int g, __m512 four)
      __attribute__((always_inline)) {
    const int at = (2 * g + kPair) * kLanes;
    Vec x = power<4>(fma(load(s.scores + at), scale, max)), y = x * of_pair<kPair>(four);
    if constexpr (!kAll) {
      const __mmask16 live = seen(4 * g + 2 * kPair);
      x = {_mm512_maskz_mov_ps(live, x.v)};
      y = {_mm512_maskz_mov_ps(live, y.v)};
    }
    sum[kPair] = sum[kPair] + x;
    most[kPair] = vmax(y, most[kPair]);
    store(weighted + at, y);
  };
  const auto quads_of = [&](int from, int count, const float* weights, const char* next)
      __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int g = 0; g < count; ++g) {
      // The first of the lines that the values ask for: memory would be idle meanwhile.
      if (kAll) prefetch(next + g * 64);
      const __m512 four = fours(weights + 4 * g);
      pair(std::integral_constant<int, 0>(), from + g, four);
      pair(std::integral_constant<int, 1>(), from + g, four);
    }
  };
  if constexpr (kAll) {
    int g = 0;
    for (const SlotRun* run = runs; run < runs + n; g += run++->count / 4)
      quads_of(g, run->count / 4, run->scales, static_cast<const char*>(run->next ? run->next : run->codes));
  } else {
    alignas(64) float weights[kStreamTile + kLanes];
    copy_scales(runs, n, s.to, weights);
    quads_of(0, quads, weights, nullptr);
  }
  const Vec total = sum[0] + sum[1];
  for (int i = 0; i < s.rows; ++i) {
    const auto own = static_cast<__mmask16>(5 << (i / 2 * 4 + i % 2));
    float* to = s.sum + i * kLanes;
    store(to, {_mm512_mask_add_ps(load(to).v, own, load(to).v, total.v)});
  }

  // digit_scale (256 hi + lo). What is so small that its reciprocal overflows is nothing that a sum of probabilities
  // can tell from 0.
  const Vec largest = of_both(vmax(most[0], most[1]));
  const __mmask16 some = _mm512_cmp_ps_mask(largest.v, set1(1e-30f).v, _CMP_GT_OQ);
  put_rows(s.digit_scale, {_mm512_maskz_mul_ps(some, largest.v, set1(1 / 65535.0f).v)}, s.rows);
  const Vec by = {_mm512_maskz_div_ps(some, set1(65535.0f).v, largest.v)};
  // Of two rows' digits of four slots: the first's hi and lo, the second's.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15, 2, 6, 10, 14));
  auto* p = static_cast<uint8_t*>(s.p);
#pragma GCC unroll 4
  for (int g = 0; g < quads; ++g) {
    const __m512i a = _mm512_cvtps_epi32((load(weighted + g * 2 * kLanes) * by).v);
    const __m512i b = _mm512_cvtps_epi32((load(weighted + (g * 2 + 1) * kLanes) * by).v);
    _mm512_storeu_si512(p + g * 64, _mm512_shuffle_epi8(_mm512_packus_epi32(a, b), order));
  }
}

void softmax(DType, const SoftmaxStep& step, const SlotRun* runs, int n) {
  const __mmask16 rows = first(step.rows);
  const __m512i begin = _mm512_maskz_loadu_epi32(rows, step.begin), end = _mm512_maskz_loadu_epi32(rows, step.end);
  if (_mm512_mask_cmpgt_epi32_mask(rows, begin, _mm512_setzero_si512()) == 0 &&
      _mm512_mask_cmplt_epi32_mask(rows, end, _mm512_set1_epi32(step.to)) == 0)
    softmax_lanes<true>(step, runs, n);
  else
    softmax_lanes<false>(step, runs, n);
}

constexpr NarrowOps kHeads = {takes, query_bytes, prepare, scores, softmax, quad_values, narrow_restore};

}  // namespace

const NarrowOps& attention_heads_avx512() { return kHeads; }

}  // namespace lacuna::cpu

#endif

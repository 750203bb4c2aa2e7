// Decode over caches of narrow codes, for machines with VNNI and bf16 pair dot products. What bounds
// the f32 stream there is not the products but what surrounds them: widening every code and folding
// every dot product. Here sixteen keys are transposed once for all query heads, so that a vector holds
// sixteen scores and nothing is folded, and codes are multiplied as they are:
// - bf16: queries and probabilities rounded to bf16, as ActivationType::kBF16 says and prefill does.
// - int8: the query in two int8 digits, q = s (256 hi + lo) + e with |e| <= s / 2, s = amax(q) / 32512;
//   the products with the codes are exact integers. The error of a score is at most s / 2 times
//   the key's l1 norm, 1/64 of what rounding the largest query elements to bf16 could do.
//   Probability times the value's scale in two uint8 digits over a block of slots: the error of each is
//   at most 1/131070 of the block's largest.
#if defined(__x86_64__)

#include <cstring>

#include "kernels/cpu/attention_decode_narrow.h"

namespace lacuna::cpu {
namespace {

// ---- queries --------------------------------------------------------------------------------------
// In groups of as many rows as a product takes at most, so that heads that share a key lie side by side, a word's all
// at known distances: digits [group of 4][d / 4][hi, lo][4], pairs [group of 8][d / 2][8].
constexpr int kWordStep = 8;
inline int rounded(int rows, int group) { return (rows + group - 1) / group * group; }

// digits | scale [rows] f32 | start [hi, lo][rows]: what the sums begin with.
struct DigitQuery {
  DigitQuery(void* base, int rows, int d)
      : digits(static_cast<int32_t*>(base)),
        scale(reinterpret_cast<float*>(digits + d / 2 * rounded(rows, 4))),
        start(digits + d / 2 * rounded(rows, 4) + rows) {}
  int32_t* digits;
  float* scale;
  int32_t* start;
};

int64_t query_bytes(DType dtype, int rows, int d) {
  return 4 * (dtype == DType::kI8 ? int64_t{d / 2} * rounded(rows, 4) + 3 * rows : int64_t{d / 2} * rounded(rows, 8));
}

void prepare_digits(const float* q, int64_t ldq, int rows, int d, void* out) {
  const DigitQuery query(out, rows, d);
  for (int i = 0; i < rows; ++i, q += ldq) {
    __m512i sum_hi = _mm512_setzero_si512(), sum_lo = sum_hi;
    query.scale[i] = digits_of(q, d, [&](int c, __m512i hi, __m512i lo) {
      sum_hi = _mm512_add_epi32(sum_hi, hi);
      sum_lo = _mm512_add_epi32(sum_lo, lo);
      int32_t part[2][4];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(part[0]), _mm512_cvtepi32_epi8(hi));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(part[1]), _mm512_cvtepi32_epi8(lo));
      for (int w = 0; w < 4; ++w) {
        int32_t* to = query.digits + (i / 4 * d / 4 + c / 4 + w) * kWordStep + i % 4;
        to[0] = part[0][w];
        to[4] = part[1][w];
      }
    });
    // vpdpbusd takes codes + 128, unsigned: that much too much is in the sum.
    query.start[i] = -128 * _mm512_reduce_add_epi32(sum_hi);
    query.start[rows + i] = -128 * _mm512_reduce_add_epi32(sum_lo);
  }
}

void prepare_pairs(const float* q, int64_t ldq, int rows, int d, void* out) {
  auto* to = static_cast<uint32_t*>(out);
  for (int i = 0; i < rows; ++i, q += ldq)
    for (int c = 0; c < d; c += 2 * kLanes) {
      uint32_t part[kLanes];
      const __m512bh x = _mm512_cvtne2ps_pbh(load(q + c + kLanes).v, load(q + c).v);
      __builtin_memcpy(part, &x, sizeof part);
      for (int w = 0; w < kLanes; ++w) to[(i / 8 * d / 2 + c / 2 + w) * kWordStep + i % 8] = part[w];
    }
}

void prepare(DType dtype, const float* q, int64_t ldq, int rows, int d, void* out) {
  if (dtype == DType::kI8) return prepare_digits(q, ldq, rows, d, out);
  prepare_pairs(q, ldq, rows, d, out);
}

// ---- scores ---------------------------------------------------------------------------------------

// Calls f(c, word c of sixteen rows) for the 64 bytes of each row from `rows` on: 0, 4, 8, 12, 1, 5 …, and turn(c)
// counts the calls.
constexpr int turn(int c) { return c % 4 * 4 + c / 4; }
template <class F>
[[gnu::always_inline]] inline void each_word(const char* rows, int64_t step, F f) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = words(rows + i * step);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
    // a[4q + c] now holds word c of each of the four 128-bit quarters, for rows 4q … 4q + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i x = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), y = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
    const __m512i z = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88),
                  w = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
    f(c, _mm512_shuffle_i32x4(x, z, 0x88));
    f(c + 4, _mm512_shuffle_i32x4(y, w, 0x88));
    f(c + 8, _mm512_shuffle_i32x4(x, z, 0xdd));
    f(c + 12, _mm512_shuffle_i32x4(y, w, 0xdd));
  }
}

struct Scores {
  const char* rows;     // sixteen keys of `row` bytes each, or
  const int32_t* keys;  // sixteen or 32, transposed: [row / 4][16 * kK] words
  const void* query;
  int count, d, row;  // query rows; elements and bytes of a key
  Vec key_scale[2];
  __mmask16 live;  // keys of the last sixteen
  float* out;
  int64_t ld;
  const char* next;  // these keys' lines of what is read next, or their own
};

[[gnu::always_inline]] inline void put(float* out, __mmask16 live, Vec x) {
  // A store through a mask cannot be forwarded to the softmax's load.
  if (live == 0xffff)
    store(out, x);
  else
    _mm512_mask_storeu_ps(out, live, x.v);
}

// Few query rows leave registers for the transposed keys; for more they are put down and read again, 32 keys at a
// time, so that a query's word is read once for two products.
// Digits have two sums a row.
constexpr int kDirectPairs = 4, kDirectDigits = 3;

// unsigned: vpdpbusd takes codes + 128.
inline __m512i flipped(__m512i codes) {
  return _mm512_xor_si512(codes, _mm512_set1_epi32(static_cast<int>(0x80808080u)));
}

// f(word, kK vectors of it, chain 0 or 1 of sums), a line of `next` for each word.
template <int kK, bool kDirect, bool kDigits, class F>
[[gnu::always_inline]] inline void each_key_word(const Scores& s, const char* next, F f) {
  if constexpr (kDirect) {
    for (int c = 0; c < s.row / 4; c += kLanes)
      each_word(
          s.rows + c * 4, s.row, [&](int w, __m512i k) __attribute__((always_inline)) {
            if (turn(w) % 4 == 0) next = once_here(next, s.rows + turn(w) * s.row + c * 4);
            prefetch(next + (c + turn(w)) * 64);
            if (kDigits) k = flipped(k);
            f(c + w, &k, w / 4 % 2);
          });
  } else {
    // Sixteen words without a branch: leaving a loop of sixteen is what a processor does not foresee.
    const int32_t* keys = s.keys;
    for (int c = 0; c < s.row / 4; c += kLanes)
#pragma GCC unroll 16
      for (int w = 0; w < kLanes; ++w, keys += kK * kLanes, next += 64) {
        if (w % 4 == 0) next = once_here(next, keys);
        prefetch(next);
        __m512i k[kK];
#pragma GCC unroll 2
        for (int j = 0; j < kK; ++j) k[j] = words(keys + j * kLanes);
        f(c + w, k, 0);
      }
  }
}

// The lines ahead that a group of rows asks for, one a word: of two vectors of keys the first two groups have a
// half each; one group alone has the second, after the transposition. More groups ask for what is on its way.
template <int kK, int kMost>
inline const char* lines_of(const Scores& s, int group) {
  const int half = kK == 2 && s.count <= kMost ? 1 : group < kK ? group : 0;
  return s.next + half * (s.row / 4) * 64;
}

template <int kQ, int kK, bool kDirect>
void digit_scores(int first_row, int group, const Scores& s) {
  const DigitQuery query(const_cast<void*>(s.query), s.count, s.d);
  const int rows = s.count;
  __m512i hi[kQ * kK], lo[kQ * kK];
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kK; ++j) {
      hi[i * kK + j] = _mm512_set1_epi32(query.start[first_row + i]);
      lo[i * kK + j] = _mm512_set1_epi32(query.start[rows + first_row + i]);
    }
  const int32_t* q = query.digits + first_row / 4 * (s.d / 4) * kWordStep;
  each_key_word<kK, kDirect, true>(
      s, lines_of<kK, 4>(s, group), [&](int c, const __m512i* k, int) __attribute__((always_inline)) {
        const int32_t* at = q + c * kWordStep;
#pragma GCC unroll 8
        for (int i = 0; i < kQ; ++i) {
          if constexpr (kK == 1) {
            add_quads(hi[i], k[0], at + i);
            add_quads(lo[i], k[0], at + 4 + i);
          } else {
            const __m512i h = _mm512_set1_epi32(at[i]), l = _mm512_set1_epi32(at[4 + i]);
#pragma GCC unroll 2
            for (int j = 0; j < kK; ++j) {
              add_quads(hi[i * kK + j], k[j], h);
              add_quads(lo[i * kK + j], k[j], l);
            }
          }
        }
      });
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kK; ++j) {
      const Vec dot = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi[i * kK + j], 8), lo[i * kK + j]))};
      put(s.out + (first_row + i) * s.ld + j * kLanes, j + 1 == kK ? s.live : 0xffff,
          dot * (s.key_scale[j] * set1(query.scale[first_row + i])));
    }
}

template <int kQ, int kK, bool kDirect>
void pair_scores(int first_row, int group, const Scores& s) {
  const int32_t* q = static_cast<const int32_t*>(s.query) + first_row / 8 * (s.d / 2) * kWordStep;
  // Few rows would wait for their own sums: every other word apart.
  constexpr int kChains = kQ * kK <= 4 ? 2 : 1;
  __m512 sums[kQ * kK * kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kQ * kK * kChains; ++i) sums[i] = _mm512_setzero_ps();
  each_key_word<kK, kDirect, false>(
      s, lines_of<kK, 8>(s, group), [&](int c, const __m512i* k, int chain) __attribute__((always_inline)) {
        if (kChains == 1) chain = 0;
        const int32_t* at = q + c * kWordStep;
#pragma GCC unroll 8
        for (int i = 0; i < kQ; ++i) {
          if constexpr (kK == 1) {
            add_pairs(sums[i * kChains + chain], k[0], at + i);
          } else {
            const __m512i x = _mm512_set1_epi32(at[i]);
#pragma GCC unroll 2
            for (int j = 0; j < kK; ++j) add_pairs(sums[(i * kK + j) * kChains + chain], k[j], x);
          }
        }
      });
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kK; ++j) {
      Vec sum = {sums[(i * kK + j) * kChains]};
      if constexpr (kChains > 1) sum = sum + Vec{sums[(i * kK + j) * kChains + 1]};
      put(s.out + (first_row + i) * s.ld + j * kLanes, j + 1 == kK ? s.live : 0xffff, sum);
    }
}

template <int kK, bool kDirect, bool kDigits>
struct Product {
  static constexpr int kMost = kDirect || kDigits ? 4 : 8;
  template <int kQ>
  struct Rows {
    static void run(int first_row, const Scores& s) {
      if constexpr (kDigits)
        digit_scores<kQ, kK, kDirect>(first_row, first_row / kMost, s);
      else
        pair_scores<kQ, kK, kDirect>(first_row, first_row / kMost, s);
    }
  };
  static void run(int rows, const Scores& s) { each_group<kMost, Rows>(rows, s); }
};

// Sixteen keys as [row / 4] vectors, every kK-th of `keys`; a line of `next` for every other one.
template <int kK, bool kDigits>
[[gnu::always_inline]] inline void transpose(const char* rows, int row, int32_t* keys, const char* next) {
  for (int b = 0; b < row; b += 64, keys += 16 * kK * kLanes)
    each_word(
        rows + b, row, [&](int c, __m512i k) __attribute__((always_inline)) {
          if (c % 8 == 0 && next) next = once_here(next, rows + b + c * row);
          if (c % 2 == 0 && next) prefetch(next + (b / 4 + c) * 32);
          _mm512_store_si512(keys + c * kK * kLanes, kDigits ? flipped(k) : k);
        });
}

// Two vectors of keys, of kRow bytes each if that is not 0: known strides save a quarter of the time.
template <bool kDigits, int kRow>
[[gnu::noinline]] void transpose_two(const char* const* from, int row, int32_t* keys, const char* next) {
  if (kRow) row = kRow;
  transpose<2, kDigits>(from[0], row, keys, next);
  transpose<2, kDigits>(from[1], row, keys + kLanes, next ? next + row * 8 : nullptr);
}
template <bool kDigits>
void transpose_two(const char* const* from, int row, int32_t* keys, const char* next) {
  if (row == 64) return transpose_two<kDigits, 64>(from, row, keys, next);
  if (row == 128) return transpose_two<kDigits, 128>(from, row, keys, next);
  if (row == 256) return transpose_two<kDigits, 256>(from, row, keys, next);
  transpose_two<kDigits, 0>(from, row, keys, next);
}

template <bool kDigits>
void scores_of(const SlotRun* runs, int n, int d, const void* query, int rows, float* out, int64_t ld) {
  const int row = d * (kDigits ? 1 : 2);
  const bool direct = rows <= (kDigits ? kDirectDigits : kDirectPairs);
  alignas(64) int32_t keys[kMaxDim * kLanes];
  alignas(64) char rest[kLanes * kMaxDim * 2];
  for (const SlotRun* run = runs; run < runs + n; out += run++->count) {
    const auto* codes = static_cast<const char*>(run->codes);
    const auto* next = static_cast<const char*>(run->next);
    for (int key = 0, some; key < run->count; key += some) {
      const int vectors = !direct && run->count - key > kLanes ? 2 : 1;
      some = least(vectors * kLanes, run->count - key);
      const int last = some - (vectors - 1) * kLanes;  // keys of the last sixteen
      const int64_t at = static_cast<int64_t>(key) * row;
      const char* from[2] = {codes + at, codes + at + kLanes * row};
      if (last < kLanes) {
        __builtin_memcpy(rest, from[vectors - 1], static_cast<size_t>(last * row));
        __builtin_memset(rest + last * row, 0, static_cast<size_t>((kLanes - last) * row));
        from[vectors - 1] = rest;
      }
      Scores s{
          from[0], keys, query, rows, d, row, {zero(), zero()}, first(last), out + key, ld, next ? next + at : from[0]};
      if (kDigits) {
        s.key_scale[0] = load_part(run->scales + key, least(kLanes, some));
        if (vectors == 2) s.key_scale[1] = load_part(run->scales + key + kLanes, last);
      }
      if (direct) {
        Product<1, true, kDigits>::run(rows, s);
      } else if (vectors == 2) {
        transpose_two<kDigits>(from, row, keys, next && rows <= Product<2, false, kDigits>::kMost ? s.next : nullptr);
        Product<2, false, kDigits>::run(rows, s);
      } else {
        transpose<1, kDigits>(from[0], row, keys, nullptr);
        Product<1, false, kDigits>::run(rows, s);
      }
    }
  }
}

void scores(DType dtype, const SlotRun* runs, int n, int d, const void* query, int rows, float* out, int64_t ld) {
  if (dtype == DType::kI8) return scores_of<true>(runs, n, d, query, rows, out, ld);
  scores_of<false>(runs, n, d, query, rows, out, ld);
}

bool takes(DType dtype, int rows, int d) {
  if (rows > kMaxRows || d > kMaxDim) return false;
  return dtype == DType::kI8 ? d % 64 == 0 : dtype == DType::kBF16 && rows > 1 && d % 32 == 0;
}

constexpr NarrowOps kNarrow = {takes, query_bytes, prepare, scores, narrow_softmax, narrow_values, narrow_restore};

}  // namespace

const NarrowOps& attention_narrow_avx512() { return kNarrow; }

}  // namespace lacuna::cpu

#endif

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

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_vec.h"

namespace lacuna::cpu {
namespace {

constexpr int kLanes = Vec::kLanes;
// Slots whose digits and interleaved values are alive at a time: 2 KB of values, 1 KB of digits.
constexpr int kBlock = 32;
constexpr int kMaxRows = 16;
constexpr int kMaxDim = 256;

inline __m512i words(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i word(const void* p) {
  int32_t w;
  __builtin_memcpy(&w, p, 4);
  return _mm512_set1_epi32(w);
}
inline int least(int a, int b) { return a < b ? a : b; }

// sum += products of pairs, of quads (u unsigned), with a vector or with one word. Around the intrinsics GCC 12
// copies every sum of a loop into another register and back at each step.
[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512i a, const int32_t* b) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
}
[[gnu::always_inline]] inline void add_quads(__m512i& sum, __m512i u, __m512i s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
}
[[gnu::always_inline]] inline void add_quads(__m512i& sum, __m512i u, const int32_t* s) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*s));
}

// The part of the cache that is read next is asked for a line at a time between products.
[[gnu::always_inline]] inline void prefetch(const char* line) { __builtin_prefetch(line); }
// `next`, known only once `line` is there. Requests that run ahead of what arrives pile up, and beyond 128 a core
// drops them: so one goes out for each that comes in.
[[gnu::always_inline]] inline const char* once_here(const char* next, const void* line) {
  int64_t zero;
  asm("movl %1, %k0\n\tandl $0, %k0" : "=r"(zero) : "m"(*static_cast<const int32_t*>(line)) : "cc");
  return next + zero;
}

// ---- queries --------------------------------------------------------------------------------------
// Both kinds: word c of row i at [c * step + i], so that heads that share a key lie side by side.

// words [d / 4][hi, lo][rows] | scale [rows] f32 | start [hi, lo][rows]: what the sums begin with.
struct DigitQuery {
  DigitQuery(void* base, int rows, int d)
      : digits(static_cast<int32_t*>(base)),
        scale(reinterpret_cast<float*>(digits + d / 2 * rows)),
        start(digits + d / 2 * rows + rows) {}
  int32_t* digits;
  float* scale;
  int32_t* start;
};

int64_t query_bytes(DType dtype, int rows, int d) {
  return 4 * (dtype == DType::kI8 ? int64_t{d / 2 + 3} * rows : int64_t{d / 2} * rows);
}

void prepare_digits(const float* q, int64_t ldq, int rows, int d, void* out) {
  const DigitQuery query(out, rows, d);
  for (int i = 0; i < rows; ++i, q += ldq) {
    Vec most = zero();
    __mmask16 nan = 0;
    for (int c = 0; c < d; c += kLanes) {
      const Vec x = load(q + c);
      most = vmax(vabs(x), most);
      nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q));
    }
    const float amax = largest(most);
    // Elements below 2^-100 of anything that matters are zero; NaN and infinity reach the scores.
    const float inverse = amax > 1e-30f ? 32512.0f / amax : 0.0f;
    query.scale[i] = nan ? __builtin_nanf("") : amax > 1e-30f ? amax / 32512.0f : 0.0f;
    __m512i sum_hi = _mm512_setzero_si512(), sum_lo = sum_hi;
    for (int c = 0; c < d; c += kLanes) {
      const __m512i t = _mm512_cvtps_epi32((load(q + c) * set1(inverse)).v);
      const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(t, _mm512_set1_epi32(128)), 8);
      const __m512i lo = _mm512_sub_epi32(t, _mm512_slli_epi32(hi, 8));
      sum_hi = _mm512_add_epi32(sum_hi, hi);
      sum_lo = _mm512_add_epi32(sum_lo, lo);
      int32_t part[2][4];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(part[0]), _mm512_cvtepi32_epi8(hi));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(part[1]), _mm512_cvtepi32_epi8(lo));
      for (int w = 0; w < 4; ++w) {
        int32_t* to = query.digits + (c / 4 + w) * 2 * rows + i;
        to[0] = part[0][w];
        to[rows] = part[1][w];
      }
    }
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
      for (int w = 0; w < kLanes; ++w) to[(c / 2 + w) * rows + i] = part[w];
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
    for (int c = 0; c < s.row / 4; ++c) {
      if (c % 4 == 0) next = once_here(next, s.keys + c * kK * kLanes);
      prefetch(next + c * 64);
      __m512i k[kK];
#pragma GCC unroll 2
      for (int j = 0; j < kK; ++j) k[j] = words(s.keys + (c * kK + j) * kLanes);
      f(c, k, 0);
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
  const int32_t* q = query.digits + first_row;
  each_key_word<kK, kDirect, true>(
      s, lines_of<kK, 4>(s, group), [&](int c, const __m512i* k, int) __attribute__((always_inline)) {
        const int32_t* at = q + 2 * rows * c;
#pragma GCC unroll 8
        for (int i = 0; i < kQ; ++i) {
          if constexpr (kK == 1) {
            add_quads(hi[i], k[0], at + i);
            add_quads(lo[i], k[0], at + rows + i);
          } else {
            const __m512i h = _mm512_set1_epi32(at[i]), l = _mm512_set1_epi32(at[rows + i]);
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
  const int rows = s.count;
  const int32_t* q = static_cast<const int32_t*>(s.query) + first_row;
  // Few rows would wait for their own sums: every other word apart.
  constexpr int kChains = kQ * kK <= 4 ? 2 : 1;
  __m512 sums[kQ * kK * kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kQ * kK * kChains; ++i) sums[i] = _mm512_setzero_ps();
  each_key_word<kK, kDirect, false>(
      s, lines_of<kK, 8>(s, group), [&](int c, const __m512i* k, int chain) __attribute__((always_inline)) {
        if (kChains == 1) chain = 0;
        const int32_t* at = q + rows * c;
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

// Runs f<kQ>(first row) over rows, kMost at a time and what is left in one.
template <int kMost, template <int> class F, class... Args>
inline void each_group(int rows, const Args&... args) {
  int i = 0;
  for (; i + kMost <= rows; i += kMost) F<kMost>::run(i, args...);
  switch (rows - i) {
    case 1:
      return F<1>::run(i, args...);
    case 2:
      return F<2>::run(i, args...);
    case 3:
      return F<3>::run(i, args...);
    default:
      break;
  }
  if constexpr (kMost > 4) {
    switch (rows - i) {
      case 4:
        return F<4>::run(i, args...);
      case 5:
        return F<5>::run(i, args...);
      case 6:
        return F<6>::run(i, args...);
      case 7:
        return F<7>::run(i, args...);
      default:
        break;
    }
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
void transpose(const char* rows, int row, int32_t* keys, const char* next) {
  for (int b = 0; b < row; b += 64, keys += 16 * kK * kLanes)
    each_word(
        rows + b, row, [&](int c, __m512i k) __attribute__((always_inline)) {
          if (c % 8 == 0 && next) next = once_here(next, rows + b + c * row);
          if (c % 2 == 0 && next) prefetch(next + (b / 4 + c) * 32);
          _mm512_store_si512(keys + c * kK * kLanes, kDigits ? flipped(k) : k);
        });
}

template <bool kDigits>
void scores_of(const char* codes, const float* scales, int count, int d, const void* query, int rows, float* out,
               int64_t ld, const char* next) {
  const int row = d * (kDigits ? 1 : 2);
  const bool direct = rows <= (kDigits ? kDirectDigits : kDirectPairs);
  alignas(64) int32_t keys[kMaxDim * kLanes];
  alignas(64) char rest[kLanes * kMaxDim * 2];
  for (int key = 0, some; key < count; key += some) {
    const int vectors = !direct && count - key > kLanes ? 2 : 1;
    some = least(vectors * kLanes, count - key);
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
      s.key_scale[0] = load_part(scales + key, least(kLanes, some));
      if (vectors == 2) s.key_scale[1] = load_part(scales + key + kLanes, last);
    }
    if (direct) {
      Product<1, true, kDigits>::run(rows, s);
      continue;
    }
    if (vectors == 2) {
      const char* ahead = next && rows <= Product<2, false, kDigits>::kMost ? s.next : nullptr;
      transpose<2, kDigits>(from[0], row, keys, ahead);
      transpose<2, kDigits>(from[1], row, keys + kLanes, ahead ? ahead + row * 8 : nullptr);
    } else {
      transpose<1, kDigits>(from[0], row, keys, nullptr);
    }
    if (vectors == 2)
      Product<2, false, kDigits>::run(rows, s);
    else
      Product<1, false, kDigits>::run(rows, s);
  }
}

void scores(DType dtype, const void* codes, const float* scales, int count, int d, const void* query, int rows,
            float* out, int64_t ld, const void* next) {
  const auto* from = static_cast<const char*>(codes);
  const auto* ahead = static_cast<const char*>(next);
  if (dtype == DType::kI8) return scores_of<true>(from, scales, count, d, query, rows, out, ld, ahead);
  scores_of<false>(from, scales, count, d, query, rows, out, ld, ahead);
}

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

void softmax(DType dtype, const SoftmaxStep& step) {
  if (dtype == DType::kBF16) return softmax_rows<true>(step);
  softmax_rows<false>(step);
}

// ---- values ---------------------------------------------------------------------------------------

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

void values(DType dtype, const void* codes, const float* scales, int count, int d, const void* p, int64_t ld, int rows,
            float* out, int64_t ld_out, const void* next) {
  if (dtype == DType::kI8)
    return digit_values(static_cast<const int8_t*>(codes), scales, count, d, static_cast<const float*>(p), ld, rows,
                        out, ld_out, next);
  each_group<8, PairValues>(rows, static_cast<const uint16_t*>(codes), count, d, static_cast<const uint16_t*>(p), ld,
                            out, ld_out, static_cast<const char*>(next));
}

void restore(DType dtype, float* sums, int64_t ld, int rows, int d) {
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

bool takes(DType dtype, int rows, int d) {
  if (rows > kMaxRows || d > kMaxDim) return false;
  return dtype == DType::kI8 ? d % 64 == 0 : dtype == DType::kBF16 && rows > 1 && d % 32 == 0;
}

constexpr NarrowOps kNarrow = {takes, query_bytes, prepare, scores, softmax, values, restore};

}  // namespace

const NarrowOps& attention_narrow_avx512() { return kNarrow; }

}  // namespace lacuna::cpu

#endif

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
// Slots whose digits and interleaved values are alive at a time: 64 * 64 B of values, 2 KB of digits.
constexpr int kBlock = 64;
constexpr int kMaxRows = 16;
constexpr int kMaxDim = 256;

inline __m512i words(const void* p) { return _mm512_loadu_si512(p); }
inline __m512bh pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }
inline __m512i word(const void* p) {
  int32_t w;
  __builtin_memcpy(&w, p, 4);
  return _mm512_set1_epi32(w);
}
inline int least(int a, int b) { return a < b ? a : b; }

// The part of the cache that is read next is asked for a line at a time between products: as many lines
// at once as a core has misses outstanding (24) would hold everything up.
[[gnu::always_inline]] inline void prefetch(const char* line) { __builtin_prefetch(line); }

// ---- queries --------------------------------------------------------------------------------------
// Both kinds: word c of row i at [c * step + i], so that heads that share a key lie side by side.

// words [d / 4][hi, lo][rows] | scale [rows] f32 | start [hi, lo][rows]: what the sums begin with.
struct DigitQuery {
  DigitQuery(void* base, int rows, int d)
      : digits(static_cast<int32_t*>(base)), scale(reinterpret_cast<float*>(digits + d / 2 * rows)),
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

// Scores of kQ rows, `first` on, with sixteen keys, transposed in `keys` [d / 4][16] words.
template <int kQ>
void digit_scores(const int32_t* keys, int d, const DigitQuery& query, int rows, int first_row, Vec key_scale,
                  __mmask16 live, float* out, int64_t ld, const char* next) {
  __m512i hi[kQ], lo[kQ];
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i) {
    hi[i] = _mm512_set1_epi32(query.start[first_row + i]);
    lo[i] = _mm512_set1_epi32(query.start[rows + first_row + i]);
  }
  const int32_t* q = query.digits + first_row;
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(0x80808080u));
  for (int c = 0; c < d / 4; ++c, q += 2 * rows) {
    if (next) prefetch(next + c * 64);
    const __m512i k = _mm512_xor_si512(words(keys + c * kLanes), flip);
#pragma GCC unroll 8
    for (int i = 0; i < kQ; ++i) {
      hi[i] = _mm512_dpbusd_epi32(hi[i], k, _mm512_set1_epi32(q[i]));
      lo[i] = _mm512_dpbusd_epi32(lo[i], k, _mm512_set1_epi32(q[rows + i]));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i) {
    const Vec dot = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]))};
    _mm512_mask_storeu_ps(out + i * ld, live, (dot * (key_scale * set1(query.scale[first_row + i]))).v);
  }
}

// The same with keys [d / 2][16] and queries [d / 2][rows] in bf16 pairs.
template <int kQ>
void pair_scores(const int32_t* keys, int d, const int32_t* q, int rows, __mmask16 live, float* out, int64_t ld,
                 const char* next) {
  // Few rows would wait for their own sums: even and odd words apart.
  constexpr int kChains = kQ <= 2 ? 4 : kQ <= 4 ? 2 : 1;
  __m512 sums[kQ * kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kQ * kChains; ++i) sums[i] = _mm512_setzero_ps();
  for (int c = 0; c < d / 2; c += kChains)
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j, q += rows) {
      const __m512i k = words(keys + (c + j) * kLanes);
      if (next) prefetch(next + (c + j) * 64);
#pragma GCC unroll 8
      for (int i = 0; i < kQ; ++i)
        sums[i * kChains + j] = _mm512_dpbf16_ps(sums[i * kChains + j], pairs(k), pairs(_mm512_set1_epi32(q[i])));
    }
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i) {
    __m512 s = sums[i * kChains];
#pragma GCC unroll 4
    for (int j = 1; j < kChains; ++j) s = _mm512_add_ps(s, sums[i * kChains + j]);
    _mm512_mask_storeu_ps(out + i * ld, live, s);
  }
}

// Runs f<kQ>(first row) over rows, kMost at a time and what is left in one.
template <int kMost, template <int> class F, class... Args>
inline void each_group(int rows, const Args&... args) {
  int i = 0;
  for (; i + kMost <= rows; i += kMost) F<kMost>::run(i, args...);
  switch (rows - i) {
    case 1: return F<1>::run(i, args...);
    case 2: return F<2>::run(i, args...);
    case 3: return F<3>::run(i, args...);
    default: break;
  }
  if constexpr (kMost > 4) {
    switch (rows - i) {
      case 4: return F<4>::run(i, args...);
      case 5: return F<5>::run(i, args...);
      case 6: return F<6>::run(i, args...);
      case 7: return F<7>::run(i, args...);
      default: break;
    }
  }
}

struct Scores {
  const int32_t* keys;
  const void* query;
  int rows, d;
  Vec key_scale;
  __mmask16 live;
  float* out;
  int64_t ld;
  const char* next;  // sixteen keys' lines, one a word of the products
};
template <int kQ>
struct DigitScores {
  static void run(int first_row, const Scores& s) {
    digit_scores<kQ>(s.keys, s.d, DigitQuery(const_cast<void*>(s.query), s.rows, s.d), s.rows, first_row, s.key_scale,
                     s.live, s.out + first_row * s.ld, s.ld, first_row ? nullptr : s.next);
  }
};
template <int kQ>
struct PairScores {
  static void run(int first_row, const Scores& s) {
    pair_scores<kQ>(s.keys, s.d, static_cast<const int32_t*>(s.query) + first_row, s.rows, s.live,
                    s.out + first_row * s.ld, s.ld, first_row ? nullptr : s.next);
  }
};

void scores(DType dtype, const void* codes, const float* scales, int count, int d, const void* query, int rows,
            float* out, int64_t ld, const void* next) {
  const int row = d * (dtype == DType::kI8 ? 1 : 2);  // bytes
  const auto* k = static_cast<const char*>(codes);
  alignas(64) int32_t keys[kMaxDim / 2 * kLanes];
  alignas(64) char rest[kLanes * kMaxDim * 2];
  for (int key = 0; key < count; key += kLanes) {
    const int n = least(kLanes, count - key);
    const char* from = k + static_cast<int64_t>(key) * row;
    if (n < kLanes) {
      __builtin_memcpy(rest, from, static_cast<size_t>(n * row));
      __builtin_memset(rest + n * row, 0, static_cast<size_t>((kLanes - n) * row));
      from = rest;
    }
    for (int b = 0; b < row; b += 64)
      transpose(reinterpret_cast<const float*>(from + b), row / 4, reinterpret_cast<float*>(keys + b / 4 * kLanes),
                kLanes);
    const Scores s{keys, query, rows, d, dtype == DType::kI8 ? load_part(scales + key, n) : zero(), first(n), out + key,
                   ld, next ? static_cast<const char*>(next) + static_cast<int64_t>(key) * row : nullptr};
    if (dtype == DType::kI8)
      each_group<8, DigitScores>(rows, s);
    else
      each_group<8, PairScores>(rows, s);
  }
}

// ---- values ---------------------------------------------------------------------------------------

struct Digits {
  alignas(64) uint8_t hi[kMaxRows][kBlock], lo[kMaxRows][kBlock];
  float scale[kMaxRows];
};

// p[i] * scales[i] = scale (256 hi + lo) for a block, zero digits up to kBlock.
void take_digits(const float* p, const float* scales, int count, Digits& digits, int row) {
  Vec w[kBlock / kLanes];
  Vec most = zero();
#pragma GCC unroll 4
  for (int j = 0; j < kBlock / kLanes; ++j) {
    const int n = count - j * kLanes;
    if (n <= 0) {
      w[j] = zero();
    } else {
      const int m = least(n, kLanes);
      w[j] = load_part(p + j * kLanes, m) * load_part(scales + j * kLanes, m);
      most = vmax(w[j], most);
    }
  }
  const float top = largest(most);
  // So small that its reciprocal overflows: nothing that a sum of probabilities of at least 1 can tell from 0.
  const bool some = top > 1e-30f;
  const Vec inverse = set1(some ? 65535.0f / top : 0.0f);
  digits.scale[row] = some ? top / 65535.0f : 0.0f;
#pragma GCC unroll 4
  for (int j = 0; j < kBlock / kLanes; ++j) {
    if (j * kLanes >= count) break;
    const __m512i t = _mm512_cvtps_epi32((w[j] * inverse).v);
    _mm_store_si128(reinterpret_cast<__m128i*>(digits.hi[row] + j * kLanes),
                    _mm512_cvtepi32_epi8(_mm512_srli_epi32(t, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(digits.lo[row] + j * kLanes), _mm512_cvtepi32_epi8(t));
  }
}

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
  // Adds `quads` groups of four slots to 64 columns of kQ rows of out.
  static void run(int first_row, const __m512i* values, int quads, const Digits& digits, float* out, int64_t ld,
                  const char* next, int64_t next_step) {
    constexpr int kW = kQ <= 2 ? 4 : 2;  // 8 … 16 sums
    if (first_row) next = nullptr;
    for (int t = 0; t < 4; t += kW) {
      __m512i hi[kQ * kW], lo[kQ * kW];
#pragma GCC unroll 16
      for (int i = 0; i < kQ * kW; ++i) hi[i] = lo[i] = _mm512_setzero_si512();
      for (int g = 0; g < quads; ++g) {
        __m512i v[kW];
#pragma GCC unroll 4
        for (int w = 0; w < kW; ++w) {
          v[w] = words(values + 4 * g + t + w);
          if (next) prefetch(next + (4 * g + t + w) * next_step);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kQ; ++i) {
          const __m512i h = word(digits.hi[first_row + i] + 4 * g), l = word(digits.lo[first_row + i] + 4 * g);
#pragma GCC unroll 4
          for (int w = 0; w < kW; ++w) {
            hi[i * kW + w] = _mm512_dpbusd_epi32(hi[i * kW + w], h, v[w]);
            lo[i * kW + w] = _mm512_dpbusd_epi32(lo[i * kW + w], l, v[w]);
          }
        }
      }
      // 64 slots of 255 * 127 * 256 stay below 2^31.
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
    for (int i = 0; i < rows; ++i) take_digits(p + i * ld + s, scales + s, n, digits, i);
    const int64_t at = static_cast<int64_t>(s) * d;
    for (int c = 0; c < d; c += 64) {
      interleave_quads(v + at + c, n, d, values);
      each_group<4, DigitValues>(rows, static_cast<const __m512i*>(values), quads, digits, out + c, ld_out,
                                 next ? static_cast<const char*>(next) + at + c : nullptr, static_cast<int64_t>(d));
    }
  }
}

template <int kQ>
struct PairValues {
  // p is bf16 of stride ld. 32 columns at a time.
  static void run(int first_row, const uint16_t* v, int count, int d, const uint16_t* p, int64_t ld, float* out,
                  int64_t ld_out, const void* next) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
    }
    const __m512i low = words(order[0]), high = words(order[1]);
    p += first_row * ld;
    out += first_row * ld_out;
    for (int c = 0; c < d; c += 2 * kLanes) {
      __m512 sums[kQ * 2];
#pragma GCC unroll 8
      for (int i = 0; i < kQ; ++i) {
        sums[2 * i] = load(out + i * ld_out + c).v;
        sums[2 * i + 1] = load(out + i * ld_out + c + kLanes).v;
      }
      const uint16_t* at = v + c;
      const char* ahead = first_row == 0 && next ? static_cast<const char*>(next) + c * 2 : nullptr;
      for (int s = 0; s < count; s += 2, at += 2 * d) {
        if (ahead) {
          prefetch(ahead + static_cast<int64_t>(s) * d * 2);
          prefetch(ahead + static_cast<int64_t>(s + 1) * d * 2);
        }
        const __m512i even = words(at), odd = s + 1 < count ? words(at + d) : _mm512_setzero_si512();
        const __m512bh x = pairs(_mm512_permutex2var_epi16(even, low, odd));
        const __m512bh y = pairs(_mm512_permutex2var_epi16(even, high, odd));
#pragma GCC unroll 8
        for (int i = 0; i < kQ; ++i) {
          const __m512bh w = pairs(word(p + i * ld + s));
          sums[2 * i] = _mm512_dpbf16_ps(sums[2 * i], x, w);
          sums[2 * i + 1] = _mm512_dpbf16_ps(sums[2 * i + 1], y, w);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kQ; ++i) {
        store(out + i * ld_out + c, {sums[2 * i]});
        store(out + i * ld_out + c + kLanes, {sums[2 * i + 1]});
      }
    }
  }
};

void values(DType dtype, const void* codes, const float* scales, int count, int d, const void* p, int64_t ld, int rows,
            float* out, int64_t ld_out, const void* next) {
  if (dtype == DType::kI8)
    return digit_values(static_cast<const int8_t*>(codes), scales, count, d, static_cast<const float*>(p), ld, rows,
                        out, ld_out, next);
  each_group<8, PairValues>(rows, static_cast<const uint16_t*>(codes), count, d, static_cast<const uint16_t*>(p), ld,
                            out, ld_out, next);
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
  // For one or two rows the transposition costs more than the folds, and f32 is more accurate.
  return dtype == DType::kI8 ? rows > 1 && d % 64 == 0 : dtype == DType::kBF16 && rows > 2 && d % 32 == 0;
}

constexpr NarrowOps kNarrow = {takes, query_bytes, prepare, scores, values, restore};

}  // namespace

const NarrowOps& attention_narrow_avx512() { return kNarrow; }

}  // namespace lacuna::cpu

#endif

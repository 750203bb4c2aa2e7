// Thirteen to sixteen query rows over a bf16 cache, as a block of latents has them: each row has a lane. A key's words are
// broadcast as they lie times a vector of the queries' words, so that keys are not transposed; scores of sixteen keys
// are sixteen registers, whose maxima, exponentials and sums need no fold; probabilities in bf16 pairs of keys go
// straight to where the products with values, sixteen columns a vector, broadcast them from. Queries and probabilities
// are rounded to bf16, as ActivationType::kBF16 says.
#if defined(__x86_64__)

#include "kernels/cpu/attention_decode_narrow.h"

namespace lacuna::cpu {
namespace {

constexpr int kKeys = 16;  // scores alive at a time

// Rows [row, row + kQ) of the sums, columns [column, column + 16 kW), over all pairs.
template <int kD, int kQ, int kW>
void value_tile(const LaneItem& it, int row, int column) {
  __m512 sums[kQ * kW];
  float* out = it.sums + row * it.ld + column;
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kW; ++w)
      sums[i * kW + w] = it.begun ? load(out + i * it.ld + w * kLanes).v : _mm512_setzero_ps();
  const int32_t *p = it.p + row, *v = it.values + column;
  for (int pair = 0; pair < it.pairs; ++pair, p += kLanes, v += kD) {
    __m512i x[kW];
#pragma GCC unroll 4
    for (int w = 0; w < kW; ++w) x[w] = words(v + w * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kQ; ++i) {
      const __m512i y = _mm512_set1_epi32(p[i]);
#pragma GCC unroll 4
      for (int w = 0; w < kW; ++w) add_pairs(sums[i * kW + w], x[w], y);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kW; ++w) store(out + i * it.ld + w * kLanes, {sums[i * kW + w]});
}

// 24 sums, their vectors of values and a broadcast fit 32 registers; 64 columns at once, or 32.
template <int kD>
struct Values {
  static constexpr int kW = kD >= 64 ? 4 : 2, kMost = kD >= 64 ? 6 : 8;
  template <int kQ>
  struct Rows {
    static void run(int row, const LaneItem& it, int column) { value_tile<kD, kQ, kW>(it, row, column); }
  };
};

// Weighs the values of the pairs so far.
template <int kD>
void weigh(LaneItem& it) {
  if (it.pairs == 0) return;
  for (int c = 0; c < kD; c += Values<kD>::kW * kLanes)
    each_group<Values<kD>::kMost, Values<kD>::template Rows>(it.rows, it, c);
  it.begun = true;
  it.pairs = 0;
}

// A new maximum for the lanes that need one, and what has been summed up put in proportion to it.
template <int kD>
[[gnu::noinline]] void raise(LaneItem& it, Vec top) {
  weigh<kD>(it);
  const Vec before = load(it.max), now = vmax(before, top);
  // Equal also where nothing was or is visible: both are -inf, whose difference is NaN.
  const __mmask16 same = _mm512_cmp_ps_mask(before.v, now.v, _CMP_EQ_OQ);
  const Vec shrink = {_mm512_mask_mov_ps(exp2<5>(before - now).v, same, set1(1.0f).v)};
  store(it.max, now);
  store(it.total, load(it.total) * shrink);
  if (!it.begun) return;
  float of_row[kLanes];
  store(of_row, shrink);
  for (int i = 0; i < it.rows; ++i)
    for (int c = 0; c < kD; c += kLanes) store(it.sums + i * it.ld + c, load(it.sums + i * it.ld + c) * set1(of_row[i]));
}

// scores[i] = key i times all queries. Sixteen lines of what is read next, a line a word: they come from another cache
// or from memory, and sixteen keys side by side are no stream that the hardware knows. Not inlined: where sums live on
// behind the loop, GCC 12 copies them in and out of it at every step.
template <int kD>
[[gnu::noinline]] void score(const int32_t* q, const void* keys, const LaneAhead& ahead, float* scores) {
  __m512 sums[kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) sums[i] = _mm512_setzero_ps();
  const auto* key = static_cast<const int32_t*>(keys);
  const auto *next_key = static_cast<const char*>(ahead.keys), *next_value = static_cast<const char*>(ahead.values);
  for (int c = 0; c < kD / 2; ++c, ++key, next_key += 64, next_value += 64) {
    prefetch(next_key);
    prefetch(next_value);
    const __m512i x = words(q + c * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
      asm volatile("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums[i]) : "v"(x), "m"(key[i * (kD / 2)]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) store(scores + i * kLanes, {sums[i]});
}

// Up to sixteen keys, `count` of them, the first of which is slot `slot`. kAll: sixteen, which all rows see.
template <int kD, bool kAll>
void add_keys(LaneItem& it, const uint16_t* k, const uint16_t* v, const LaneAhead& ahead, int count, int slot) {
  alignas(64) uint16_t rest[kAll ? 1 : kKeys * kD];
  if (!kAll && count < kKeys) {
    __builtin_memcpy(rest, k, static_cast<size_t>(count * kD) * 2);
    __builtin_memset(rest + count * kD, 0, static_cast<size_t>((kKeys - count) * kD) * 2);
    k = rest;
  }
  alignas(64) float scores[kKeys * kLanes];
  score<kD>(it.q, k, ahead, scores);

  [[maybe_unused]] __mmask16 seen[kKeys];
  if constexpr (!kAll) {
    const __m512i begin = words(it.begin), end = words(it.end);
    for (int i = 0; i < kKeys; ++i) {
      const __m512i at = _mm512_set1_epi32(slot + i);
      seen[i] = i >= count ? __mmask16{0} : _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(begin, at), at, end);
      store(scores + i * kLanes, {_mm512_mask_mov_ps(set1(-__builtin_huge_valf()).v, seen[i], load(scores + i * kLanes).v)});
    }
  }
  Vec most[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) most[i] = load(scores + i * kLanes);
#pragma GCC unroll 16
  for (int i = 4; i < kKeys; ++i) most[i % 4] = vmax(load(scores + i * kLanes), most[i % 4]);
  const Vec scale = set1(it.scale), top = vmax(vmax(most[0], most[1]), vmax(most[2], most[3])) * scale;
  if (_mm512_cmp_ps_mask(top.v, (load(it.max) + set1(kSlack)).v, _CMP_GT_OQ)) [[unlikely]] raise<kD>(it, top);

  const Vec minus = set1(0.0f) - load(it.max);
  // Word i: lane i of an even key, then of the odd key after it.
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = words(kOrder);
  const int pairs = (count + 1) / 2;
  Vec total[2] = {load(it.total), zero()};
  int32_t* p = it.p + it.pairs * kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; i += 2, p += kLanes) {
    Vec x = exp2<3>(fma(load(scores + i * kLanes), scale, minus)),
        y = exp2<3>(fma(load(scores + (i + 1) * kLanes), scale, minus));
    if constexpr (!kAll) {
      x = {_mm512_maskz_mov_ps(seen[i], x.v)};
      y = {_mm512_maskz_mov_ps(seen[i + 1], y.v)};
    }
    total[0] = total[0] + x;
    total[1] = total[1] + y;
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y.v, x.v));
    _mm512_store_si512(p, _mm512_permutexvar_epi16(order, both));
  }
  store(it.total, total[0] + total[1]);

  // Word j of a vector: column j of an even slot's value, then of the odd one's.
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = words(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  int32_t* to = it.values + it.pairs * kD;
  for (int pair = 0; pair < pairs; ++pair, v += 2 * kD)
#pragma GCC unroll 4
    for (int c = 0; c < kD; c += 32, to += 32) {
      const bool both = kAll || 2 * pair + 1 < count;
      const __m512i even = words(v + c), odd = both ? words(v + kD + c) : _mm512_setzero_si512();
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(even, high, odd));
    }
  it.pairs += pairs;
}

template <int kD>
void add_slots(LaneItem& it, const uint16_t* k, const uint16_t* v, LaneAhead ahead, int count, int slot) {
  if (!ahead.keys) ahead = {k, v};
  for (; count > 0; count -= kKeys, slot += kKeys, k += kKeys * kD, v += kKeys * kD) {
    if (it.pairs + kKeys / 2 > kLanePairs) weigh<kD>(it);
    if (count >= kKeys && slot >= it.all_begin && slot + kKeys <= it.all_end)
      add_keys<kD, true>(it, k, v, ahead, kKeys, slot);
    else
      add_keys<kD, false>(it, k, v, ahead, least(count, kKeys), slot);
    ahead.keys = static_cast<const uint16_t*>(ahead.keys) + kKeys * kD;
    ahead.values = static_cast<const uint16_t*>(ahead.values) + kKeys * kD;
  }
}

void begin_lanes(LaneItem& it, const float* const* rows, int d) {
  alignas(64) float pairs[kLanes * kLanes];
  for (int c = 0; c < d; c += 2 * kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const __m512bh x = i < it.rows ? _mm512_cvtne2ps_pbh(load(rows[i] + c + kLanes).v, load(rows[i] + c).v)
                                     : reinterpret_cast<__m512bh>(_mm512_setzero_ps());
      store(pairs + i * kLanes, {reinterpret_cast<__m512>(x)});
    }
    transpose(pairs, kLanes, reinterpret_cast<float*>(it.q + c / 2 * kLanes), kLanes);
  }
  store(it.max, set1(-__builtin_huge_valf()));
  store(it.total, zero());
}

void add_lanes(LaneItem& it, const void* k, const void* v, LaneAhead ahead, int count, int d, int slot) {
  const auto *key = static_cast<const uint16_t*>(k), *value = static_cast<const uint16_t*>(v);
  if (d == 32) return add_slots<32>(it, key, value, ahead, count, slot);
  if (d == 64) return add_slots<64>(it, key, value, ahead, count, slot);
  add_slots<128>(it, key, value, ahead, count, slot);
}

void end_lanes(LaneItem& it, int d) {
  if (d == 32) weigh<32>(it);
  if (d == 64) weigh<64>(it);
  if (d == 128) weigh<128>(it);
  if (!it.begun) __builtin_memset(it.sums, 0, static_cast<size_t>(it.rows * it.ld) * sizeof(float));
}

void divide_lanes(const LaneItem& it, float* const* out, int d) {
  alignas(64) float inverse[kLanes];
  store(inverse, set1(1.0f) / load(it.total));
  for (int i = 0; i < it.rows; ++i)
    for (int c = 0; c < d; c += kLanes) store(out[i] + c, load(it.sums + i * it.ld + c) * set1(inverse[i]));
}

constexpr LaneOps kLaneOps = {begin_lanes, add_lanes, end_lanes, divide_lanes};

}  // namespace

const LaneOps& attention_lanes_avx512() { return kLaneOps; }

}  // namespace lacuna::cpu

#endif

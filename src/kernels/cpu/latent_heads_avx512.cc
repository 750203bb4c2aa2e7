// Queries and keys of a few rows of latents, in three passes over what lies in the L1: the sums of all heads of a row
// fold together, and those of one row while the next is read.
#if defined(__x86_64__)

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/latent_heads.h"

namespace lacuna::cpu {
namespace {

constexpr int kLanes = Vec::kLanes, kVectors = kPreparedDim / kLanes;
// Heads whose sums fold together.
constexpr int kMostHeads = 8;

// Two vectors in bf16, as they lie.
inline void store_pairs(std::byte* to, Vec low, Vec high) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
}

// Angles of eight pairs, each for both of its values; the sine's sign is that of its pair's first.
struct Angles {
  Vec cosine[kVectors], sine[kVectors];
};
Angles spread(const PreparedRows::Row& row, int turned) {
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i even = _mm512_set1_epi64(0x80000000);
  Angles a;
  for (int v = 0; v < turned; ++v) {
    a.cosine[v] = {_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(row.cosine + v * kLanes / 2)))};
    const __m512 s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(row.sine + v * kLanes / 2)));
    a.sine[v] = {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(s), even))};
  }
  return a;
}

// One head, normed and turned.
struct Head {
  Vec v[kVectors];
};
[[gnu::always_inline]] inline Head finish(const float* x, Vec mean, Vec factor, const float* weight, const float* bias,
                                          const Angles& angles, int turned) {
  Head y;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec n = (load(x + v * kLanes) - mean) * factor;
    y.v[v] = fma(n, load(weight + v * kLanes), load(bias + v * kLanes));
    if (v < turned) y.v[v] = fma(y.v[v], angles.cosine[v], Vec{_mm512_permute_ps(y.v[v].v, 0xb1)} * angles.sine[v]);
  }
  return y;
}

// Of `heads` heads each: means, and one over the deviations.
void statistics(const float* x, int heads, float eps, float* mean, float* factor) {
  const Vec size = set1(1.0f / kPreparedDim);
  for (int h = 0; h < heads; h += kMostHeads) {
    const int n = heads - h < kMostHeads ? heads - h : kMostHeads;
    Vec part[kMostHeads];
    for (Vec& p : part) p = zero();
    const float* from = x + h * kPreparedDim;
    for (int i = 0; i < n; ++i, from += kPreparedDim)
      part[i] = (load(from) + load(from + kLanes)) + (load(from + 2 * kLanes) + load(from + 3 * kLanes));
    alignas(64) float some[kLanes];
    store(some, (n <= 4 ? sums_of<1>(part) : sums_of<2>(part)) * size);
    for (int i = 0; i < n; ++i) mean[h + i] = some[i];
    from = x + h * kPreparedDim;
    for (int i = 0; i < n; ++i, from += kPreparedDim) {
      const Vec m = set1(some[i]);
      const Vec a = load(from) - m, b = load(from + kLanes) - m, c = load(from + 2 * kLanes) - m,
                d = load(from + 3 * kLanes) - m;
      part[i] = fma(a, a, b * b) + fma(c, c, d * d);
    }
    const Vec variance = (n <= 4 ? sums_of<1>(part) : sums_of<2>(part)) * size;
    store(some, set1(1.0f) / Vec{_mm512_sqrt_ps((variance + set1(eps)).v)});
    for (int i = 0; i < n; ++i) factor[h + i] = some[i];
  }
}

void prepare(const PreparedRows& all) {
  const int turned = 2 * all.half / kLanes;
  float mean[kPreparedRows][2 * kPreparedHeads], factor[kPreparedRows][2 * kPreparedHeads];
  for (int r = 0; r < all.count; ++r) {
    const PreparedRows::Row& row = all.rows[r];
    if (row.q) statistics(row.q, all.heads, all.q_eps, mean[r], factor[r]);
    statistics(row.k, all.heads, all.k_eps, mean[r] + kPreparedHeads, factor[r] + kPreparedHeads);
  }
  for (int r = 0; r < all.count; ++r) {
    const PreparedRows::Row& row = all.rows[r];
    const Angles angles = spread(row, turned);
    for (int h = 0; row.q && h < all.heads; ++h) {
      float* q = row.q + h * kPreparedDim;
      const Head y = finish(q, set1(mean[r][h]), set1(factor[r][h]), all.q_weight, all.q_bias, angles, turned);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(q + v * kLanes, y.v[v]);
    }
    for (int h = 0; h < all.heads; ++h) {
      const int i = kPreparedHeads + h;
      const Head y = finish(row.k + h * kPreparedDim, set1(mean[r][i]), set1(factor[r][i]), all.k_weight, all.k_bias,
                            angles, turned);
      store_pairs(row.key[h], y.v[0], y.v[1]);
      store_pairs(row.key[h] + 64, y.v[2], y.v[3]);
      const float* v = row.v + h * kPreparedDim;
      store_pairs(row.value[h], load(v), load(v + kLanes));
      store_pairs(row.value[h] + 64, load(v + 2 * kLanes), load(v + 3 * kLanes));
    }
  }
}

}  // namespace

PrepareRows prepare_rows_avx512() { return prepare; }

}  // namespace lacuna::cpu

#endif

// Queries and keys of a row of latents without leaving the registers: all heads of a row side by side, so that their
// folds overlap and angles are spread once.
#if defined(__x86_64__)

#include "kernels/cpu/attention_vec.h"
#include "kernels/cpu/latent_heads.h"

namespace lacuna::cpu {
namespace {

constexpr int kLanes = Vec::kLanes, kVectors = kPreparedDim / kLanes;
// Heads at a time: 24 vectors of them.
constexpr int kMostHeads = 6;

// Two vectors in bf16, as they lie.
inline void store_pairs(std::byte* to, Vec low, Vec high) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
}

struct Head {
  const float *x, *weight, *bias;
  float eps;
  float* y;         // null: to code
  std::byte* code;  // bf16
};

// Angles of eight pairs, each for both of its values; the sine's sign is that of its pair's first.
struct Angles {
  Vec cosine[kVectors], sine[kVectors];
};
Angles spread(const PreparedRow& row) {
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i even = _mm512_set1_epi64(0x80000000);
  Angles a;
  for (int v = 0; v * kLanes < 2 * row.half; ++v) {
    a.cosine[v] = {_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(row.cosine + v * kLanes / 2)))};
    const __m512 s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(row.sine + v * kLanes / 2)));
    a.sine[v] = {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(s), even))};
  }
  return a;
}

template <int kHeads>
void prepare(const Head* heads, const Angles& angles, int turned) {
  constexpr int kFours = (kHeads + 3) / 4;
  Vec x[kHeads][kVectors], part[4 * kFours];
  alignas(64) float mean[kLanes], factor[kLanes];
#pragma GCC unroll 8
  for (int h = 0; h < 4 * kFours; ++h) part[h] = zero();
#pragma GCC unroll 6
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[h][v] = load(heads[h].x + v * kLanes);
    part[h] = (x[h][0] + x[h][1]) + (x[h][2] + x[h][3]);
  }
  const Vec size = set1(1.0f / kPreparedDim);
  store(mean, sums_of<kFours>(part) * size);
#pragma GCC unroll 6
  for (int h = 0; h < kHeads; ++h) {
    const Vec m = set1(mean[h]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[h][v] = x[h][v] - m;
    part[h] = fma(x[h][0], x[h][0], x[h][1] * x[h][1]) + fma(x[h][2], x[h][2], x[h][3] * x[h][3]);
  }
  alignas(64) float eps[kLanes] = {};
#pragma GCC unroll 6
  for (int h = 0; h < kHeads; ++h) eps[h] = heads[h].eps;
  store(factor, set1(1.0f) / Vec{_mm512_sqrt_ps(fma(sums_of<kFours>(part), size, load(eps)).v)});
#pragma GCC unroll 6
  for (int h = 0; h < kHeads; ++h) {
    const Head& head = heads[h];
    const Vec f = set1(factor[h]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec y = fma(x[h][v] * f, load(head.weight + v * kLanes), load(head.bias + v * kLanes));
      if (v < turned) y = fma(y, angles.cosine[v], Vec{_mm512_permute_ps(y.v, 0xb1)} * angles.sine[v]);
      x[h][v] = y;
    }
    if (head.y) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(head.y + v * kLanes, x[h][v]);
    } else {
      store_pairs(head.code, x[h][0], x[h][1]);
      store_pairs(head.code + 64, x[h][2], x[h][3]);
    }
  }
}

template <int kHeads = kMostHeads>
void prepare_some(const Head* heads, int count, const Angles& angles, int turned) {
  if (count >= kHeads) return prepare<kHeads>(heads, angles, turned);
  if constexpr (kHeads > 1) prepare_some<kHeads - 1>(heads, count, angles, turned);
}

void prepare_row_of(const PreparedRow& row) {
  const Angles angles = spread(row);
  const int turned = 2 * row.half / kLanes, all = row.q ? 2 * row.heads : row.heads;
  Head heads[kMostHeads];
  for (int at = 0; at < all;) {
    int n = 0;
    for (; n < kMostHeads && at < all; ++n, ++at) {
      const bool query = row.q && at < row.heads;
      const int h = row.q && !query ? at - row.heads : at;
      const float* x = (query ? row.q : row.k) + h * kPreparedDim;
      if (query)
        heads[n] = {x, row.q_weight, row.q_bias, row.q_eps, row.q + h * kPreparedDim, nullptr};
      else
        heads[n] = {x, row.k_weight, row.k_bias, row.k_eps, nullptr, row.slots[2 * h]};
    }
    prepare_some(heads, n, angles, turned);
  }
  for (int h = 0; h < row.heads; ++h) {
    const float* v = row.v + h * kPreparedDim;
    for (int c = 0; c < kPreparedDim; c += 2 * kLanes)
      store_pairs(row.slots[2 * h + 1] + 2 * c, load(v + c), load(v + c + kLanes));
  }
}

}  // namespace

PrepareRow prepare_row_avx512() { return prepare_row_of; }

}  // namespace lacuna::cpu

#endif

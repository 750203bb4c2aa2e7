// Small-M products with int8 weights on machines with VNNI. Widening codes to bf16 or f32 takes 10 to 12
// cycles for a cache line of them, more than the memory needs to deliver it. So the activations come to the
// weights: a row of x in three int8 digits, x = s (65536 hi + 256 mid + lo) + e with s = amax(x) / 8323072 and
// |e| <= s; the products with the codes are exact integers. e is 2^-23 of the row's largest value, what f32 sums
// with it lose as well.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/cpu/linear_bodies.h"

namespace lacuna::cpu {
namespace {

constexpr int kLine = 64;  // codes of a step
constexpr int kDigits = 3;
constexpr float kMost = 8323072.0f;  // 127 * 65536: the digits below round it up to less than 128 * 65536

// A packed row: for every 64 values [hi, mid, lo][64 int8], then what its sums begin with and its scale.
constexpr int64_t kStepWords = kDigits * kLine / 4;
struct Foot {
  int32_t start[kDigits];
  float scale;
};
constexpr int64_t kFootWords = 16;

int64_t steps(int64_t k) { return (k + kLine - 1) / kLine; }

__m512 some(const float* x, int64_t valid) {
  const __mmask16 live = valid >= 16 ? 0xffff : valid <= 0 ? 0 : static_cast<__mmask16>((1u << valid) - 1);
  return _mm512_maskz_loadu_ps(live, x);
}

// Of finite values; without the bf16 instructions, which not every machine with VNNI has.
__m512 to_bf16(__m512 v) {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_castsi512_ps(_mm512_and_si512(near, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// kRound: x rounded to bf16 first, as Operand::kBf16Pair and kF32Rounded do.
template <bool kRound>
void pack_row(const float* x, int64_t k, char* out) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < k; i += 16) {
    const __m512 v = some(x + i, k - i);
    most = _mm512_max_ps(_mm512_abs_ps(v), most);
    nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q));
  }
  float amax = _mm512_reduce_max_ps(most);
  if (kRound && !nan) amax = _mm512_cvtss_f32(to_bf16(_mm512_set1_ps(amax)));
  // Rows below 2^-100 are zero. Where a value is not finite, no sum with it is.
  const bool any = amax > 1e-30f, finite = !nan && amax < __builtin_inff();
  const __m512 inverse = _mm512_set1_ps(any && finite ? kMost / amax : 0.0f);
  __m512i sum[kDigits] = {};
  const int64_t lines = steps(k);
  for (int64_t s = 0; s < lines; ++s)
    for (int part = 0; part < kLine / 16; ++part) {
      const int64_t i = s * kLine + part * 16;
      __m512 v = some(x + i, k - i);
      if (kRound) v = to_bf16(v);
      const __m512i t = _mm512_cvtps_epi32(_mm512_mul_ps(finite ? v : _mm512_setzero_ps(), inverse));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(t, _mm512_set1_epi32(128)), 8);
      const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(upper, _mm512_set1_epi32(128)), 8);
      const __m512i digit[kDigits] = {hi, _mm512_sub_epi32(upper, _mm512_slli_epi32(hi, 8)),
                                      _mm512_sub_epi32(t, _mm512_slli_epi32(upper, 8))};
      for (int j = 0; j < kDigits; ++j) {
        sum[j] = _mm512_add_epi32(sum[j], digit[j]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (s * kDigits + j) * kLine + part * 16),
                         _mm512_cvtepi32_epi8(digit[j]));
      }
    }
  Foot foot;
  // vpdpbusd takes codes + 128, unsigned: that much too much is in the sum.
  for (int j = 0; j < kDigits; ++j) foot.start[j] = -128 * _mm512_reduce_add_epi32(sum[j]);
  foot.scale = !finite ? __builtin_nanf("") : any ? amax / kMost : 0.0f;
  __builtin_memcpy(out + lines * kDigits * kLine, &foot, sizeof foot);
}

int64_t digit_words(int64_t k) { return steps(k) * kStepWords + kFootWords; }

void pack_digits(bool round, const float* x, int64_t k, void* packed) {
  if (round) return pack_row<true>(x, k, static_cast<char*>(packed));
  pack_row<false>(x, k, static_cast<char*>(packed));
}

// Lane i of the result is the sum over the lanes of v[i].
__m512i lane_sums(const __m512i (&v)[16]) {
  __m512i t[8], u[4], w[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    t[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    u[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    w[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(w[0], w[1], 0x88), _mm512_shuffle_i32x4(w[0], w[1], 0xdd));
}

// kRows weight rows times kM rows of x, for columns first … first + kRows of the piece.
template <int kRows, int kM>
void digit_tile(const LinearPiece& p, const int8_t* w, int64_t first) {
  constexpr int kSums = kM * kRows * kDigits;
  const int64_t x_bytes = digit_words(p.k) * 4;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i sum[kSums];
#pragma GCC unroll 32
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_setzero_si512();
  const auto step = [&](const __m512i(&wr)[kRows], const char* x) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 3
      for (int j = 0; j < kDigits; ++j) {
        const __m512i xm = _mm512_loadu_si512(x + m * x_bytes + j * kLine);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          __m512i& s = sum[(m * kRows + r) * kDigits + j];
          s = _mm512_dpbusd_epi32(s, wr[r], xm);
        }
      }
  };
  const char* x = static_cast<const char*>(p.x);
  __m512i wr[kRows];
  int64_t i = 0;
  for (; i + kLine <= p.k; i += kLine, x += kDigits * kLine) {
    ask_ahead<kRows>(w, p.k, i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) wr[r] = _mm512_xor_si512(_mm512_loadu_si512(w + r * p.k + i), flip);
    step(wr, x);
  }
  if (i < p.k) {
    const __mmask64 live = (uint64_t{1} << (p.k - i)) - 1;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) wr[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(live, w + r * p.k + i), flip);
    step(wr, x);
  }

  constexpr int kFull = (kSums + 15) / 16 * 16;
  alignas(64) int32_t total[kFull];
#pragma GCC unroll 2
  for (int j = 0; j < kFull; j += 16) {
    __m512i part[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) part[l] = j + l < kSums ? sum[j + l < kSums ? j + l : 0] : _mm512_setzero_si512();
    _mm512_store_si512(total + j, lane_sums(part));
  }
  for (int m = 0; m < kM; ++m) {
    Foot foot;
    __builtin_memcpy(&foot, static_cast<const char*>(p.x) + (m + 1) * x_bytes - kFootWords * 4, sizeof foot);
    float* y = p.y + m * p.y_stride + first;
    for (int r = 0; r < kRows; ++r) {
      const int32_t* t = total + (m * kRows + r) * kDigits;
      const auto digit = [&](int j) { return static_cast<int64_t>(t[j] + foot.start[j]); };
      const int64_t exact = (digit(0) << 16) + (digit(1) << 8) + digit(2);
      // One expression without branches, so that it is rounded alike in every instance of this body.
      const float bias = p.bias ? p.bias[first + r] : 0.0f;
      const float value = static_cast<float>(exact) * foot.scale * p.row_scale[first + r] + bias;
      y[r] = p.accumulate ? y[r] + value : value;
    }
  }
}

template <int kM>
void digit_rows(const LinearPiece& p) {
  constexpr int kFit = 8 / kM, kRows = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;  // 24 sums at most
  const auto* w = static_cast<const int8_t*>(p.weight);
  int64_t n = 0;
  for (; n + kRows <= p.count; n += kRows) digit_tile<kRows, kM>(p, w + n * p.k, n);
  for (; n < p.count; ++n) digit_tile<1, kM>(p, w + n * p.k, n);
}

void digits(const LinearPiece& p) {
  switch (p.m) {
    case 1:
      return digit_rows<1>(p);
    case 2:
      return digit_rows<2>(p);
    case 3:
      return digit_rows<3>(p);
    case 4:
      return digit_rows<4>(p);
    case 5:
      return digit_rows<5>(p);
    case 6:
      return digit_rows<6>(p);
    case 7:
      return digit_rows<7>(p);
    case 8:
      return digit_rows<8>(p);
  }
}

constexpr DigitBodies kBodies{digit_words, pack_digits, digits};

}  // namespace

const DigitBodies& linear_digits_avx512() { return kBodies; }

}  // namespace lacuna::cpu

#endif

// The bodies behind AttentionOps, written once over Vec; each ISA file includes this inside
// namespace lacuna::cpu and an anonymous namespace.

// The register tile: kRows x kWide vectors of sums. 12 x 2 + 2 panel vectors + a broadcast fill 27 of
// 32 AVX-512 registers and need 14 loads for 24 multiply-adds; 4 or 6 x 2 fit the 16 registers of AVX2
// and SSE2. Both leave more sums in flight than latency * issue width (4 * 2).
inline constexpr int kLanes = Vec::kLanes;
inline constexpr int kWide = 2;
inline constexpr int kPanel = kWide * kLanes;
inline constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;

template <DType kType>
struct CodeOf;
template <>
struct CodeOf<DType::kF32> {
  using T = float;
  static Vec load_codes(const T* p) { return load(p); }
};
template <>
struct CodeOf<DType::kBF16> {
  using T = uint16_t;
  static Vec load_codes(const T* p) { return load_bf16(p); }
};
template <>
struct CodeOf<DType::kI8> {
  using T = int8_t;
  static Vec load_codes(const T* p) { return load_i8(p); }
};

// Codes [0, n) of p, n < kLanes, zero beyond: never reads past the row.
template <DType kType>
inline Vec load_tail(const typename CodeOf<kType>::T* p, int n) {
  typename CodeOf<kType>::T t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return CodeOf<kType>::load_codes(t);
}

// ---- tiles ----------------------------------------------------------------------------------------

template <DType kType>
void rows_as(const void* codes, const float* scales, int64_t count, int d, float* out, int64_t ld) {
  const auto* p = static_cast<const typename CodeOf<kType>::T*>(codes);
  const int whole = d / kLanes * kLanes;
  for (int64_t i = 0; i < count; ++i, p += d, out += ld) {
    const Vec s = set1(kType == DType::kI8 ? scales[i] : 1.0f);
    for (int c = 0; c < whole; c += kLanes) {
      const Vec x = CodeOf<kType>::load_codes(p + c);
      store(out + c, kType == DType::kI8 ? x * s : x);
    }
    if (whole < d) {
      const Vec x = load_tail<kType>(p + whole, d - whole);
      store_part(out + whole, kType == DType::kI8 ? x * s : x, d - whole);
    }
    for (int64_t c = d; c < ld; ++c) out[c] = 0;
  }
}

void rows_f32(DType dtype, const void* codes, const float* scales, int64_t count, int d, void* out, int64_t ld) {
  auto* o = static_cast<float*>(out);
  if (dtype == DType::kF32) return rows_as<DType::kF32>(codes, scales, count, d, o, ld);
  if (dtype == DType::kBF16) return rows_as<DType::kBF16>(codes, scales, count, d, o, ld);
  rows_as<DType::kI8>(codes, scales, count, d, o, ld);
}

void pack_keys_f32(const void* rows, int64_t ld, int d, void* out) {
  const auto* src = static_cast<const float*>(rows);
  auto* dst = static_cast<float*>(out);
  const int whole = d / kLanes * kLanes;
  for (int key = 0; key < kKeyTile; key += kPanel, dst += static_cast<int64_t>(d) * kPanel)
    for (int part = 0; part < kPanel; part += kLanes) {
      const float* from = src + (key + part) * ld;
      for (int c = 0; c < whole; c += kLanes) transpose(from + c, ld, dst + c * kPanel + part, kPanel);
      for (int c = whole; c < d; ++c)
        for (int i = 0; i < kLanes; ++i) dst[c * kPanel + part + i] = from[i * ld + c];
    }
}

void pack_values_f32(const void* rows, int64_t ld, int d, void* out) {
  const auto* src = static_cast<const float*>(rows);
  auto* dst = static_cast<float*>(out);
  for (int c = 0; c < d; c += kPanel)
    for (int key = 0; key < kKeyTile; ++key, dst += kPanel)
      for (int part = 0; part < kPanel; part += kLanes) store(dst + part, load(src + key * ld + c + part));
}

// The pragmas keep the sums in registers: unless the loops over them vanish, the array lives in memory.
template <int kR, int kW, bool kAdd>
void tile_f32(const float* a, int64_t lda, const float* b, int k, const float* shrink, float* c, int64_t ldc) {
  Vec sums[kR * kW];
#pragma GCC unroll 32
  for (int i = 0; i < kR * kW; ++i) sums[i] = zero();
  for (int x = 0; x < k; ++x, b += kPanel) {
    Vec bw[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) bw[w] = load(b + w * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const Vec ai = set1(a[i * lda + x]);
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) sums[i * kW + w] = fma(ai, bw[w], sums[i * kW + w]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) {
      float* out = c + i * ldc + w * kLanes;
      store(out, kAdd ? fma(set1(shrink[i]), load(out), sums[i * kW + w]) : sums[i * kW + w]);
    }
  }
}

// All rows of one panel: whole register tiles, then the rest in one smaller tile.
template <int kW, bool kAdd, int kR = kRows>
void panel_f32(const float* a, int64_t lda, const float* b, int k, int rows, const float* shrink, float* c,
               int64_t ldc) {
  for (; rows >= kR; rows -= kR, a += kR * lda, c += kR * ldc) {
    tile_f32<kR, kW, kAdd>(a, lda, b, k, shrink, c, ldc);
    if (kAdd) shrink += kR;
  }
  if constexpr (kR > 1) {
    if (rows) panel_f32<kW, kAdd, kR - 1>(a, lda, b, k, rows, shrink, c, ldc);
  }
}

void scores_f32(const void* a, int64_t lda, const void* b, int k, int rows, int columns, float* c, int64_t ldc) {
  const auto* panel = static_cast<const float*>(b);
  for (int x = 0; x < columns; x += kPanel, panel += static_cast<int64_t>(k) * kPanel)
    panel_f32<kWide, false>(static_cast<const float*>(a), lda, panel, k, rows, nullptr, c + x, ldc);
}

void values_f32(const void* a, int64_t lda, const void* b, int from, int k, int rows, int d, const float* shrink,
                float* c, int64_t ldc) {
  const auto* panel = static_cast<const float*>(b) + static_cast<int64_t>(from) * kPanel;
  const float* p = static_cast<const float*>(a) + from;
  for (int x = 0; x < d; x += kPanel, panel += static_cast<int64_t>(kKeyTile) * kPanel) {
    if (d - x > kLanes)
      panel_f32<kWide, true>(p, lda, panel, k, rows, shrink, c + x, ldc);
    else
      panel_f32<1, true>(p, lda, panel, k, rows, shrink, c + x, ldc);
  }
}

// ---- softmax --------------------------------------------------------------------------------------

inline constexpr float kMinusInf = -__builtin_huge_valf();

float max_of(const float* x, int64_t count) {
  Vec m = set1(kMinusInf);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) m = vmax(m, load(x + i));
  float best = largest(m);
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Stores 2^(scores * scale - max) of columns [0, count) through `put`; returns the sum.
template <int kDegree, class Put>
inline float each_exponential(const float* scores, int64_t count, float scale, float max, Put put) {
  const Vec s = set1(scale), m = set1(-max);
  Vec total = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec e = exp2<kDegree>(fma(load(scores + i), s, m));
    put(i, e, kLanes);
    total = total + e;
  }
  float tail = 0;
  if (i < count) {
    const int n = static_cast<int>(count - i);
    float part[kLanes];
    const Vec e = exp2<kDegree>(fma(load_part(scores + i, n), s, m));
    put(i, e, n);
    store(part, e);
    for (int j = 0; j < n; ++j) tail += part[j];
  }
  return sum(total) + tail;
}

float exponentials(const float* scores, int64_t count, float scale, float max, float* p) {
  return each_exponential<5>(scores, count, scale, max, [p](int64_t c, Vec e, int n) {
    if (n == kLanes)
      store(p + c, e);
    else
      store_part(p + c, e, n);
  });
}

// One row's share of an online-softmax step: the new maximum, what it does to the old sums.
inline void step_max(const SoftmaxStep& s, int i, const float* row, int n) {
  const float seen = max_of(row, n) * s.scale;
  const float before = s.max[i];
  const float now = before > seen ? before : seen;
  float shrink[kLanes];
  store(shrink, exp2<5>(set1(before - now)));
  s.shrink[i] = before == now ? 1.0f : before == kMinusInf ? 0.0f : shrink[0];
  s.max[i] = now;
}

void softmax_f32(const SoftmaxStep& s) {
  for (int i = 0; i < s.rows; ++i) {
    const float* row = s.scores + i * s.ld;
    float* p = static_cast<float*>(s.p) + i * s.ld;
    int begin = s.begin[i], end = s.end[i];
    if (begin >= end) {
      s.shrink[i] = 1;
      begin = end = s.from;
    } else {
      step_max(s, i, row + begin, end - begin);
      float* out = p + begin;
      const float total = exponentials(row + begin, end - begin, s.scale, s.max[i], out);
      s.sum[i] = s.sum[i] * s.shrink[i] + total;
    }
    for (int c = s.from; c < begin; ++c) p[c] = 0;
    for (int c = end; c < s.to; ++c) p[c] = 0;
  }
}

void add_exponentials(const float* scores, int64_t count, float scale, float max, float factor, float* sums) {
  const Vec f = set1(factor);
  each_exponential<5>(scores, count, scale, max, [sums, f](int64_t c, Vec e, int n) {
    store_part(sums + c, fma(e, f, load_part(sums + c, n)), n);
  });
}

// ---- streaming ------------------------------------------------------------------------------------

// What is read next, asked for a few lines at a time between the products: in bursts the requests wait for each
// other and the products for them.
struct Ahead {
  // Pass number `pass` of `passes` over the same memory takes its part of [next, next + bytes) in `steps` steps.
  Ahead(const void* next, int64_t bytes, int pass, int passes, int64_t steps) {
    if (!next) return;
    const int64_t from = bytes * pass / passes / 64 * 64,
                  to = pass + 1 == passes ? bytes : bytes * (pass + 1) / passes / 64 * 64;
    step = (to - from + steps * 64 - 1) / (steps * 64) * 64;
    at = static_cast<const char*>(next) + from;
    end = static_cast<const char*>(next) + to;
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect and drops the call.
  [[gnu::always_inline]] inline void ask() {
    for (const char* stop = at + step < end ? at + step : end; at < stop; at += 64) __builtin_prefetch(at);
  }
  int64_t step = 0;
  const char* at = nullptr;
  const char* end = nullptr;
};

// Queries that share a pass over the keys or values: each is then loaded and widened once for all of
// them. With more, keys no longer outnumber queries in the register tile and queries are loaded more often.
inline constexpr int kShare = 4;

// Sums of products for kQ queries x as many keys as fold together, key j starting `j * step` codes on. Inlined,
// so that its addresses are found once a stretch: a key of 64 floats has but four steps.
template <DType kType, int kQ, int kKeys>
[[gnu::always_inline]] inline void dots_of(const typename CodeOf<kType>::T* k, int64_t step, int d, const float* q,
                                           int64_t ldq, float* dots, Ahead& ahead) {
  using Code = CodeOf<kType>;
  Vec sums[kQuads * 4];
#pragma GCC unroll 16
  for (int i = 0; i < kQuads * 4; ++i) sums[i] = zero();
  const auto add = [&](int c, auto&& codes) __attribute__((always_inline)) {
    Vec x[kQ];
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) x[i] = load(q + i * ldq + c);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const Vec y = codes(k + j * step + c);
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i) sums[kKeys * i + j] = fma(x[i], y, sums[kKeys * i + j]);
    }
  };
  int c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    ahead.ask();
    add(c, [](const auto* at) { return Code::load_codes(at); });
  }
  if (c < d) add(c, [n = d - c](const auto* at) { return load_tail<kType>(at, n); });
  sum_quads(sums, dots);
}

inline void multiply(const float* x, const float* y, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i) * load(y + i));
  for (; i < count; ++i) out[i] = x[i] * y[i];
}

template <DType kType, int kQ>
void scores_of(const void* codes, const float* scales, int count, int d, const float* q, int64_t ldq, float* out,
               int64_t ld, const void* next, int pass, int passes) {
  using T = typename CodeOf<kType>::T;
  constexpr int kKeys = 4 * kQuads / kQ;
  const auto* k = static_cast<const T*>(codes);
  const int steps = (count + kKeys - 1) / kKeys * (d < kLanes ? 1 : d / kLanes);
  Ahead ahead(next, int64_t{count} * d * static_cast<int64_t>(sizeof(T)), pass, passes, steps);
  float dots[4 * kQuads];
  const auto put = [&](int key) {
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) __builtin_memcpy(out + i * ld + key, dots + i * kKeys, kKeys * sizeof(float));
  };
  int key = 0;
  for (; key + kKeys <= count; key += kKeys) {
    dots_of<kType, kQ, kKeys>(k + static_cast<int64_t>(key) * d, d, d, q, ldq, dots, ahead);
    put(key);
  }
  if (key < count) {
    if (count >= kKeys) {  // the last ones together with some that are done
      key = count - kKeys;
      dots_of<kType, kQ, kKeys>(k + static_cast<int64_t>(key) * d, d, d, q, ldq, dots, ahead);
      put(key);
    } else {
      for (; key < count; ++key) {
        dots_of<kType, kQ, kKeys>(k + static_cast<int64_t>(key) * d, 0, d, q, ldq, dots, ahead);
        for (int i = 0; i < kQ; ++i) out[i * ld + key] = dots[i * kKeys];
      }
    }
  }
  if constexpr (kType == DType::kI8)
    for (int i = 0; i < kQ; ++i) multiply(out + i * ld, scales, count, out + i * ld);
}

template <DType kType, int kQ = kShare>
void scores_as(const void* codes, const float* scales, int count, int d, const float* q, int64_t ldq, int rows,
               float* out, int64_t ld, const void* next, int pass, int passes) {
  for (; rows >= kQ; rows -= kQ, q += kQ * ldq, out += kQ * ld, ++pass)
    scores_of<kType, kQ>(codes, scales, count, d, q, ldq, out, ld, next, pass, passes);
  // Three rows are dearer than four of which one is done: only fifteen of sixteen sums fold.
  if (kQ == kShare && pass > 0 && rows == kQ - 1)
    return scores_of<kType, kQ>(codes, scales, count, d, q - ldq, ldq, out - ld, ld, next, pass, passes);
  if constexpr (kQ > 1) {
    if (rows) scores_as<kType, kQ - 1>(codes, scales, count, d, q, ldq, rows, out, ld, next, pass, passes);
  }
}

void stream_scores(DType dtype, const void* codes, const float* scales, int count, int d, const float* q, int64_t ldq,
                   int rows, float* out, int64_t ld, const void* next) {
  const int n = (rows + kShare - 1) / kShare;
  if (dtype == DType::kF32) return scores_as<DType::kF32>(codes, scales, count, d, q, ldq, rows, out, ld, next, 0, n);
  if (dtype == DType::kBF16) return scores_as<DType::kBF16>(codes, scales, count, d, q, ldq, rows, out, ld, next, 0, n);
  scores_as<DType::kI8>(codes, scales, count, d, q, ldq, rows, out, ld, next, 0, n);
}

// kQ rows of out, kW vectors of columns.
template <DType kType, int kQ, int kW>
void values_of(const void* codes, int count, int d, int column, const float* p, int64_t ld, float* out, int64_t ld_out,
               Ahead& ahead) {
  using Code = CodeOf<kType>;
  const auto* v = static_cast<const typename Code::T*>(codes) + column;
  Vec sums[kQ * kW];
#pragma GCC unroll 4
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kW; ++w) sums[i * kW + w] = load(out + i * ld_out + column + w * kLanes);
  for (int key = 0; key < count; ++key, v += d) {
    ahead.ask();
    Vec x[kQ];
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) x[i] = set1(p[i * ld + key]);
#pragma GCC unroll 4
    for (int w = 0; w < kW; ++w) {
      const Vec y = Code::load_codes(v + w * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i) sums[i * kW + w] = fma(x[i], y, sums[i * kW + w]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kW; ++w) store(out + i * ld_out + column + w * kLanes, sums[i * kW + w]);
}

template <DType kType, int kQ>
void values_rows(const void* codes, int count, int d, const float* p, int64_t ld, float* out, int64_t ld_out,
                 const void* next, int pass, int passes) {
  // As many sums as leave registers for kQ probabilities (they may come from L1) and a value vector.
  constexpr int kMost = kLanes == 16 ? 24 : 12;
  constexpr int kW = kMost / kQ < 4 ? kMost / kQ : 4;
  const int columns = d / kLanes, steps = (columns / kW + columns % kW) * count;
  Ahead ahead(next, int64_t{count} * d * static_cast<int64_t>(sizeof(typename CodeOf<kType>::T)), pass, passes,
              steps ? steps : 1);
  int c = 0;
  for (; c + kW * kLanes <= d; c += kW * kLanes)
    values_of<kType, kQ, kW>(codes, count, d, c, p, ld, out, ld_out, ahead);
  for (; c + kLanes <= d; c += kLanes) values_of<kType, kQ, 1>(codes, count, d, c, p, ld, out, ld_out, ahead);
  if (c < d) {
    const auto* v = static_cast<const typename CodeOf<kType>::T*>(codes) + c;
    for (int key = 0; key < count; ++key, v += d) {
      const Vec y = load_tail<kType>(v, d - c);
      for (int i = 0; i < kQ; ++i) {
        float* o = out + i * ld_out + c;
        store(o, fma(set1(p[i * ld + key]), y, load(o)));
      }
    }
  }
}

template <DType kType, int kQ = kShare>
void values_as(const void* codes, int count, int d, const float* p, int64_t ld, int rows, float* out, int64_t ld_out,
               const void* next, int pass, int passes) {
  for (; rows >= kQ; rows -= kQ, p += kQ * ld, out += kQ * ld_out, ++pass)
    values_rows<kType, kQ>(codes, count, d, p, ld, out, ld_out, next, pass, passes);
  if constexpr (kQ > 1) {
    if (rows) values_as<kType, kQ - 1>(codes, count, d, p, ld, rows, out, ld_out, next, pass, passes);
  }
}

void stream_values(DType dtype, const void* codes, const float* scales, int count, int d, float* p, int64_t ld,
                   int rows, float* out, int64_t ld_out, const void* next) {
  const int n = (rows + kShare - 1) / kShare;
  if (dtype == DType::kF32) return values_as<DType::kF32>(codes, count, d, p, ld, rows, out, ld_out, next, 0, n);
  if (dtype == DType::kBF16) return values_as<DType::kBF16>(codes, count, d, p, ld, rows, out, ld_out, next, 0, n);
  for (int i = 0; i < rows; ++i) multiply(p + i * ld, scales, count, p + i * ld);
  values_as<DType::kI8>(codes, count, d, p, ld, rows, out, ld_out, next, 0, n);
}

void scale_row(const float* x, float factor, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor;
}
void add_row(const float* x, float factor, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i] * factor;
}

// ---- values through triangles -----------------------------------------------------------------------

// kS vectors of values, transposed: value i's element c at [c * kTriangleValues + i].
template <bool kSquares, int kS>
void triangle_of(const float* v, int d, const float* t, float* out) {
  for (int row = 0; row < d; row += kTriangleRows) {
    Vec sums[kTriangleRows * kS];
#pragma GCC unroll 32
    for (int i = 0; i < kTriangleRows * kS; ++i) sums[i] = zero();
    for (int c = row; c < d; ++c, t += kTriangleRows) {
      Vec w[kTriangleRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTriangleRows; ++r) w[r] = set1(t[r]);
#pragma GCC unroll 8
      for (int s = 0; s < kS; ++s) {
        const Vec x = load(v + c * kTriangleValues + s * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kTriangleRows; ++r) sums[s * kTriangleRows + r] = fma(w[r], x, sums[s * kTriangleRows + r]);
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kS; ++s) {
      Vec sum = row ? load(out + s * kLanes) : zero();
#pragma GCC unroll 4
      for (int r = 0; r < kTriangleRows; ++r) {
        const Vec y = sums[s * kTriangleRows + r];
        sum = fma(y, kSquares ? y : load(v + (row + r) * kTriangleValues + s * kLanes), sum);
      }
      store(out + s * kLanes, sum);
    }
  }
}

void triangle_products(const float* values, int count, int d, const float* triangles, int n, bool squares, float* work,
                       float* out, int64_t ld) {
  constexpr int kS = kLanes == 16 ? 6 : 2;
  constexpr int kStep = kS * kLanes;
  std::memset(
      work, 0,
      sizeof(float) * static_cast<size_t>((d + kTriangleRows - 1) / kTriangleRows * kTriangleRows) * kTriangleValues);
  for (int i = 0; i < count; i += kLanes)
    for (int c = 0; c < d; c += kLanes) {
      const float* from = values + static_cast<int64_t>(i) * d + c;
      float* to = work + c * kTriangleValues + i;
      if (i + kLanes <= count && c + kLanes <= d) {
        transpose(from, d, to, kTriangleValues);
        continue;
      }
      for (int x = 0; x < kLanes && i + x < count; ++x)
        for (int y = 0; y < kLanes && c + y < d; ++y)
          to[y * kTriangleValues + x] = from[static_cast<int64_t>(x) * d + y];
    }
  for (int t = 0; t < n; ++t, triangles += triangle_size(d), out += ld)
    for (int i = 0; i < count; i += kStep) {
      float sums[kStep];
      if (squares)
        triangle_of<true, kS>(work + i, d, triangles, sums);
      else
        triangle_of<false, kS>(work + i, d, triangles, sums);
      std::memcpy(out + i, sums, sizeof(float) * static_cast<size_t>(count - i < kStep ? count - i : kStep));
    }
}

// ---- cache rows -----------------------------------------------------------------------------------

float encode_row(const float* x, int d, DType dtype, void* codes) {
  const int whole = d / kLanes * kLanes;
  if (dtype == DType::kF32) {
    std::memcpy(codes, x, static_cast<size_t>(d) * sizeof(float));
    return 0;
  }
  if (dtype == DType::kBF16) {
    auto* out = static_cast<uint16_t*>(codes);
    for (int c = 0; c < whole; c += kLanes) store_bf16(out + c, load(x + c));
    if (whole < d) {
      uint16_t t[kLanes];
      store_bf16(t, load_part(x + whole, d - whole));
      std::memcpy(out + whole, t, static_cast<size_t>(d - whole) * sizeof(uint16_t));
    }
    return 0;
  }
  Vec m = zero();
  for (int c = 0; c < whole; c += kLanes) m = vmax(vabs(load(x + c)), m);
  if (whole < d) m = vmax(vabs(load_part(x + whole, d - whole)), m);
  const float scale = largest(m) / 127.0f;
  auto* out = static_cast<int8_t*>(codes);
  if (!(scale > 0) || scale > 3.4e38f) {
    std::memset(out, 0, static_cast<size_t>(d));
    return scale > 0 ? scale : 0;
  }
  // Divided, not multiplied by 1/scale: the code of the definition, to the last bit. The clamp guards
  // a subnormal scale, whose rounding can push amax / scale past 127.
  const Vec s = set1(scale), top = set1(127.0f), bottom = set1(-127.0f);
  for (int c = 0; c < whole; c += kLanes) store_i8(out + c, vmin(vmax(load(x + c) / s, bottom), top));
  if (whole < d) {
    int8_t t[kLanes];
    store_i8(t, vmin(vmax(load_part(x + whole, d - whole) / s, bottom), top));
    std::memcpy(out + whole, t, static_cast<size_t>(d - whole));
  }
  return scale;
}

inline constexpr TileOps kTileF32 = {4, kPanel, rows_f32, pack_keys_f32, pack_values_f32, scores_f32, values_f32,
                                     softmax_f32};
inline constexpr AttentionOps kF32Ops = {kTileF32,      nullptr,          nullptr,   nullptr,          nullptr,
                                         stream_scores, stream_values,    scale_row, add_row,          encode_row,
                                         exponentials,  add_exponentials, max_of,    triangle_products};

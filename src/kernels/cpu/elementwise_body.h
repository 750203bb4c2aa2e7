// The bodies behind ElementwiseOps, written once over Vec; each ISA file includes this inside
// namespace lacuna::cpu and an anonymous namespace.

inline constexpr int kLanes = Vec::kLanes;

inline float square_root(float x) {
#if defined(__SSE__)
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}

void rms_norm(const float* x, int64_t d, const float* weight, float eps, float* y) {
  // Four sums hide the latency of the multiply-add.
  Vec s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) {
      const Vec a = load(x + i + u * kLanes);
      s[u] = fma(a, a, s[u]);
    }
  for (; i < d; i += kLanes) {
    const int n = d - i < kLanes ? static_cast<int>(d - i) : kLanes;
    const Vec a = load_part(x + i, n);
    s[0] = fma(a, a, s[0]);
  }
  const float mean = sum((s[0] + s[1]) + (s[2] + s[3])) / static_cast<float>(d);
  const Vec f = set1(1.0f / square_root(mean + eps));
  for (i = 0; i + kLanes <= d; i += kLanes) store(y + i, load(x + i) * f * load(weight + i));
  if (i < d) {
    const int n = static_cast<int>(d - i);
    store_part(y + i, load_part(x + i, n) * f * load_part(weight + i, n), n);
  }
}

// From -88 down e^-x leaves f32. There the exponential is held at 2^126 and x at -88: -1e-36, not 0.
inline Vec silu(Vec x) {
  x = vmax(set1(-88.0f), x);
  const Vec e = exp2<5>(vmin(set1(126.0f), x * set1(-1.44269504088896341f)));
  return x / (set1(1.0f) + e);
}

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i < n) {
    const int m = static_cast<int>(n - i);
    store_part(out + i, silu(load_part(gate + i, m)) * load_part(up + i, m), m);
  }
}

void relu(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, vmax(zero(), load(x + i)));
  if (i < n) store_part(x + i, vmax(zero(), load_part(x + i, static_cast<int>(n - i))), static_cast<int>(n - i));
}

// log(sigmoid(x)) = min(x, 0) - log1p(e), e = exp(-|x|) in (0, 1]. With s = e / (2 + e) in (0, 1/3],
// log1p(e) = 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + …), whose terms from s^16 on are below 3e-9. Everything is
// relative to e, so that values near 0 keep their digits.
inline Vec log_sigmoid_of(Vec x) {
  const Vec e = exp2<5>(vabs(x) * set1(-1.44269504088896341f));
  const Vec s = e / (set1(2.0f) + e), z = s * s;
  Vec p = fma(z, set1(1.0f / 15), set1(1.0f / 13));
  p = fma(p, z, set1(1.0f / 11));
  p = fma(p, z, set1(1.0f / 9));
  p = fma(p, z, set1(1.0f / 7));
  p = fma(p, z, set1(1.0f / 5));
  p = fma(p, z, set1(1.0f / 3));
  p = fma(p, z, set1(1.0f));
  return vmin(zero(), x) - (s + s) * p;
}

void log_sigmoid(const float* x, int64_t n, float factor, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, log_sigmoid_of(load(x + i)) * set1(factor));
  if (i < n) {
    const int m = static_cast<int>(n - i);
    store_part(out + i, log_sigmoid_of(load_part(x + i, m)) * set1(factor), m);
  }
}

void rope(float* x, int64_t half, const float* cosine, const float* sine) {
  float* y = x + half;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = half - i < kLanes ? static_cast<int>(half - i) : kLanes;
    const Vec a = load_part(x + i, n), b = load_part(y + i, n);
    const Vec c = load_part(cosine + i, n), s = load_part(sine + i, n);
    store_part(x + i, a * c - b * s, n);
    store_part(y + i, b * c + a * s, n);
  }
}

// A whole vector where n is known to be kLanes: loads and stores through a mask cost more, and a load cannot take over
// from a store through one.
inline Vec load_some(const float* p, int n) { return n == kLanes ? load(p) : load_part(p, n); }
inline void store_some(float* p, Vec x, int n) {
  if (n == kLanes)
    store(p, x);
  else
    store_part(p, x, n);
}

// Calls each(at, count) for vectors of kLanes values, the last of which may be shorter.
template <class Each>
inline void each_vector(int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) each(i, kLanes);
  if (i < n) each(i, static_cast<int>(n - i));
}

void silu_in_place(float* x, int64_t n) {
  each_vector(n, [x](int64_t i, int count) { store_some(x + i, silu(load_some(x + i, count)), count); });
}

// x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), is the tanh form. Below -20 it is 0 to f32, and x is held there so
// that it does not outgrow the exponential, which is held at 2^126.
void gelu_tanh(float* x, int64_t n) {
  const Vec cubic = set1(-2.30220819813f * 0.044715f), linear = set1(-2.30220819813f);  // -2 sqrt(2/pi) log2(e)
  each_vector(n, [=](int64_t i, int count) {
    const Vec a = vmax(set1(-20.0f), load_some(x + i, count));
    const Vec e = exp2<5>(vmin(set1(126.0f), a * fma(a * a, cubic, linear)));
    store_some(x + i, a / (set1(1.0f) + e), count);
  });
}

void rope_pairs(float* x, int64_t half, const float* cosine, const float* sine) {
  int64_t i = 0;
#if defined(__AVX512F__)
  // A vector of eight pairs: x cos + (neighbour) (-sin, sin).
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i even = _mm512_set1_epi64(0x80000000);  // signs of even elements
  for (; i + 8 <= half; i += 8) {
    const __m512 a = _mm512_loadu_ps(x + 2 * i);
    const __m512 c = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(cosine + i)));
    const __m512 s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(sine + i)));
    const __m512 signed_s = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(s), even));
    _mm512_storeu_ps(x + 2 * i, _mm512_fmadd_ps(a, c, _mm512_mul_ps(_mm512_permute_ps(a, 0xb1), signed_s)));
  }
#endif
  for (; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = cosine[i], s = sine[i];
    x[2 * i] = a * c - b * s;
    x[2 * i + 1] = b * c + a * s;
  }
}

// Sum over a row of term(at, count), lanes apart; four sums at a time to hide the latency of the additions.
template <class Term>
inline Vec row_sum(int64_t d, const Term& term) {
  Vec s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) s[u] = s[u] + term(i + u * kLanes, kLanes);
  for (; i < d; i += kLanes) s[0] = s[0] + term(i, d - i < kLanes ? static_cast<int>(d - i) : kLanes);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// out[i] = the mean of row i's d values from its sums in lanes; 1 / sqrt(mean + eps).
inline void means_of(const Vec* rows, int count, int64_t d, float* out) {
#if defined(__AVX512F__)
  const Vec sums = count <= 4 ? sums_of<1>(rows) : count <= 8 ? sums_of<2>(rows) : sums_of<4>(rows);
  store(out, sums / set1(static_cast<float>(d)));
#else
  for (int i = 0; i < count; ++i) out[i] = sum(rows[i]) / static_cast<float>(d);
#endif
}
inline void factors_of(const Vec* rows, int count, int64_t d, float eps, float* out) {
  means_of(rows, count, d, out);
#if defined(__AVX512F__)
  store(out, set1(1.0f) / Vec{_mm512_sqrt_ps((load(out) + set1(eps)).v)});
#else
  for (int i = 0; i < count; ++i) out[i] = 1.0f / square_root(out[i] + eps);
#endif
}

void layer_norm(const NormRows& rows) {
  const int64_t d = rows.d;
  const float *weight = rows.weight, *bias = rows.bias;
  Vec part[kNormRows];
  for (Vec& p : part) p = zero();
  float mean[kNormRows], factor[kNormRows];
  for (int r = 0; r < rows.count; ++r) {
    const float* x = rows.x[r];
    if (!rows.gated) {
      part[r] = row_sum(d, [x](int64_t i, int n) __attribute__((always_inline)) { return load_some(x + i, n); });
      continue;
    }
    const float *branch = rows.branch[r], *gate = rows.gate[r];
    auto* to = const_cast<float*>(x);
    part[r] = row_sum(d, [=](int64_t i, int n) __attribute__((always_inline)) {
      const Vec a = fma(load_some(branch + i, n), load_some(gate + i, n), load_some(x + i, n));
      store_some(to + i, a, n);
      return a;
    });
  }
  means_of(part, rows.count, d, mean);
  for (int r = 0; r < rows.count; ++r) {
    const float* x = rows.x[r];
    const Vec m = set1(mean[r]);
    // Unused lanes of the last vector hold 0, which is not the mean: they must not count.
    part[r] = row_sum(d, [x, m](int64_t i, int n) __attribute__((always_inline)) {
      Vec a = load_some(x + i, n) - m;
      if (n < kLanes) {
        float some[kLanes] = {};
        store_part(some, a, n);
        a = load(some);
      }
      return a * a;
    });
  }
  factors_of(part, rows.count, d, rows.eps, factor);
  for (int r = 0; r < rows.count; ++r) {
    const float *x = rows.x[r], *shift = rows.shift[r], *scale = shift ? shift + d : nullptr;
    float* y = rows.y[r];
    const Vec m = set1(mean[r]), f = set1(factor[r]);
    // Two cases in loops of their own, a branch for each vector in the rest.
    if (shift && !weight && !bias && !rows.add)
      each_vector(d, [=](int64_t i, int n) __attribute__((always_inline)) {
        const Vec a = (load_some(x + i, n) - m) * f;
        store_some(y + i, fma(a, set1(1.0f) + load_some(scale + i, n), load_some(shift + i, n)), n);
      });
    else if (!shift && weight && bias && !rows.add)
      each_vector(d, [=](int64_t i, int n) __attribute__((always_inline)) {
        const Vec a = (load_some(x + i, n) - m) * f;
        store_some(y + i, a * load_some(weight + i, n) + load_some(bias + i, n), n);
      });
    else
      each_vector(d, [&](int64_t i, int n) __attribute__((always_inline)) {
        Vec a = (load_some(x + i, n) - m) * f;
        if (weight) a = a * load_some(weight + i, n);
        if (bias) a = a + load_some(bias + i, n);
        if (shift) a = fma(a, set1(1.0f) + load_some(scale + i, n), load_some(shift + i, n));
        if (rows.add) a = load_some(y + i, n) + a;
        store_some(y + i, a, n);
      });
  }
}

void add_product(const float* a, const float* b, int64_t n, float* y) {
  each_vector(n, [=](int64_t i, int count) {
    store_some(y + i, fma(load_some(a + i, count), load_some(b + i, count), load_some(y + i, count)), count);
  });
}

inline constexpr ElementwiseOps kOps = {rms_norm,  silu_mul,   relu,       log_sigmoid, rope, silu_in_place,
                                        gelu_tanh, rope_pairs, layer_norm, add_product};

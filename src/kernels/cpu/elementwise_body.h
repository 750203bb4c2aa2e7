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

// Calls each(at, count) for vectors of kLanes values, the last of which may be shorter.
template <class Each>
inline void each_vector(int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) each(i, kLanes);
  if (i < n) each(i, static_cast<int>(n - i));
}

void silu_in_place(float* x, int64_t n) {
  each_vector(n, [x](int64_t i, int count) { store_part(x + i, silu(load_part(x + i, count)), count); });
}

// x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), is the tanh form. Below -20 it is 0 to f32, and x is held there so
// that it does not outgrow the exponential, which is held at 2^126.
void gelu_tanh(float* x, int64_t n) {
  const Vec cubic = set1(-2.30220819813f * 0.044715f), linear = set1(-2.30220819813f);  // -2 sqrt(2/pi) log2(e)
  each_vector(n, [=](int64_t i, int count) {
    const Vec a = vmax(set1(-20.0f), load_part(x + i, count));
    const Vec e = exp2<5>(vmin(set1(126.0f), a * fma(a * a, cubic, linear)));
    store_part(x + i, a / (set1(1.0f) + e), count);
  });
}

void rope_pairs(float* x, int64_t half, const float* cosine, const float* sine) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = cosine[i], s = sine[i];
    x[2 * i] = a * c - b * s;
    x[2 * i + 1] = b * c + a * s;
  }
}

// Sum over a row of term(at, count), four sums at a time to hide the latency of the additions.
template <class Term>
inline float row_sum(int64_t d, const Term& term) {
  Vec s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) s[u] = s[u] + term(i + u * kLanes, kLanes);
  for (; i < d; i += kLanes) s[0] = s[0] + term(i, d - i < kLanes ? static_cast<int>(d - i) : kLanes);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

void layer_norm(const float* x, int64_t d, const float* weight, const float* bias, float eps, const float* shift,
                const float* scale, bool add, float* y) {
  const float mean = row_sum(d, [x](int64_t i, int n) { return load_part(x + i, n); }) / static_cast<float>(d);
  const Vec m = set1(mean);
  // Unused lanes of the last vector hold 0, which is not the mean: they must not count.
  const float variance = row_sum(d, [x, m](int64_t i, int n) {
    Vec a = load_part(x + i, n) - m;
    if (n < kLanes) {
      float part[kLanes] = {};
      store_part(part, a, n);
      a = load(part);
    }
    return a * a;
  }) / static_cast<float>(d);
  const Vec f = set1(1.0f / square_root(variance + eps));
  each_vector(d, [=](int64_t i, int n) {
    Vec a = (load_part(x + i, n) - m) * f;
    if (weight) a = a * load_part(weight + i, n);
    if (bias) a = a + load_part(bias + i, n);
    if (scale) a = fma(a, set1(1.0f) + load_part(scale + i, n), load_part(shift + i, n));
    if (add) a = load_part(y + i, n) + a;
    store_part(y + i, a, n);
  });
}

void add_product(const float* a, const float* b, int64_t n, float* y) {
  each_vector(n, [=](int64_t i, int count) {
    store_part(y + i, fma(load_part(a + i, count), load_part(b + i, count), load_part(y + i, count)), count);
  });
}

inline constexpr ElementwiseOps kOps = {rms_norm,  silu_mul,   relu,       log_sigmoid, rope, silu_in_place,
                                        gelu_tanh, rope_pairs, layer_norm, add_product};

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

inline constexpr ElementwiseOps kOps = {rms_norm, silu_mul, rope};

// The bodies behind GlaOps, written once over Vec; each ISA file includes this inside namespace
// lacuna::cpu and an anonymous namespace.

inline constexpr int kLanes = Vec::kLanes;
inline constexpr int kWide = 2;
inline constexpr int kPanel = kWide * kLanes;
// Rows of a register tile: 12 x 2 sums, 2 panel vectors and a broadcast fit 32 registers; with 16 it is 6 or 4.
inline constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
inline constexpr int kKeyVecs = kGlaChunk / kLanes;  // vectors that hold one channel of a chunk's keys

inline constexpr float kLog2e = 1.44269504088896341f;

// e^x for x <= 0; 0 from -87.3 down, where exp2 would stop at 2^-126.
inline Vec decay_of(Vec x) { return exp2<5>(x * set1(kLog2e)) - set1(0x1p-126f); }

// e^x = hi + lo for x <= 0. Near 0, where f32 keeps few digits of 1 - e^x, lo holds what hi drops: the
// series of e^x - 1 to x^8 is good to 2e-8 of its value down to -0.35; what lies below -0.35 is a factor.
inline void decay_parts(Vec x, Vec* hi, Vec* lo) {
  const Vec near = vmax(set1(-0.35f), x);
  Vec p = fma(near, set1(1.0f / 40320), set1(1.0f / 5040));
  p = fma(p, near, set1(1.0f / 720));
  p = fma(p, near, set1(1.0f / 120));
  p = fma(p, near, set1(1.0f / 24));
  p = fma(p, near, set1(1.0f / 6));
  p = fma(p, near, set1(0.5f));
  const Vec less = fma(near * near, p, near);  // e^near - 1
  const Vec one = set1(1.0f) + less;
  const Vec far = decay_of(x - near);
  *hi = one * far;
  *lo = (less - (one - set1(1.0f))) * far;
}

void decays(const float* x, int64_t n, float* decay, float* rest) {
  Vec hi, lo;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    decay_parts(load(x + i), &hi, &lo);
    store(decay + i, hi);
    store(rest + i, lo);
  }
  if (i == n) return;
  const int m = static_cast<int>(n - i);
  decay_parts(load_part(x + i, m), &hi, &lo);
  store_part(decay + i, hi, m);
  store_part(rest + i, lo, m);
}

// ---- preparing a chunk ----------------------------------------------------------------------------

// kEntering[kGlaChunk - i + j]: 0 for tokens j before i, which decay when token i comes; 1 from i on.
alignas(64) constexpr float kEntering[2 * kGlaChunk] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Token i's row of A for kR query heads, over kV vectors of keys. kDecay: the keys decay first, in place.
template <int kR, int kV, bool kDecay>
void attention_row(const float* q, const float* alpha, float* keys, int i, int dk, float scale, float* a) {
  // Chains of dependent multiply-adds: eight or so cover the latency.
  constexpr int kSplit = kR * kV >= 5 ? 1 : kR * kV >= 3 ? 2 : 4;
  Vec entering[kV], sums[kSplit][kR][kV];
#pragma GCC unroll 16
  for (int v = 0; v < kV; ++v) entering[v] = load(kEntering + kGlaChunk - i + v * kLanes);
#pragma GCC unroll 4
  for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 8
    for (int h = 0; h < kR; ++h)
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) sums[s][h][v] = zero();
  const auto channel = [&](int c, int s) __attribute__((always_inline)) {
    Vec key[kV];
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) {
      key[v] = load(keys + c * kGlaChunk + v * kLanes);
      if (kDecay) {
        key[v] = key[v] * vmax(set1(alpha[c]), entering[v]);
        store(keys + c * kGlaChunk + v * kLanes, key[v]);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kR; ++h) {
      const Vec qv = set1(q[h * dk + c]);
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) sums[s][h][v] = fma(qv, key[v], sums[s][h][v]);
    }
  };
  int c = 0;
  for (; c + kSplit <= dk; c += kSplit)
#pragma GCC unroll 4
    for (int s = 0; s < kSplit; ++s) channel(c + s, s);
  for (; c < dk; ++c) channel(c, 0);
#pragma GCC unroll 8
  for (int h = 0; h < kR; ++h)
#pragma GCC unroll 16
    for (int v = 0; v < kKeyVecs; ++v) {
      float* to = a + h * kGlaChunk + v * kLanes;
      store(to, zero());
      if (v >= kV) continue;
      Vec sum = sums[0][h][v < kV ? v : 0];
#pragma GCC unroll 4
      for (int s = 1; s < kSplit; ++s) sum = sum + sums[s][h][v < kV ? v : 0];
      // Later tokens' keys must not show, not even as 0 * inf.
      const int n = i + 1 - v * kLanes;
      store_part(to, sum * set1(scale), n < kLanes ? n : kLanes);
    }
}

// As many vectors of keys as token i sees.
template <int kR, bool kDecay, int kV = kKeyVecs>
void attention_row_any(const float* q, const float* alpha, float* keys, int i, int dk, float scale, float* a) {
  if constexpr (kV > 1)
    if (i < (kV - 1) * kLanes) return attention_row_any<kR, kDecay, kV - 1>(q, alpha, keys, i, dk, scale, a);
  attention_row<kR, kV, kDecay>(q, alpha, keys, i, dk, scale, a);
}

// Query heads that share a pass over the keys: their sums and the keys fit the registers.
inline constexpr int kHeads = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;

template <bool kDecay, int kR = kHeads>
void attention_heads(int heads, const float* q, const float* alpha, float* keys, int i, int dk, float scale, float* a) {
  if (heads == kR) return attention_row_any<kR, kDecay>(q, alpha, keys, i, dk, scale, a);
  if constexpr (kR > 1) attention_heads<kDecay, kR - 1>(heads, q, alpha, keys, i, dk, scale, a);
}

// keys[c][j] = k[j][c], 0 for tokens that are not there.
void transpose_keys(const float* k, int64_t stride, int tokens, int dk, float* keys) {
  int c = 0;
  if (tokens == kGlaChunk)
    for (; c + kLanes <= dk; c += kLanes)
      for (int j = 0; j < kGlaChunk; j += kLanes)
        transpose(k + j * stride + c, stride, keys + c * kGlaChunk + j, kGlaChunk);
  for (; c < dk; ++c)
    for (int j = 0; j < kGlaChunk; ++j) keys[c * kGlaChunk + j] = j < tokens ? k[j * stride + c] : 0.0f;
}

// Calls each(c, lanes) for the vectors of a row of n.
template <class Each>
inline void for_vectors(int n, Each each) {
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) each(c, kLanes);
  if (c < n) each(c, n - c);
}

bool prepare(const GlaChunk& chunk, float* record, float* workspace) {
  const GlaRecord& shape = chunk.shape;
  const int n = chunk.tokens, dk = shape.dk, group = shape.group;
  float* alpha = workspace;
  float* keys = alpha + GlaRecord::round_up(int64_t{kGlaChunk} * dk);
  float* product = keys + GlaRecord::round_up(int64_t{kGlaChunk} * dk);
  int bad = 0;
  for (int i = 0; i < n; ++i) {
    const float* g = chunk.log_decay + i * chunk.k_stride;
    for (int c = 0; c < dk; ++c) bad |= !(g[c] <= 0.0f);
    for_vectors(dk, [&](int c, int m) {
      const Vec x = load_part(g + c, m), total = i == 0 ? x : load_part(product + c, m) + x;
      store_part(alpha + i * dk + c, decay_of(x), m);
      store_part(product + c, total, m);
    });
  }
  if (bad) return false;
  // The state's decay comes from the sum of the logarithms: products of rounded decays would all err the same way.
  decays(product, dk, record + shape.decay(), record + shape.decay_rest());

  transpose_keys(chunk.k, chunk.k_stride, n, dk, keys);
  for (int i = 0; i < n; ++i) {
    const float* q = chunk.q + i * chunk.q_stride;
    float* scaled = record + shape.q() + int64_t{i} * group * dk;
    for_vectors(dk, [&](int c, int m) {
      const Vec own = load_part(alpha + i * dk + c, m), p = i == 0 ? own : load_part(product + c, m) * own;
      store_part(product + c, p, m);
      for (int h = 0; h < group; ++h)
        store_part(scaled + h * dk + c, load_part(q + h * dk + c, m) * (p * set1(chunk.scale)), m);
    });
    float* a = record + shape.a() + int64_t{i} * group * kGlaChunk;
    for (int h = 0; h < group; h += kHeads) {
      const int heads = group - h < kHeads ? group - h : kHeads;
      const auto rows = h == 0 ? attention_heads<true> : attention_heads<false>;
      rows(heads, q + h * dk, alpha + i * dk, keys, i, dk, chunk.scale, a + h * kGlaChunk);
    }
  }
  // The keys have decayed to the chunk's end: that is how they enter the state.
  float* k = record + shape.k();
  for (int c = 0; c < dk; ++c)
    for (int j = 0; j < n; ++j) k[j * dk + c] = keys[c * kGlaChunk + j];
  return true;
}

// ---- a chunk against a panel of values ---------------------------------------------------------------

// The pragmas keep the sums in registers: unless the loops over them vanish, the array lives in memory.
template <int kR, int kW>
void output_tile(const float* q, int dk, const float* state, const float* a, int depth, const float* values,
                 float* const* out, int width) {
  Vec sums[kR][kW];
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) sums[i][w] = zero();
  const auto add = [&](const float* rows, int64_t stride, int x, const float* panel) __attribute__((always_inline)) {
    Vec b[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) b[w] = load(panel + w * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const Vec r = set1(rows[i * stride + x]);
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) sums[i][w] = fma(r, b[w], sums[i][w]);
    }
  };
  for (int c = 0; c < dk; ++c) add(q, dk, c, state + c * kPanel);
  for (int j = 0; j < depth; ++j) add(a, kGlaChunk, j, values + j * kPanel);
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) {
      const int left = width - w * kLanes;
      if (left >= kLanes)
        store(out[i] + w * kLanes, sums[i][w]);
      else
        store_part(out[i] + w * kLanes, sums[i][w], left);
    }
}

template <int kW, int kR = kRows>
void output_rows(int rows, const float* q, int dk, const float* state, const float* a, int depth, const float* values,
                 float* const* out, int width) {
  if (rows == kR) return output_tile<kR, kW>(q, dk, state, a, depth, values, out, width);
  if constexpr (kR > 1) output_rows<kW, kR - 1>(rows, q, dk, state, a, depth, values, out, width);
}

// kR channels of the state: decay, then all tokens of the chunk. Columns of k are channels.
template <int kR, int kW>
void state_tile(const float* k, int dk, int tokens, const float* values, const float* hi, const float* lo, float* state) {
  Vec sums[kR][kW];
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) sums[i][w] = load(state + i * kPanel + w * kLanes) * set1(lo[i]);
  for (int j = 0; j < tokens; ++j) {
    Vec b[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) b[w] = load(values + j * kPanel + w * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const Vec r = set1(k[j * dk + i]);
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) sums[i][w] = fma(r, b[w], sums[i][w]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) {
      float* to = state + i * kPanel + w * kLanes;
      store(to, fma(load(to), set1(hi[i]), sums[i][w]));
    }
}

template <int kW, int kR = kRows>
void state_rows(int rows, const float* k, int dk, int tokens, const float* values, const float* hi, const float* lo,
                float* state) {
  if (rows == kR) return state_tile<kR, kW>(k, dk, tokens, values, hi, lo, state);
  if constexpr (kR > 1) state_rows<kW, kR - 1>(rows, k, dk, tokens, values, hi, lo, state);
}

// Rows are cut into tiles of nearly equal height: 16 rows are 8 and 8, not 12 and 4.
template <int kW>
void panel_of(const GlaPanel& p) {
  const GlaRecord& shape = p.shape;
  const int dk = shape.dk, rows = p.tokens * shape.group;
  const float* q = p.record + shape.q();
  const float* a = p.record + shape.a();
  for (int at = 0, left = (rows + kRows - 1) / kRows; left > 0; --left) {
    const int take = (rows - at + left - 1) / left;
    float* out[kRows];
    for (int i = 0; i < take; ++i)
      out[i] = p.out + (at + i) / shape.group * p.out_stride + (at + i) % shape.group * p.head_stride;
    const int depth = (at + take - 1) / shape.group + 1;
    output_rows<kW>(take, q + int64_t{at} * dk, dk, p.state, a + at * kGlaChunk, depth, p.values, out, p.width);
    at += take;
  }
  const float* k = p.record + shape.k();
  for (int at = 0, left = (dk + kRows - 1) / kRows; left > 0; --left) {
    const int take = (dk - at + left - 1) / left;
    state_rows<kW>(take, k + at, dk, p.tokens, p.values, p.record + shape.decay() + at,
                   p.record + shape.decay_rest() + at, p.state + int64_t{at} * kPanel);
    at += take;
  }
}

void panel_chunk(const GlaPanel& p) {
  for (int j = 0; j < p.tokens; ++j)
    for (int w = 0; w < kWide; ++w) {
      const int left = p.width - w * kLanes;
      const float* from = p.v + j * p.v_stride + w * kLanes;
      store(p.values + j * kPanel + w * kLanes, left >= kLanes ? load(from) : left > 0 ? load_part(from, left) : zero());
    }
  if (p.width > kLanes) return panel_of<kWide>(p);
  panel_of<1>(p);
}

// ---- token by token ---------------------------------------------------------------------------------

// Bytes of state asked for ahead of their use, see kSmallAhead in linear_bodies.h.
inline constexpr int64_t kStepAhead = 4096;

// kC channels of the state over kW vectors of columns, every token of the call. kPart: the last vector has
// `last` columns.
template <int kC, int kW, bool kPart>
inline void step_block(const GlaStep& t, int c, int64_t column, int last) {
  float* rows = t.state + c * t.state_stride + column;
  Vec s[kC][kW];
#pragma GCC unroll 4
  for (int i = 0; i < kC; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) {
      const float* from = rows + i * t.state_stride + w * kLanes;
      s[i][w] = kPart && w == kW - 1 ? load_part(from, last) : load(from);
    }
  for (int token = 0; token < t.tokens; ++token) {
    const float* k = t.k + token * t.k_stride + c;
    const float* hi = t.decay + int64_t{token} * t.dk + c;
    const float* lo = t.decay_rest + int64_t{token} * t.dk + c;
    const float* v = t.v + token * t.v_stride + column;
    Vec value[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w)
      value[w] = kPart && w == kW - 1 ? load_part(v + w * kLanes, last) : load(v + w * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kC; ++i)
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w)
        s[i][w] = fma(s[i][w], set1(hi[i]), fma(s[i][w], set1(lo[i]), set1(k[i]) * value[w]));
    const float* q = t.q + int64_t{token} * t.group * t.dk + c;
    float* out = t.out + token * t.out_stride + column;
    for (int h = 0; h < t.group; ++h, q += t.dk, out += t.head_stride) {
      Vec sum[kW];
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) {
        float* to = out + w * kLanes;
        sum[w] = kPart && w == kW - 1 ? load_part(to, last) : load(to);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kC; ++i)
#pragma GCC unroll 2
        for (int w = 0; w < kW; ++w) sum[w] = fma(set1(q[i]), s[i][w], sum[w]);
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) {
        if (kPart && w == kW - 1)
          store_part(out + w * kLanes, sum[w], last);
        else
          store(out + w * kLanes, sum[w]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kC; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) {
      float* to = rows + i * t.state_stride + w * kLanes;
      if (kPart && w == kW - 1)
        store_part(to, s[i][w], last);
      else
        store(to, s[i][w]);
    }
}

template <int kC>
inline void step_channels(const GlaStep& t, int c) {
  int64_t column = 0;
  for (; column + kPanel <= t.width; column += kPanel) {
    for (int i = 0; i < kC; ++i)
      for (int64_t b = 0; b < kPanel * 4; b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(t.state + (c + i) * t.state_stride + column) + kStepAhead + b);
    step_block<kC, kWide, false>(t, c, column, 0);
  }
  const int left = static_cast<int>(t.width - column);
  if (left > kLanes)
    step_block<kC, 2, true>(t, c, column, left - kLanes);
  else if (left > 0)
    step_block<kC, 1, true>(t, c, column, left);
}

void step(const GlaStep& t) {
  for (int token = 0; token < t.tokens; ++token)
    for (int h = 0; h < t.group; ++h) {
      float* out = t.out + token * t.out_stride + h * t.head_stride;
      for (int64_t c = 0; c < t.width; ++c) out[c] = 0;
    }
  // Four channels by two vectors: the outputs are loaded and stored once for four products each.
  int c = 0;
  for (; c + 4 <= t.dk; c += 4) step_channels<4>(t, c);
  for (; c < t.dk; ++c) step_channels<1>(t, c);
}

inline constexpr GlaOps kOps = {kPanel, decays, prepare, panel_chunk, step};

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

bool all_decay(const float* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(x[i] <= 0.0f);
  return bad == 0;
}

bool decays(const float* x, int64_t n, float* decay, float* rest) {
  if (!all_decay(x, n)) return false;
  Vec hi, lo;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    decay_parts(load(x + i), &hi, &lo);
    store(decay + i, hi);
    store(rest + i, lo);
  }
  if (i == n) return true;
  const int m = static_cast<int>(n - i);
  decay_parts(load_part(x + i, m), &hi, &lo);
  store_part(decay + i, hi, m);
  store_part(rest + i, lo, m);
  return true;
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
  // Rows of neighbouring tokens are pages apart, where no hardware prefetcher follows.
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < dk; c += 16) {
      __builtin_prefetch(chunk.log_decay + i * chunk.k_stride + c);
      __builtin_prefetch(chunk.k + i * chunk.k_stride + c);
    }
  for (int i = 0; i < n; ++i) {
    const float* g = chunk.log_decay + i * chunk.k_stride;
    if (!all_decay(g, dk)) return false;
    for_vectors(dk, [&](int c, int m) {
      const Vec x = load_part(g + c, m), total = i == 0 ? x : load_part(product + c, m) + x;
      store_part(alpha + i * dk + c, decay_of(x), m);
      store_part(product + c, total, m);
    });
  }
  // The state's decay comes from the sum of the logarithms: products of rounded decays would all err the same way.
  decays(product, dk, record + shape.decay(), record + shape.decay_rest());

  transpose_keys(chunk.k, chunk.k_stride, n, dk, keys);
  for (int i = 0; i < n; ++i) {
    const float* q = chunk.q + i * chunk.q_stride;
    float* scaled = record + shape.q() + int64_t{i} * group * dk;
    for_vectors(dk, [&](int c, int m) {
      const Vec own = load_part(alpha + i * dk + c, m), p = i == 0 ? own : load_part(product + c, m) * own;
      store_part(product + c, p, m);
      for (int h = 0; h < group; ++h) {
        __builtin_prefetch(q + chunk.q_stride + h * dk + c);
        store_part(scaled + h * dk + c, load_part(q + h * dk + c, m) * (p * set1(chunk.scale)), m);
      }
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
  int c = 0;
  for (; c + kLanes <= dk; c += kLanes)
    for (int j = 0; j < kGlaChunk; j += kLanes) transpose(keys + c * kGlaChunk + j, kGlaChunk, k + j * dk + c, dk);
  for (; c < dk; ++c)
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
  // Rows of the output lie pages apart: without this their lines would be waited for one after the other.
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) __builtin_prefetch(out[i] + w * kLanes, 1);
  for (int c = 0; c < dk; ++c) {
    // The next tile's rows follow these; a tile long is ahead enough for them to come from L3.
    __builtin_prefetch(q + (dk + c) * kR);
    add(q, dk, c, state + c * kPanel);
  }
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

// Rows of the state asked for ahead of their use; a row of a panel is two cache lines. At 512 bytes a row these
// are the 4 KB of kSmallAhead in linear_bodies.h.
inline constexpr int kStepAhead = 8;

// One token against kW vectors of value columns, for kH query heads whose sums stay in registers while the rows
// of the state pass by. kUpdate: the rows take the token in first. kPart: the last vector has `last` columns.
template <int kH, int kW, bool kPart, bool kUpdate>
void step_heads(const GlaStep& t, int token, int head, int64_t column, int last) {
  const auto load_at = [last](const float* p, int w) __attribute__((always_inline)) {
    return kPart && w == kW - 1 ? load_part(p + w * kLanes, last) : load(p + w * kLanes);
  };
  const auto store_at = [last](float* p, int w, Vec x) __attribute__((always_inline)) {
    if (kPart && w == kW - 1)
      store_part(p + w * kLanes, x, last);
    else
      store(p + w * kLanes, x);
  };
  const float* k = t.k + token * t.k_stride;
  const float* hi = t.decay + int64_t{token} * t.dk;
  const float* lo = t.decay_rest + int64_t{token} * t.dk;
  const float* q = t.q + token * t.q_stride + int64_t{head} * t.dk;
  // Copies: stores through vector types might change *t, for all the compiler knows.
  const int64_t dk = t.dk, stride = t.state_stride;
  const float* v = t.v + token * t.v_stride + column;
  Vec value[kW], sums[kH][kW];
#pragma GCC unroll 2
  for (int w = 0; w < kW; ++w) value[w] = load_at(v, w);
#pragma GCC unroll 16
  for (int h = 0; h < kH; ++h)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) sums[h][w] = zero();
  float* row = t.state + column;
  const float* next = kUpdate && token == 0 && t.next ? t.next + column * dk : nullptr;
  for (int64_t c = 0; c < dk; ++c, row += stride) {
    Vec s[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) s[w] = load_at(row, w);
    if (kUpdate) {
      for (int line = 0; line < kW * kLanes; line += 16) __builtin_prefetch(row + kStepAhead * stride + line, 1);
      if (next)
        for (int line = 0; line < kW * kLanes; line += 16) __builtin_prefetch(next + c * (kW * kLanes) + line, 0, 2);
      const Vec h = set1(hi[c]), l = set1(lo[c]), kv = set1(k[c]);
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) s[w] = fma(s[w], h, fma(s[w], l, kv * value[w]));
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) store_at(row, w, s[w]);
    }
#pragma GCC unroll 16
    for (int h = 0; h < kH; ++h) {
      const Vec qv = set1(q[h * dk + c]);
#pragma GCC unroll 2
      for (int w = 0; w < kW; ++w) sums[h][w] = fma(qv, s[w], sums[h][w]);
    }
  }
  const Vec scale = set1(t.scale);
  float* out = t.out + token * t.out_stride + head * t.head_stride + column;
#pragma GCC unroll 16
  for (int h = 0; h < kH; ++h)
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) store_at(out + h * t.head_stride, w, sums[h][w] * scale);
}

template <int kW, bool kPart, bool kUpdate, int kH = kHeads>
void step_any(const GlaStep& t, int token, int head, int heads, int64_t column, int last) {
  if (heads == kH) return step_heads<kH, kW, kPart, kUpdate>(t, token, head, column, last);
  if constexpr (kH > 1) step_any<kW, kPart, kUpdate, kH - 1>(t, token, head, heads, column, last);
}

template <int kW, bool kPart>
void step_columns(const GlaStep& t, int64_t column, int last) {
  for (int token = 0; token < t.tokens; ++token)
    for (int head = 0; head < t.group; head += kHeads) {
      const int heads = t.group - head < kHeads ? t.group - head : kHeads;
      const auto body = head == 0 ? step_any<kW, kPart, true> : step_any<kW, kPart, false>;
      body(t, token, head, heads, column, last);
    }
}

// A panel's rows come from memory for the first token and stay in L1 for the others.
void step(const GlaStep& t) {
  int64_t column = 0;
  for (; column + kPanel <= t.width; column += kPanel) step_columns<kWide, false>(t, column, 0);
  const int left = static_cast<int>(t.width - column);
  if (left > kLanes)
    step_columns<2, true>(t, column, left - kLanes);
  else if (left > 0)
    step_columns<1, true>(t, column, left);
}

inline constexpr GlaOps kOps = {kPanel, decays, prepare, panel_chunk, step};

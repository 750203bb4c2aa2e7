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

// The lanes of a vector of keys that decay when a token comes: those of the n tokens before it.
#if defined(__AVX512F__)
using Lanes = __mmask16;
inline Lanes lanes_before(int n) { return first(n); }
inline Vec decayed(Vec key, float alpha, Lanes which) {
  return {_mm512_mask_mul_ps(key.v, which, key.v, _mm512_set1_ps(alpha))};
}
#else
// Factors that a decay is no smaller than.
using Lanes = Vec;
alignas(64) constexpr float kEntering[2 * kGlaChunk] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
inline Lanes lanes_before(int n) { return load(kEntering + kGlaChunk - n); }
inline Vec decayed(Vec key, float alpha, Lanes entering) { return key * vmax(set1(alpha), entering); }
#endif

// Rows of A for kT tokens from i on and kR query heads, over kV vectors of keys. The keys decay in place as the
// tokens come.
template <int kT, int kR, int kV>
__attribute__((noinline)) void attention_tile(const GlaChunk& chunk, const float* alpha, float* keys, int i, int head,
                                              float* a) {
  const int dk = chunk.shape.dk, group = chunk.shape.group;
  const int64_t stride = chunk.q_stride, step = dk;
  const float* q = chunk.q + i * stride + int64_t{head} * dk;
  alpha += int64_t{i} * dk;
  Lanes which[kT][kV];
  Vec sums[kT][kR][kV];
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) {
      which[t][v] = lanes_before(i + t - v * kLanes);
#pragma GCC unroll 8
      for (int h = 0; h < kR; ++h) sums[t][h][v] = zero();
    }
  const float* rows[kT];
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t) rows[t] = q + t * stride;
  for (int c = 0; c < dk; ++c) {
    Vec key[kV];
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) key[v] = load(keys + v * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) key[v] = decayed(key[v], alpha[t * step], which[t][v]);
#pragma GCC unroll 8
      for (int h = 0; h < kR; ++h) {
        const Vec qv = set1(rows[t][h * step]);
#pragma GCC unroll 16
        for (int v = 0; v < kV; ++v) sums[t][h][v] = fma(qv, key[v], sums[t][h][v]);
      }
      ++rows[t];
      // Else the compiler keeps a pointer for every head and token, most of them in memory.
      asm("" : "+r"(rows[t]));
    }
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) store(keys + v * kLanes, key[v]);
    keys += kGlaChunk;
    ++alpha;
    asm("" : "+r"(alpha));
  }
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 8
    for (int h = 0; h < kR; ++h)
#pragma GCC unroll 16
      for (int v = 0; v < kKeyVecs; ++v) {
        float* to = a + ((i + t) * group + head + h) * kGlaChunk + v * kLanes;
        store(to, zero());
        if (v >= kV) continue;
        // Later tokens' keys must not show, not even as 0 * inf.
        const int n = i + t + 1 - v * kLanes;
        store_part(to, sums[t][h][v < kV ? v : 0] * set1(chunk.scale), n < 0 ? 0 : n < kLanes ? n : kLanes);
      }
}

// Query heads that share a pass over the keys: their sums and the keys fit the registers.
inline constexpr int kHeads = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
// Tokens that do: eight or so chains of dependent multiply-adds cover the latency.
constexpr int tokens_of_tile(int sums) { return sums <= kHeads / 2 ? 4 : sums <= kHeads ? 2 : 1; }

// Over as many vectors of keys as the tokens see. Returns the number of tokens done.
template <int kR, int kV = kKeyVecs>
int attention_tokens(const GlaChunk& chunk, const float* alpha, float* keys, int i, int head, float* a) {
  constexpr int kT = tokens_of_tile(kR * kV);
  if constexpr (kV > 1)
    if (i + kT <= (kV - 1) * kLanes) return attention_tokens<kR, kV - 1>(chunk, alpha, keys, i, head, a);
  if (i + kT <= chunk.tokens) {
    attention_tile<kT, kR, kV>(chunk, alpha, keys, i, head, a);
    return kT;
  }
  attention_tile<1, kR, kV>(chunk, alpha, keys, i, head, a);
  return 1;
}

template <int kR = kHeads>
void attention_heads(int heads, const GlaChunk& chunk, const float* alpha, float* keys, int head, float* a) {
  if (heads == kR)
    for (int i = 0; i < chunk.tokens;) i += attention_tokens<kR>(chunk, alpha, keys, i, head, a);
  else if constexpr (kR > 1)
    attention_heads<kR - 1>(heads, chunk, alpha, keys, head, a);
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

// Vectors of a row that are prepared together: their sums and products stay in registers from token to token.
inline constexpr int kDecayVecs = kLanes == 16 ? 4 : 2;

// Channels [c, c + kN vectors) of all tokens: decays to alpha, queries as they meet the state to the record, the sum of
// the log decays to total. `last` channels of the last vector count. Raises `largest_log`.
template <int kN>
void decay_channels(const GlaChunk& chunk, float* record, int c, int last, float* alpha, float* total,
                    Vec* largest_log) {
  const int dk = chunk.shape.dk, group = chunk.shape.group, tokens = chunk.tokens;
  const int64_t q_stride = chunk.q_stride, k_stride = chunk.k_stride;
  const float* q = chunk.q + c;
  const float* g = chunk.log_decay + c;
  float* scaled = record + chunk.shape.q() + c;
  const auto lanes = [last](int u) { return u == kN - 1 ? last : kLanes; };
  Vec sum[kN], product[kN], most = *largest_log;
#pragma GCC unroll 4
  for (int u = 0; u < kN; ++u) {
    sum[u] = zero();
    product[u] = set1(chunk.scale);
  }
  for (int i = 0; i < tokens; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < kN; ++u) {
      const Vec x = load_part(g + u * kLanes, lanes(u)), own = decay_of(x);
      most = vmax(x, most);
      sum[u] = sum[u] + x;
      product[u] = product[u] * own;
      store_part(alpha + c + u * kLanes, own, lanes(u));
    }
    for (int h = 0; h < group; ++h) {
#pragma GCC unroll 4
      for (int u = 0; u < kN; ++u)
        store_part(scaled + u * kLanes, load_part(q + h * dk + u * kLanes, lanes(u)) * product[u], lanes(u));
      scaled += dk;
    }
    g += k_stride;
    q += q_stride;
    alpha += dk;
  }
#pragma GCC unroll 4
  for (int u = 0; u < kN; ++u) store_part(total + c + u * kLanes, sum[u], lanes(u));
  *largest_log = most;
}

bool prepare(const GlaChunk& chunk, float* record, float* workspace) {
  const GlaRecord& shape = chunk.shape;
  const int dk = shape.dk, group = shape.group;
  float* alpha = workspace;
  float* total = alpha + GlaRecord::round_up(int64_t{kGlaChunk} * dk);
  Vec largest_log = set1(-1.0f);
  int c = 0;
  for (; c + kDecayVecs * kLanes <= dk; c += kDecayVecs * kLanes)
    decay_channels<kDecayVecs>(chunk, record, c, kLanes, alpha, total, &largest_log);
  for (; c < dk; c += kLanes)
    decay_channels<1>(chunk, record, c, dk - c < kLanes ? dk - c : kLanes, alpha, total, &largest_log);
  // The state's decay comes from the sum of the logarithms: products of rounded decays would all err the same way.
  // A NaN, which vmax passes over, shows in the sum.
  if (!decays(total, dk, record + shape.decay(), record + shape.decay_rest()) || largest(largest_log) > 0) return false;

  // As they are left, decayed to the chunk's end, the keys enter the state.
  float* keys = record + shape.k();
  for (int h = 0; h < group; h += kHeads) {
    transpose_keys(chunk.k, chunk.k_stride, chunk.tokens, dk, keys);
    attention_heads(group - h < kHeads ? group - h : kHeads, chunk, alpha, keys, h, record + shape.a());
  }
  return true;
}

// ---- a chunk against a panel of values ---------------------------------------------------------------

// Asks for the rows of the next chunk little by little: rows of neighbouring tokens lie pages apart, where no
// hardware prefetcher follows. A piece is dk floats of a row.
class Ahead {
 public:
  Ahead(const GlaChunk& c, int slots)
      : c_(c), value_pieces_((static_cast<int>(c.width) + c.shape.dk - 1) / c.shape.dk), slots_(slots) {
    count_ = (c.shape.group * (1 + value_pieces_) + 2 + value_pieces_) * kGlaChunk;
  }
  // To be called `slots` times.
  void slot() {
    for (due_ += count_; due_ >= slots_; due_ -= slots_) ask();
  }

 private:
  // Changes piece_: the compiler drops a function that does nothing but prefetch.
  void ask() {
    const int group = c_.shape.group, dk = c_.shape.dk, row = piece_ % kGlaChunk;
    int i = piece_++ / kGlaChunk;
    const float* at;
    if (i < group) {
      at = c_.q + i * dk + row * c_.q_stride;
    } else if ((i -= group) < 2) {
      at = (i ? c_.log_decay : c_.k) + row * c_.k_stride;
    } else if ((i -= 2) < value_pieces_) {
      at = c_.v + i * dk + row * c_.v_stride;
    } else {
      i -= value_pieces_;
      at = c_.out + i / value_pieces_ * c_.head_stride + i % value_pieces_ * dk + row * c_.out_stride;
    }
    for (int c = 0; c < dk; c += 16) __builtin_prefetch(at + c);
  }

  const GlaChunk& c_;
  int value_pieces_, count_, slots_, due_ = 0, piece_ = 0;
};

// The pragmas keep the sums in registers: unless the loops over them vanish, the array lives in memory.
template <int kR, int kW>
void output_tile(const float* q, int dk, const float* state, const float* a, int depth, const float* values,
                 float* const* out, int width, Ahead& ahead) {
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
  for (int c = 0; c < dk;) {
    ahead.slot();
    for (const int end = c + 16 < dk ? c + 16 : dk; c < end; ++c) {
      // The next tile's rows follow these.
      __builtin_prefetch(q + (dk + c) * kR);
      add(q, dk, c, state + c * kPanel);
    }
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
                 float* const* out, int width, Ahead& ahead) {
  if (rows == kR) return output_tile<kR, kW>(q, dk, state, a, depth, values, out, width, ahead);
  if constexpr (kR > 1) output_rows<kW, kR - 1>(rows, q, dk, state, a, depth, values, out, width, ahead);
}

// kR channels of the state: decay, then all tokens of the chunk.
template <int kR, int kW>
void state_tile(const float* k, int tokens, const float* values, const float* hi, const float* lo, float* state) {
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
      const Vec r = set1(k[i * kGlaChunk + j]);
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
void state_rows(int rows, const float* k, int tokens, const float* values, const float* hi, const float* lo,
                float* state) {
  if (rows == kR) return state_tile<kR, kW>(k, tokens, values, hi, lo, state);
  if constexpr (kR > 1) state_rows<kW, kR - 1>(rows, k, tokens, values, hi, lo, state);
}

// Rows are cut into tiles of nearly equal height: 16 rows are 8 and 8, not 12 and 4.
int tiles_of(int rows) { return (rows + kRows - 1) / kRows; }

template <int kW>
void panel_of(const GlaChunk& chunk, const float* record, int64_t column, float* state, const float* values,
              Ahead& ahead) {
  const GlaRecord& shape = chunk.shape;
  const int dk = shape.dk, group = shape.group, rows = chunk.tokens * group;
  const int width = static_cast<int>(chunk.width - column);
  const float* q = record + shape.q();
  const float* a = record + shape.a();
  for (int at = 0, left = tiles_of(rows); left > 0; --left) {
    const int take = (rows - at + left - 1) / left;
    float* out[kRows];
    for (int i = 0; i < take; ++i)
      out[i] = chunk.out + (at + i) / group * chunk.out_stride + (at + i) % group * chunk.head_stride + column;
    const int depth = (at + take - 1) / group + 1;
    output_rows<kW>(take, q + int64_t{at} * dk, dk, state, a + at * kGlaChunk, depth, values, out, width, ahead);
    at += take;
  }
  const float* k = record + shape.k();
  for (int at = 0, left = tiles_of(dk); left > 0; --left) {
    const int take = (dk - at + left - 1) / left;
    ahead.slot();
    state_rows<kW>(take, k + at * kGlaChunk, chunk.tokens, values, record + shape.decay() + at,
                   record + shape.decay_rest() + at, state + int64_t{at} * kPanel);
    at += take;
  }
}

void use(const GlaChunk& chunk, const float* record, const GlaChunk& next, float* state, float* values) {
  const int dk = chunk.shape.dk, panels = static_cast<int>((chunk.width + kPanel - 1) / kPanel);
  Ahead ahead(next, panels * (tiles_of(chunk.tokens * chunk.shape.group) * ((dk + 15) / 16) + tiles_of(dk)));
  for (int64_t column = 0; column < chunk.width; column += kPanel, state += dk * kPanel) {
    const int width = static_cast<int>(chunk.width - column);
    for (int j = 0; j < chunk.tokens; ++j)
      for (int w = 0; w < kWide; ++w) {
        const int left = width - w * kLanes;
        const float* from = chunk.v + j * chunk.v_stride + column + w * kLanes;
        store(values + j * kPanel + w * kLanes, left >= kLanes ? load(from) : left > 0 ? load_part(from, left) : zero());
      }
    if (width > kLanes)
      panel_of<kWide>(chunk, record, column, state, values, ahead);
    else
      panel_of<1>(chunk, record, column, state, values, ahead);
  }
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
  // Each token asks for its share of the next state's panel.
  const int64_t share = kW * kLanes / t.tokens;
  const float* next = kUpdate && t.next ? t.next + column * dk + token * share * dk : nullptr;
  for (int64_t c = 0; c < dk; ++c, row += stride) {
    Vec s[kW];
#pragma GCC unroll 2
    for (int w = 0; w < kW; ++w) s[w] = load_at(row, w);
    if (kUpdate) {
      for (int line = 0; line < kW * kLanes; line += 16) __builtin_prefetch(row + kStepAhead * stride + line, 1);
      if (next)
        for (int line = 0; line < kW * kLanes; line += 16)
          if (line < share) __builtin_prefetch(next + c * share + line, 0, 2);
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

// Rows of the next head, a panel's share of them.
__attribute__((always_inline)) inline void ask_rows(const GlaStep& t, int64_t column) {
  for (const GlaStep::Rows& rows : t.next_rows)
    for (int64_t i = rows.floats * column / t.width, end = rows.floats * (column + kPanel) / t.width; i < end; i += 16)
      __builtin_prefetch(rows.at + i, 0, 2);
}

template <int kW, bool kPart>
void step_columns(const GlaStep& t, int64_t column, int last) {
  ask_rows(t, column);
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

inline constexpr GlaOps kOps = {kPanel, decays, prepare, use, step};

// The matrix-product bodies, written once over a vector type S and instantiated by each ISA file.
// Include it only inside an anonymous namespace of such a file (see linear_portable.cc): every
// function is compiled for that file's target and must not be merged with another's.
//
// S gives: V (a register of kLanes words), kLanes, kRegisters, zero, load, store, broadcast,
// fma(sum, a, b), pairs(sum, a, b), add, sums (lane i of the result is the horizontal sum of vector i),
// round_bf16, transpose (in place, square), widen(const T*) for each weight type and narrow(const T*) for those exact in bf16, narrow2(const
// float*) that rounds 2 * kLanes floats to bf16 words.

// ---- operands -------------------------------------------------------------------------------------

// One word of k is one f32 product.
template <class S, bool kRound>
struct F32Operand {
  static constexpr int kPerWord = 1;
  using V = typename S::V;
  static V dot(V sum, V x, V w) { return S::fma(sum, x, w); }
  static V activations(const float* x) { return kRound ? S::round_bf16(S::load(x)) : S::load(x); }
  template <class W>
  static V weights(const W* w) { return S::widen(w); }
};

// One word of k is two bf16 products.
template <class S>
struct PairOperand {
  static constexpr int kPerWord = 2;
  using V = typename S::V;
  static V dot(V sum, V x, V w) { return S::pairs(sum, x, w); }
  static V activations(const float* x) { return S::narrow2(x); }
  template <class W>
  static V weights(const W* w) { return S::narrow(w); }
};

// The first `valid` elements of a vector's worth, zeros behind them: nothing past a row's end is read.
template <int kCount, class T>
struct Tail {
  T data[kCount] = {};
  Tail(const T* from, int64_t valid) {
    for (int64_t i = 0; i < valid; ++i) data[i] = from[i];
  }
};

// ---- small M --------------------------------------------------------------------------------------

template <class S, class Op>
void pack_small_row(const float* x, int64_t k, float* packed) {
  constexpr int kStep = S::kLanes * Op::kPerWord;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep, packed += S::kLanes) S::store(packed, Op::activations(x + i));
  if (i < k) S::store(packed, Op::activations(Tail<kStep, float>(x + i, k - i).data));
}

template <class S, class Op, class W>
__attribute__((noinline)) typename S::V tail_weights(const W* w, int64_t valid) {
  return Op::weights(Tail<S::kLanes * Op::kPerWord, W>(w, valid).data);
}

// kRows weight rows times kM rows of x, for columns first … first + kRows of the piece.
template <class S, class Op, class W, int kRows, int kM>
void small_tile(const LinearPiece& p, const W* w, int64_t x_words, int64_t first) {
  using V = typename S::V;
  constexpr int kStep = S::kLanes * Op::kPerWord;
  constexpr int kLine = 64 / static_cast<int>(sizeof(W));  // weights in a cache line: one prefetch for them
  constexpr int kSteps = kLine > kStep ? kLine / kStep : 1;
  constexpr int kSums = kM * kRows;
  V sum[kSums];
#pragma GCC unroll 32
  for (int j = 0; j < kSums; ++j) sum[j] = S::zero();
  const auto step = [&](int64_t i, const float* xi) __attribute__((always_inline)) {
    V wr[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) wr[r] = Op::weights(w + r * p.k + i);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const V xm = S::load(xi + m * x_words);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[m * kRows + r] = Op::dot(sum[m * kRows + r], xm, wr[r]);
    }
  };
  constexpr int64_t kSize = sizeof(W);
  int64_t i = 0;
  const float* xi = static_cast<const float*>(p.x);
  for (; i + kSteps * kStep <= p.k; i += kSteps * kStep, xi += kSteps * S::kLanes) {
    ask_ahead<kRows>(w, p.k * kSize, i * kSize);
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; ++s) step(i + s * kStep, xi + s * S::kLanes);
  }
  for (; i + kStep <= p.k; i += kStep, xi += S::kLanes) step(i, xi);
  if (i < p.k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V wr = tail_weights<S, Op, W>(w + r * p.k + i, p.k - i);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) sum[m * kRows + r] = Op::dot(sum[m * kRows + r], S::load(xi + m * x_words), wr);
    }
  }

  // The horizontal sums of kLanes vectors at a time: a fixed tree, the same whatever stands beside it.
  constexpr int kFull = (kSums + S::kLanes - 1) / S::kLanes * S::kLanes;
  float total[kFull];
#pragma GCC unroll 32
  for (int j = 0; j < kFull; j += S::kLanes) {
    V part[S::kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < S::kLanes; ++l) part[l] = j + l < kSums ? sum[j + l < kSums ? j + l : 0] : S::zero();
    S::store(total + j, S::sums(part));
  }
  for (int m = 0; m < kM; ++m) {
    float* y = p.y + m * p.y_stride + first;
    for (int r = 0; r < kRows; ++r) {
      // One expression without branches, so that it is rounded alike in every instance of this body.
      const float scale = p.row_scale ? p.row_scale[first + r] : 1.0f;
      const float bias = p.bias ? p.bias[first + r] : 0.0f;
      const float value = total[m * kRows + r] * scale + bias;
      y[r] = p.accumulate ? y[r] + value : value;
    }
  }
}

template <class S, class Op, class W, int kM>
void small_rows(const LinearPiece& p) {
  // As many weight rows at once as leave registers for them and one vector of x: kRows * (kM + 1) + 1.
  constexpr int kFit = (S::kRegisters - 1) / (kM + 1);
  constexpr int kRows = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  constexpr int kStep = S::kLanes * Op::kPerWord;
  const int64_t x_words = (p.k + kStep - 1) / kStep * S::kLanes;
  const W* w = static_cast<const W*>(p.weight);
  int64_t n = 0;
  for (; n + kRows <= p.count; n += kRows) small_tile<S, Op, W, kRows, kM>(p, w + n * p.k, x_words, n);
  for (; n < p.count; ++n) small_tile<S, Op, W, 1, kM>(p, w + n * p.k, x_words, n);
}

template <class S, class Op, class W>
void small_any_m(const LinearPiece& p) {
  switch (p.m) {
    case 1: return small_rows<S, Op, W, 1>(p);
    case 2: return small_rows<S, Op, W, 2>(p);
    case 3: return small_rows<S, Op, W, 3>(p);
    case 4: return small_rows<S, Op, W, 4>(p);
    case 5: return small_rows<S, Op, W, 5>(p);
    case 6: return small_rows<S, Op, W, 6>(p);
    case 7: return small_rows<S, Op, W, 7>(p);
    case 8: return small_rows<S, Op, W, 8>(p);
  }
}

// ---- large M --------------------------------------------------------------------------------------
// Vectors run along M: x is packed once a call into groups of kLanes rows, transposed, so that a load
// gives one word of k for kLanes rows; weights are broadcast from panels that keep their row-major
// order and so cost only a copy (and the widening) to pack.

template <class S, class Op>
void pack_group_words(const float* x, int64_t x_stride, int64_t rows, int64_t k, int64_t begin, int64_t end,
                      float* group) {
  using V = typename S::V;
  constexpr int kStep = S::kLanes * Op::kPerWord;
  for (int64_t word = begin; word < end; word += S::kLanes) {
    const int64_t i = word * Op::kPerWord;
    V v[S::kLanes];
    for (int64_t r = 0; r < S::kLanes; ++r) {
      const float* row = x + r * x_stride + i;
      if (r >= rows)
        v[r] = S::zero();
      else if (i + kStep <= k)
        v[r] = Op::activations(row);
      else
        v[r] = Op::activations(Tail<kStep, float>(row, k - i).data);
    }
    S::transpose(v);
    const int64_t valid = end - word < S::kLanes ? end - word : S::kLanes;
    for (int64_t j = 0; j < valid; ++j) S::store(group + (word + j) * S::kLanes, v[j]);
  }
}

// The words of kCols weight rows that a tile works on: panels of kCols rows, chunk after chunk of
// kPanelWords words, [chunk][row][word]. The tile that needs a panel first packs it as it goes, one chunk
// ahead of the multiplications, so that waiting for memory and computing overlap.
template <class W>
struct Panel {
  float* packed;   // chunk 0
  int64_t keep;    // -1: all chunks stay for the tiles that follow; 1: two take turns
  float* tail;     // where the chunk goes that k does not fill
  const W* w;      // the first row at k = 0
  int64_t rows;    // of weights that there are, 1 … kCols; the last stands in for the missing
  int64_t jump;    // from a row's last value in this block of k to where reading goes on, in values
};

// Packs words [word, word + kPanelWords) of the panel's rows, all within k; the block of k ends at `end`.
template <class S, class Op, class W, int kCols>
void pack_chunk(const Panel<W>& panel, int64_t k, int64_t word, int64_t end, float* to) {
  const int64_t first = word * Op::kPerWord;
  const int64_t ahead = first + kLargeAhead / kCols / static_cast<int64_t>(sizeof(W));
  const int64_t soon = ahead < end * Op::kPerWord ? ahead : ahead + panel.jump;
#pragma GCC unroll 16
  for (int r = 0; r < kCols; ++r) {
    const W* row = panel.w + (r < panel.rows ? r : panel.rows - 1) * k;
    __builtin_prefetch(row + soon);
#pragma GCC unroll 4
    for (int j = 0; j < kPanelWords; j += S::kLanes)
      S::store(to + r * kPanelWords + j, Op::weights(row + first + j * Op::kPerWord));
  }
}

// The same for the chunk that k ends in, filled up with zeros.
template <class S, class Op, class W, int kCols>
__attribute__((noinline)) void pack_tail(const Panel<W>& panel, int64_t k, int64_t word) {
  constexpr int kStep = S::kLanes * Op::kPerWord;
  for (int r = 0; r < kCols; ++r) {
    const W* row = panel.w + (r < panel.rows ? r : panel.rows - 1) * k;
    for (int j = 0; j < kPanelWords; j += S::kLanes) {
      const int64_t i = (word + j) * Op::kPerWord, left = k - i;
      const Tail<kStep, W> values(row + i, left < 0 ? 0 : left < kStep ? left : kStep);
      S::store(panel.tail + r * kPanelWords + j, Op::weights(values.data));
    }
  }
}

// kGroups groups of x times kCols weight rows over words [begin, end) of k; x at word begin.
// sums: [group][column][lane]; columns of a group are kLanes floats apart, groups group_sums apart.
template <class S, class Op, class W, int kGroups, int kCols, bool kPack>
void large_tile(const float* x, int64_t group_words, const Panel<W>& panel, int64_t k, int64_t begin, int64_t end,
                float* sums, int64_t group_sums) {
  using V = typename S::V;
  constexpr int64_t kChunk = kCols * kPanelWords;
  const int64_t whole = k / (kPanelWords * Op::kPerWord) * kPanelWords;  // words in chunks that k fills
  if (kPack && end > whole) pack_tail<S, Op, W, kCols>(panel, k, whole);
  if (kPack && begin < whole) pack_chunk<S, Op, W, kCols>(panel, k, begin, end, panel.packed);
  V sum[kGroups][kCols];
#pragma GCC unroll 3
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c)
      sum[g][c] = begin == 0 ? S::zero() : S::load(sums + g * group_sums + c * S::kLanes);
  for (int64_t word = begin, c = 0; word < end; word += kPanelWords, ++c) {
    if (kPack && word + 2 * kPanelWords <= end && word + 2 * kPanelWords <= whole)
      pack_chunk<S, Op, W, kCols>(panel, k, word + kPanelWords, end, panel.packed + ((c + 1) & panel.keep) * kChunk);
    const float* w = word < whole ? panel.packed + (c & panel.keep) * kChunk : panel.tail;
    const int64_t inner = end - word < kPanelWords ? end - word : kPanelWords;
    for (int64_t j = 0; j < inner; ++j, x += S::kLanes) {
      V xv[kGroups];
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) xv[g] = S::load(x + g * group_words);
#pragma GCC unroll 16
      for (int n = 0; n < kCols; ++n) {
        const V wv = S::broadcast(w + n * kPanelWords + j);
#pragma GCC unroll 3
        for (int g = 0; g < kGroups; ++g) sum[g][n] = Op::dot(sum[g][n], xv[g], wv);
      }
    }
  }
#pragma GCC unroll 3
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) S::store(sums + g * group_sums + c * S::kLanes, sum[g][c]);
}

// Scales, biases and transposes the sums of one group into rows of y.
template <class S>
void large_finish(const LinearPiece& p, const float* sums, float* y, int64_t rows) {
  using V = typename S::V;
  constexpr int kLanes = S::kLanes;
  for (int64_t n = 0; n < p.count; n += kLanes) {
    const int64_t columns = p.count - n < kLanes ? p.count - n : kLanes;
    V v[kLanes];
    for (int c = 0; c < kLanes; ++c) {
      if (c >= columns) {
        v[c] = S::zero();
        continue;
      }
      v[c] = S::load(sums + (n + c) * kLanes);
      const V bias = p.bias ? S::broadcast(p.bias + n + c) : S::zero();
      if (p.row_scale)
        v[c] = S::fma(bias, v[c], S::broadcast(p.row_scale + n + c));
      else if (p.bias)
        v[c] = S::add(v[c], bias);
    }
    S::transpose(v);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = y + r * p.y_stride + n;
      if (columns == kLanes) {
        S::store(to, p.accumulate ? S::add(S::load(to), v[r]) : v[r]);
        continue;
      }
      float last[kLanes];
      S::store(last, v[r]);
      for (int64_t c = 0; c < columns; ++c) to[c] = p.accumulate ? to[c] + last[c] : last[c];
    }
  }
}

// All weight rows of a piece for up to kMost groups of x at a time, kCols rows at a time.
template <class S, class Op, class W, int kMost, int kCols>
void large_columns(const LinearPiece& p, float* workspace) {
  constexpr int kLanes = S::kLanes, kTwo = kMost >= 2 ? 2 : 1;
  const int64_t total_words = (p.k + Op::kPerWord - 1) / Op::kPerWord;
  const int64_t group_words = total_words * kLanes;
  const int64_t groups = (p.m + kLanes - 1) / kLanes;
  const int64_t group_sums = (p.count + kCols - 1) / kCols * kCols * kLanes;
  // If x is one tile high, no panel is used twice and k need not be cut for their sake, only for x's.
  const bool once = groups <= kMost;
  const int64_t block = once ? kOnceWords / groups / kPanelWords * kPanelWords : kBlockWords;
  const int64_t panel_words = once ? 0 : kBlockWords * kCols;
  float* sums = workspace + kMaxTaskColumns * kBlockWords;
  const float* x = static_cast<const float*>(p.x);
  for (int64_t begin = 0; begin < total_words; begin += block) {
    const int64_t end = begin + block < total_words ? begin + block : total_words;
    for (int64_t g = 0; g < groups;) {
      // Four groups are two and two: a tile of one leaves the units waiting for its few sums.
      const int64_t left = groups - g;
      const int64_t take = left >= kMost && left != kMost + 1 ? kMost : left >= 2 ? kTwo : 1;
      const float* xg = x + g * group_words + begin * kLanes;
      float* to = sums + g * group_sums;
      Panel<W> panel{workspace, once ? 1 : -1, nullptr, static_cast<const W*>(p.weight), 0, 0};
      panel.jump = kCols * p.k - (end - begin) * Op::kPerWord;
      const int64_t last = once ? 2 : (end - begin) / kPanelWords;  // chunk that a tail is packed to
      for (int64_t n = 0; n < p.count; n += kCols) {
        panel.rows = p.count - n < kCols ? p.count - n : kCols;
        panel.tail = panel.packed + last * kCols * kPanelWords;
        const auto tile = g > 0       ? take == kMost ? large_tile<S, Op, W, kMost, kCols, false>
                                        : take == kTwo ? large_tile<S, Op, W, kTwo, kCols, false>
                                                      : large_tile<S, Op, W, 1, kCols, false>
                          : take == kMost ? large_tile<S, Op, W, kMost, kCols, true>
                          : take == kTwo    ? large_tile<S, Op, W, kTwo, kCols, true>
                                          : large_tile<S, Op, W, 1, kCols, true>;
        tile(xg, group_words, panel, p.k, begin, end, to + n * kLanes, group_sums);
        panel.w += kCols * p.k;
        panel.packed += panel_words;
      }
      g += take;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows = p.m - g * kLanes < kLanes ? p.m - g * kLanes : kLanes;
    large_finish<S>(p, sums + g * group_sums, p.y + g * kLanes * p.y_stride, rows);
  }
}

template <class S, class Op, class W>
void large_piece(const LinearPiece& p, float* workspace) {
  // Three groups by eight rows: 24 sums, 3 vectors of x and a broadcast fit 32 registers, and 11 loads
  // serve 24 multiply-adds. With 16 registers it is three by four. A single group takes 16 rows, so that
  // there are sums enough to cover the latency.
  constexpr bool kMany = S::kRegisters >= 32;
  if (kMany && p.m <= S::kLanes) return large_columns<S, Op, W, 1, kMany ? 16 : 4>(p, workspace);
  return large_columns<S, Op, W, 3, kMany ? 8 : 4>(p, workspace);
}

// ---- rows -----------------------------------------------------------------------------------------

template <class S, class W>
void widen_values(const W* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) S::store(to + i, S::widen(from + i));
  if (i == count) return;
  float last[S::kLanes];
  S::store(last, S::widen(Tail<S::kLanes, W>(from + i, count - i).data));
  for (int64_t j = 0; i + j < count; ++j) to[i + j] = last[j];
}

// Plain loops that the compiler vectorises for the file's target.
inline bool quantize_values(const float* values, int64_t count, int8_t* codes, float* scale) {
  // Magnitudes compare as their bits do; infinities and NaN lie above all finite ones.
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = __builtin_bit_cast(uint32_t, values[i]) & 0x7fffffffu;
    most = most > magnitude ? most : magnitude;
  }
  if (most >= 0x7f800000u) return false;
  const float step = __builtin_bit_cast(float, most) / 127.0f;
  *scale = step;
  // 1.5 * 2^23: adding it leaves no bits below one, and the hardware rounds half to even.
  const float round = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    // A row of zeros, or of values so small that their scale underflows, gets codes 0. A subnormal
    // scale is inexact, so that a quotient may pass 127.
    float q = step > 0 ? values[i] / step : 0.0f;
    q = q > 127.0f ? 127.0f : q;
    q = q < -127.0f ? -127.0f : q;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((q + round) - round));
  }
  return true;
}

// ---- the table ------------------------------------------------------------------------------------

template <class S, class Op>
void small_by_dtype(const LinearPiece& p) {
  if (p.dtype == DType::kI8) return small_any_m<S, Op, int8_t>(p);
  if (p.dtype == DType::kBF16) return small_any_m<S, Op, BF16>(p);
  if constexpr (Op::kPerWord == 1) {
    if (p.dtype == DType::kF16) return small_any_m<S, Op, F16>(p);
    if (p.dtype == DType::kF32) return small_any_m<S, Op, float>(p);
  }
}

template <class S, class Op>
void large_by_dtype(const LinearPiece& p, float* workspace) {
  if (p.dtype == DType::kI8) return large_piece<S, Op, int8_t>(p, workspace);
  if (p.dtype == DType::kBF16) return large_piece<S, Op, BF16>(p, workspace);
  if constexpr (Op::kPerWord == 1) {
    if (p.dtype == DType::kF16) return large_piece<S, Op, F16>(p, workspace);
    if (p.dtype == DType::kF32) return large_piece<S, Op, float>(p, workspace);
  }
}

// kPairs: S has the pair dot product. Rounding happens when x is packed, so that the products of
// kF32 and kF32Rounded share their bodies.
template <class S, bool kPairs>
struct Table {
  using Plain = F32Operand<S, false>;
  using Rounded = F32Operand<S, true>;
  using Pair = PairOperand<S>;

  static int64_t small_words(int64_t words) { return (words + S::kLanes - 1) / S::kLanes * S::kLanes; }
  static void pack_small(Operand operand, const float* x, int64_t k, void* packed) {
    float* to = static_cast<float*>(packed);
    if (operand == Operand::kF32) return pack_small_row<S, Plain>(x, k, to);
    if (operand == Operand::kF32Rounded) return pack_small_row<S, Rounded>(x, k, to);
    if constexpr (kPairs) return pack_small_row<S, Pair>(x, k, to);
  }
  static void small(const LinearPiece& p) {
    if (p.operand != Operand::kBf16Pair) return small_by_dtype<S, Plain>(p);
    if constexpr (kPairs) return small_by_dtype<S, Pair>(p);
  }
  static void pack_group(Operand operand, const float* x, int64_t x_stride, int64_t rows, int64_t k, int64_t begin,
                         int64_t end, void* group) {
    float* to = static_cast<float*>(group);
    if (operand == Operand::kF32) return pack_group_words<S, Plain>(x, x_stride, rows, k, begin, end, to);
    if (operand == Operand::kF32Rounded) return pack_group_words<S, Rounded>(x, x_stride, rows, k, begin, end, to);
    if constexpr (kPairs) return pack_group_words<S, Pair>(x, x_stride, rows, k, begin, end, to);
  }
  static void large(const LinearPiece& p, float* workspace) {
    if (p.operand != Operand::kBf16Pair) return large_by_dtype<S, Plain>(p, workspace);
    if constexpr (kPairs) return large_by_dtype<S, Pair>(p, workspace);
  }
  static void widen(DType dtype, const void* from, int64_t count, float* to) {
    if (dtype == DType::kF32) return widen_values<S>(static_cast<const float*>(from), count, to);
    if (dtype == DType::kF16) return widen_values<S>(static_cast<const F16*>(from), count, to);
    if (dtype == DType::kBF16) return widen_values<S>(static_cast<const BF16*>(from), count, to);
    return widen_values<S>(static_cast<const int8_t*>(from), count, to);
  }
  static constexpr LinearBodies bodies() {
    return {S::kLanes, kPairs,     nullptr, nullptr, small_words,    pack_small,
            small,     pack_group, large,   widen,   quantize_values};
  }
};

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
  // Look `ahead` along each row, and past its end into the next tile's: rows follow each other without a gap.
  const int64_t most = kSmallAhead / kRows / static_cast<int64_t>(sizeof(W));
  const int64_t ahead = most < p.k ? most : p.k, turn = p.k - ahead;
  const int64_t jump = (kRows - 1) * p.k;
  int64_t i = 0;
  const float* xi = static_cast<const float*>(p.x);
  for (; i + kSteps * kStep <= p.k; i += kSteps * kStep, xi += kSteps * S::kLanes) {
    const int64_t hop = i + ahead + (i >= turn ? jump : 0);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(w + r * p.k + hop);
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

// Weight rows [0, count) words [begin, end) into panels [ceil(words / 16)][kPanelRows][16].
template <class S, class Op, class W>
void pack_panels(const W* w, int64_t count, int64_t k, int64_t begin, int64_t end, float* panels) {
  constexpr int kStep = S::kLanes * Op::kPerWord;
  const int64_t chunks = (end - begin + kPanelWords - 1) / kPanelWords;
  const int64_t rows = (count + kPanelRows - 1) / kPanelRows * kPanelRows;
  for (int64_t n = 0; n < rows; ++n) {
    const W* row = w + n * k;
    float* to = panels + (n / kPanelRows) * chunks * kPanelRows * kPanelWords + (n % kPanelRows) * kPanelWords;
    for (int64_t c = 0; c < chunks; ++c, to += kPanelRows * kPanelWords) {
      for (int j = 0; j < kPanelWords; j += S::kLanes) {
        const int64_t i = (begin + c * kPanelWords + j) * Op::kPerWord;
        if (n >= count)
          S::store(to + j, S::zero());
        else if (i + kStep <= k)
          S::store(to + j, Op::weights(row + i));
        else
          S::store(to + j, Op::weights(Tail<kStep, W>(row + i, i < k ? k - i : 0).data));
      }
    }
  }
}

// kGroups groups of x times kCols weight rows of a panel over `words` words of k.
// sums: [group][column][lane]; columns of a group are kLanes floats apart, groups group_sums apart.
template <class S, class Op, int kGroups, int kCols>
void large_tile(const float* x, int64_t group_words, const float* panel, int64_t words, float* sums,
                int64_t group_sums, bool first) {
  using V = typename S::V;
  V sum[kGroups][kCols];
  for (int g = 0; g < kGroups; ++g)
    for (int c = 0; c < kCols; ++c)
      sum[g][c] = first ? S::zero() : S::load(sums + g * group_sums + c * S::kLanes);
  for (int64_t word = 0; word < words; word += kPanelWords, panel += kPanelRows * kPanelWords) {
    const int64_t inner = words - word < kPanelWords ? words - word : kPanelWords;
    for (int64_t j = 0; j < inner; ++j, x += S::kLanes) {
      V xv[kGroups];
      for (int g = 0; g < kGroups; ++g) xv[g] = S::load(x + g * group_words);
      for (int c = 0; c < kCols; ++c) {
        const V wv = S::broadcast(panel + c * kPanelWords + j);
        for (int g = 0; g < kGroups; ++g) sum[g][c] = Op::dot(sum[g][c], xv[g], wv);
      }
    }
  }
  for (int g = 0; g < kGroups; ++g)
    for (int c = 0; c < kCols; ++c) S::store(sums + g * group_sums + c * S::kLanes, sum[g][c]);
}

template <class S, class Op, int kGroups>
void large_panels(const float* x, int64_t group_words, const float* panels, int64_t columns, int64_t words,
                  float* sums, int64_t group_sums, bool first) {
  // All eight rows of a panel, or as many as keep sums, x and one broadcast word in registers.
  constexpr int kFit = (S::kRegisters - 1 - kGroups) / kGroups;
  constexpr int kCols = kFit >= 8 ? 8 : kFit >= 4 ? 4 : 2;
  const int64_t panel_words = (words + kPanelWords - 1) / kPanelWords * kPanelWords * kPanelRows;
  for (int64_t c = 0; c < columns; c += kCols) {
    const float* panel = panels + c / kPanelRows * panel_words + c % kPanelRows * kPanelWords;
    large_tile<S, Op, kGroups, kCols>(x, group_words, panel, words, sums + c * S::kLanes, group_sums, first);
  }
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

template <class S, class Op, class W>
void large_piece(const LinearPiece& p, float* workspace) {
  constexpr int kLanes = S::kLanes;
  // Three groups by a panel's eight rows: 24 sums, 3 vectors of x and a broadcast fit 32 registers, and
  // 11 loads serve 24 multiply-adds. With 16 registers it is three by four, or two by four.
  constexpr int kGroups = 3;
  const int64_t total_words = (p.k + Op::kPerWord - 1) / Op::kPerWord;
  const int64_t group_words = total_words * kLanes;
  const int64_t groups = (p.m + kLanes - 1) / kLanes;
  const int64_t columns = (p.count + kPanelRows - 1) / kPanelRows * kPanelRows;
  const int64_t group_sums = columns * kLanes;
  float* panels = workspace;
  float* sums = workspace + kMaxTaskColumns * kBlockWords;
  const float* x = static_cast<const float*>(p.x);
  for (int64_t begin = 0; begin < total_words; begin += kBlockWords) {
    const int64_t end = begin + kBlockWords < total_words ? begin + kBlockWords : total_words;
    const bool first = begin == 0;
    pack_panels<S, Op, W>(static_cast<const W*>(p.weight), p.count, p.k, begin, end, panels);
    for (int64_t g = 0; g < groups;) {
      const float* xg = x + g * group_words + begin * kLanes;
      float* to = sums + g * group_sums;
      // Four groups are two and two: a tile of one leaves the units waiting for its eight sums.
      if (groups - g >= kGroups && groups - g != 4) {
        large_panels<S, Op, kGroups>(xg, group_words, panels, columns, end - begin, to, group_sums, first);
        g += kGroups;
      } else if (groups - g >= 2) {
        large_panels<S, Op, 2>(xg, group_words, panels, columns, end - begin, to, group_sums, first);
        g += 2;
      } else {
        large_panels<S, Op, 1>(xg, group_words, panels, columns, end - begin, to, group_sums, first);
        g += 1;
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows = p.m - g * kLanes < kLanes ? p.m - g * kLanes : kLanes;
    large_finish<S>(p, sums + g * group_sums, p.y + g * kLanes * p.y_stride, rows);
  }
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
  static constexpr LinearBodies bodies() {
    return {S::kLanes, kPairs, small_words, pack_small, small, pack_group, large};
  }
};

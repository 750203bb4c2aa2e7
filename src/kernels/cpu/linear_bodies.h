// What cpu/linear.cc asks of each ISA's matrix-product bodies. Bodies work on one fixed piece of the
// problem; how the problem is cut never depends on the threads or on the ISA's bodies.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

namespace lacuna::cpu {

// How the operands of one product are held. A "word" is 32 bits: one f32 value or a pair of bf16
// values with neighbouring k; the bodies count the inner dimension in words.
enum class Operand : uint8_t {
  kF32,         // x as it is, weights widened to f32
  kF32Rounded,  // x rounded to bf16 and widened again, weights widened to f32
  kBf16Pair,    // x rounded to bf16, weights exact in bf16 (bf16 or int8 codes); pair dot products
};
inline int64_t words(Operand operand, int64_t k) { return operand == Operand::kBf16Pair ? (k + 1) / 2 : k; }

// Rows of x that one small-M call takes: with one weight row in flight and one accumulator a product,
// eight products are what two FMA units with a latency of four cycles need to stay busy.
inline constexpr int kMaxSmallRows = 8;
// Up to so many rows the small-M body takes int8 codes times bf16 pairs, eight rows after eight over each piece of
// weights: it widens them in registers, while the large-M body stores and reloads what it widened and works in steps of
// 16 rows. One thread, 8192 x 1536 streamed, M = 9, 16, 24: 302, 376, 382 GFLOP/s, 202, 357, 356 with panels.
inline constexpr int kMaxSmallCodeRows = 24;
// Bytes of weights that a small-M body asks for ahead of the tile that it works on. A core draws some 25 GB/s
// while the others draw theirs, and memory answers within 150 ns under load: 4 KB are on their way, with a
// margin of four. Measured best of 8 … 32 KB (bench/NOTES.md).
inline constexpr int64_t kSmallAhead = 16384;
// Weights that one small-M piece streams: about 2 us of work for a core at 30 GB/s, some ten times
// what it costs to hand a piece out, and little enough that the last piece keeps nobody waiting.
inline constexpr int64_t kSmallPieceBytes = 64 << 10;
// Words of each weight row that lie together in a packed panel: a cache line of them.
inline constexpr int kPanelWords = 16;
// Bytes of weights that a large-M body asks for ahead of packing them; see kSmallAhead.
inline constexpr int64_t kLargeAhead = 8192;
// Words of k that a large-M body works through before it moves on: 64 weight rows of them are 128 KB
// and 48 rows of x are 96 KB, which leaves most of a 1 MB L2 to the hardware's prefetching.
inline constexpr int64_t kBlockWords = 512;
// The same for an x so low that one tile takes all its groups: words of x in the tile, 128 KB of the L2 or so.
inline constexpr int64_t kOnceWords = 2048;
// A large-M task's share of y: up to 256 rows by up to 64 columns. Its sums are 64 KB.
inline constexpr int64_t kTaskRows = 256;
inline constexpr int64_t kMaxTaskColumns = 64;
// The widest group (below) of any body.
inline constexpr int kMaxLanes = 16;

// What a small-M tile of kRows rows of weights, `row` bytes each from w on, asks for when it comes to byte `at`
// of each. Its rows lie behind one another and are read side by side, so all are wanted at once: the tile after
// it is asked for in the order of addresses, into L2 (L1 has 24 misses in flight, 15 GB/s), and from there
// into L1 four lines ahead. GCC drops calls that do nothing but prefetch, hence the attribute.
template <int kRows>
[[gnu::always_inline]] inline void ask_ahead(const void* w, int64_t row, int64_t at) {
  const char* far = static_cast<const char*>(w) + kRows * (row + at) + kSmallAhead;
  const char* near = static_cast<const char*>(w) + at + 256;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __builtin_prefetch(far + r * 64, 0, 2);
    __builtin_prefetch(near + r * row, 0, 3);
  }
}

// A piece of y: all columns [first, first + count) of the weight rows for rows [0, m) of x.
struct LinearPiece {
  DType dtype = DType::kF32;         // of the weights
  Operand operand = Operand::kF32;
  const void* weight = nullptr;      // the first weight row of the piece; rows are k elements apart
  const float* row_scale = nullptr;  // the first of the piece, or null
  const float* bias = nullptr;       // the first of the piece, or null
  int64_t count = 0, k = 0;
  int64_t m = 0;
  const void* x = nullptr;           // packed: see below
  float* y = nullptr;                // the piece's first element; rows are y_stride apart
  int64_t y_stride = 0;
  bool accumulate = false;
};

// Small-M products with int8 weights whose activations come in int8 digits (linear_digits_avx512.cc has the error): for
// machines that widen codes more slowly than memory delivers them.
struct DigitBodies {
  // Words of a packed row of k values.
  int64_t (*words)(int64_t k);
  // round: the values are rounded to bf16 first.
  void (*pack)(bool round, const float* x, int64_t k, void* packed);
  // As LinearBodies::small; piece.operand says nothing. A row with a value that is not finite gives NaN.
  void (*small)(const LinearPiece& piece);
};
// What an int32 sum of a digit and a code, both as large as they get, takes of k.
inline constexpr int64_t kMaxDigitK = int64_t{1} << 16;

// Products with weights packed beforehand (LinearWeight::panels), as the operand says: words of pairs or of f32. A panel
// is of up to three vectors of `lanes` weight rows, and word i of its row n is word [i][n]; panel_vectors() says how the
// rows of a piece of kPanelColumns are divided.
struct PanelBodies {
  int lanes = 0;
  // As LinearBodies::large for any m and count, x as for small with rows x_words apart; piece.weight is the first panel
  // of a piece.
  void (*product)(const LinearPiece& piece, int64_t x_words);
  // gelu_tanh of `rows` rows of `count` values, a multiple of 32, as words of x, of pairs or rounded to bf16: exact to
  // 2e-4, well below what that rounds off.
  void (*pack_gelu)(Operand operand, const float* y, int64_t y_stride, int64_t rows, int64_t count, float* words,
                    int64_t x_words);
};
// Vectors of the next panel, of those that are left. Four are two and two: few sums do not cover the latency of the
// products.
inline constexpr int64_t panel_vectors(int64_t left) { return left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1; }
// Columns of a piece of such a product: what divides the work of small layers among a few threads.
inline constexpr int64_t kPanelColumns = 96;
// Rows of a piece: their words stay in the L1 or nearly.
inline constexpr int64_t kPanelRows = 64;

struct LinearBodies {
  // Floats in a vector, and so rows of x in a group of the large-M layout.
  int lanes = 0;
  bool bf16_pairs = false;  // has bodies for Operand::kBf16Pair
  const DigitBodies& (*digits)() = nullptr;  // null without VNNI
  const PanelBodies& (*panels)() = nullptr;  // null without pairs

  // Small-M layout: row after row, each padded with zeros to small_words(words) words.
  int64_t (*small_words)(int64_t words);
  void (*pack_small)(Operand operand, const float* x, int64_t k, void* packed);
  // m <= kMaxSmallRows. Reads every weight once. Every product is one vector accumulator over k in order,
  // so a row's bits depend neither on m nor on the other rows.
  void (*small)(const LinearPiece& piece);

  // Large-M layout: groups of `lanes` rows; a group is [words, lanes] words. Packs words [begin, end)
  // of one group from `rows` rows of x (the missing ones are zero); begin is a multiple of kBlockWords.
  void (*pack_group)(Operand operand, const float* x, int64_t x_stride, int64_t rows, int64_t k, int64_t begin,
                     int64_t end, void* group);
  // m <= kTaskRows, count <= kMaxTaskColumns. workspace: large_workspace() floats, 64-byte aligned.
  // Every product is one sum over k in order, whatever tile it falls into.
  void (*large)(const LinearPiece& piece, float* workspace);

  // `count` weights as f32, int8 codes without their scale.
  void (*widen)(DType dtype, const void* from, int64_t count, float* to);
  // Symmetric int8 codes of one row and their scale; false if a value is not finite.
  bool (*quantize)(const float* values, int64_t count, int8_t* codes, float* scale);
};

// Weights of one task and block of k, and the task's sums.
inline constexpr int64_t large_workspace() { return kMaxTaskColumns * kBlockWords + kTaskRows * kMaxTaskColumns; }

// The bodies for cpu_isa().
const LinearBodies& linear_bodies();

const LinearBodies& linear_portable();
#if defined(__x86_64__)
const LinearBodies& linear_avx2();
const LinearBodies& linear_avx512();
const LinearBodies& linear_avx512_bf16();
const DigitBodies& linear_digits_avx512();
const PanelBodies& linear_panels_avx512();
#endif

}  // namespace lacuna::cpu

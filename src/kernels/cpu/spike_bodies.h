// What the spike ops ask of each ISA's bodies. Bodies work on a range of output tiles; how outputs are cut
// never depends on the threads or on the ISA.
#pragma once

#include "kernels/spike_linear.h"

namespace lacuna::cpu {

// Outputs in a tile. Dense: four registers of 16 sums for each of four rows. Events: a column's 128 codes are
// the pair of cache lines that memory systems fetch together.
inline constexpr int64_t kDenseTile = 64, kEventTile = 128;
// Inputs of a block: dense codes of 512 inputs are 32 KB, event columns of 256 likewise; both stay near while
// rows take turns. A group of fewer inputs is a block by itself.
inline constexpr int64_t kDenseBlock = 512, kEventBlock = 256;
inline constexpr int64_t spike_tile(SpikeArithmetic a) {
  return a == SpikeArithmetic::kEvent ? kEventTile : kDenseTile;
}
inline constexpr int64_t spike_block(SpikeArithmetic a) {
  return a == SpikeArithmetic::kEvent ? kEventBlock : kDenseBlock;
}
// Rows that go through a tile together; their sums and results are 64 KB at most.
inline constexpr int64_t kSpikeRows = 64;
// Dense products take counts as they are up to +-127, the rest one by one.
inline constexpr int32_t kDenseMost = 127;
// Largest sum of |s| that an int16 sum of codes within +-127 can hold: 127 * 258 = 32766.
inline constexpr int32_t kSegmentMost = 258;
// Active columns that an event body asks for ahead of their use. The first step of a segment wants its inputs in
// any order, some 90 of them at the usual counts, and 64 more are the 8 KB in flight of kSmallAhead
// (linear_bodies.h). Of 64, 160 and 256 the last two are alike, and 8 % above the first at half silence.
inline constexpr int64_t kEventAhead = 160;
// Event streams: see spike_linear.cc.
inline constexpr uint16_t kStreamEnd = 0xffff;

// What a count has beyond +-kDenseMost.
struct SpikeRest {
  int32_t input;
  int32_t value;
};

// The cut of a row of inputs into groups and blocks.
struct SpikeBlocks {
  int64_t in = 0, group = 0, block = 0;
  int64_t per_group() const { return (group + block - 1) / block; }
  int64_t groups() const { return (in + group - 1) / group; }
  int64_t count() const {
    const int64_t last = in - (groups() - 1) * group;
    return (groups() - 1) * per_group() + (last + block - 1) / block;
  }
};

// Rows of inputs, prepared; pointers to [rows] unless said.
struct SpikePiece {
  const SpikeWeight* weight = nullptr;
  SpikeBlocks blocks;
  int64_t first_tile = 0, tiles = 0;
  int64_t rows = 0;  // at most kSpikeRows
  const SpikeRow* row = nullptr;
  const int32_t* counts = nullptr;  // [rows, in]
  // Dense.
  const int8_t* near = nullptr;        // counts held within +-kDenseMost [rows, near_stride], zero-padded
  int64_t near_stride = 0;             // a multiple of 4
  const int32_t* block_sum = nullptr;  // [rows, blocks]: sums of near
  const SpikeRest* rest = nullptr;
  const int64_t* rest_start = nullptr;  // [rows, blocks] and the end
  // Events.
  const uint16_t* stream = nullptr;
  const int64_t* stream_start = nullptr;  // [rows, blocks]
  const uint32_t* active = nullptr;       // inputs that fire in any row, and kEventAhead entries of the next tile
  const int64_t* active_end = nullptr;    // [blocks]
  int32_t* sums = nullptr;                // workspace [rows, tile]
  float* scaled = nullptr;                // workspace [rows, tile]
  float* y = nullptr;                     // row 0, output 0
  int64_t y_stride = 0;
  bool accumulate = false;
};

struct SpikeBodies {
  // One row of the neuron; false if a value is not finite or a count passes 31 bits.
  bool (*fire)(const float* x, int64_t width, float k, int32_t* counts, SpikeRow* row);
  // round_half_even(w / scale) of one group; false if a code passes 15 bits or is not a number.
  bool (*quantize)(const float* w, int64_t count, float scale, int16_t* codes);
  void (*dense)(const SpikePiece& piece);
  void (*event)(const SpikePiece& piece);
};

// The bodies for cpu_isa().
const SpikeBodies& spike_bodies();

const SpikeBodies& spike_portable();
#if defined(__x86_64__)
const SpikeBodies& spike_avx2();
const SpikeBodies& spike_avx512();
#endif

// cpu/spike_linear.cc: the op and the packing, operands checked.
void spike_linear(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float* y, bool accumulate, int64_t y_stride);
PackedSpikeWeight pack_spike_weight(Context& ctx, const Tensor& codes, const float* scales, int64_t group,
                                    const float* bias, SpikeArithmetic arithmetic);

}  // namespace lacuna::cpu

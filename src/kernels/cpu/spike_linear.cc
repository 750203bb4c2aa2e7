// Cuts spike-coded products into pieces, prepares their inputs, packs their weights.
#include "kernels/spike_linear.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/error.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/spike_bodies.h"

namespace lacuna::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Codes that one piece streams: see kSmallPieceBytes (linear_bodies.h).
constexpr int64_t kPieceBytes = 128 << 10;
// Rows from which preparing them is worth handing out.
constexpr int64_t kParallelRows = 4;

SpikeBlocks cut(const SpikeWeight& w) { return {w.in, w.group, std::min(w.group, spike_block(w.arithmetic))}; }

// Calls body(block, begin, end) for every block of inputs in order.
template <class Body>
void each_block(const SpikeBlocks& b, const Body& body) {
  int64_t block = 0;
  for (int64_t first = 0; first < b.in; first += b.group) {
    const int64_t last = std::min(b.in, first + b.group);
    for (int64_t begin = first; begin < last; begin += b.block, ++block)
      body(block, begin, std::min(last, begin + b.block));
  }
}

// Hands out parts of one workspace, each on its own cache line.
class Carver {
 public:
  template <class T>
  void plan(T*& at, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(&at), bytes_});
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }
  void carve(Context& ctx) {
    std::byte* base = ctx.workspace<std::byte>(ctx.shared_slot(), static_cast<size_t>(bytes_));
    for (const auto& [at, offset] : parts_) *at = base + offset;
  }

 private:
  std::vector<std::pair<void**, int64_t>> parts_;
  int64_t bytes_ = 0;
};

void over_rows(Context& ctx, int64_t rows, const std::function<void(int64_t)>& body) {
  if (rows < kParallelRows)
    for (int64_t r = 0; r < rows; ++r) body(r);
  else
    ctx.pool.parallel_for(rows, [&](int64_t r, int) { body(r); });
}

// ---- dense inputs ---------------------------------------------------------------------------------

void prepare_dense(Context& ctx, const SpikeBlocks& blocks, const SpikeBatch& x, SpikePiece& p) {
  const int64_t n = blocks.count();
  p.near_stride = ceil_div(x.k, 4) * 4;
  int8_t* near = nullptr;
  int32_t* block_sum = nullptr;
  SpikeRest* rest = nullptr;
  int64_t *rest_start = nullptr, *row_rest = nullptr;
  Carver carver;
  carver.plan(near, x.m * p.near_stride);
  carver.plan(block_sum, x.m * n);
  carver.plan(rest_start, x.m * n + 1);
  carver.plan(row_rest, x.m + 1);
  // At most total / 128 counts of a row lie beyond +-127.
  int64_t most_rest = 0;
  for (int64_t r = 0; r < x.m; ++r)
    most_rest += std::min(x.k, x.rows[r].most > kDenseMost ? x.rows[r].total / (kDenseMost + 1) : 0);
  carver.plan(rest, most_rest);
  carver.carve(ctx);
  int64_t at = 0;
  for (int64_t r = 0; r < x.m; ++r) {
    row_rest[r] = at;
    const int32_t* s = x.counts + r * x.k;
    if (x.rows[r].most > kDenseMost)
      for (int64_t i = 0; i < x.k; ++i) at += s[i] > kDenseMost || s[i] < -kDenseMost;
  }
  over_rows(ctx, x.m, [&](int64_t r) {
    const int32_t* s = x.counts + r * x.k;
    int8_t* to = near + r * p.near_stride;
    int64_t out = row_rest[r];
    each_block(blocks, [&](int64_t block, int64_t begin, int64_t end) {
      int32_t sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int32_t close = std::clamp(s[i], -kDenseMost, kDenseMost);
        to[i] = static_cast<int8_t>(close);
        sum += close;
      }
      block_sum[r * n + block] = sum;
      rest_start[r * n + block] = out;
      if (x.rows[r].most > kDenseMost)
        for (int64_t i = begin; i < end; ++i)
          if (s[i] != to[i]) rest[out++] = {static_cast<int32_t>(i), s[i] - to[i]};
    });
    std::fill(to + x.k, to + p.near_stride, int8_t{0});
  });
  rest_start[x.m * n] = at;
  p.near = near;
  p.block_sum = block_sum;
  p.rest = rest;
  p.rest_start = rest_start;
}

// ---- events ---------------------------------------------------------------------------------------
// The stream of one block of one row, in 16-bit words:
//   segments, each: steps; then for every time step, most significant first: additions, subtractions, and
//     that many inputs of each, counted from the block's begin
//   kStreamEnd, heavy inputs, and for each: input, low and high half of its count
// A segment's sum of |s| is at most kSegmentMost, so that 16 bits hold its sums.

int64_t stream_words(const SpikeRow& row, int64_t blocks) {
  // Two neighbouring segments of a block hold more than kSegmentMost together; a segment has at most nine steps.
  const int64_t segments = 2 * row.total / kSegmentMost + blocks;
  const int64_t heavy = row.total / (kSegmentMost + 1);
  return row.spikes + segments * (1 + 2 * 9) + blocks * 2 + heavy * 3;
}

// Segment of inputs [begin, end): spikes sorted by step, then sign.
uint16_t* write_segment(const int32_t* s, int64_t block_begin, int64_t begin, int64_t end, uint16_t* to) {
  uint16_t count[9][2] = {};
  uint32_t any = 0;
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(std::abs(s[i]));
    if (magnitude > static_cast<uint32_t>(kSegmentMost)) continue;
    any |= magnitude;
    for (uint32_t bits = magnitude; bits; bits &= bits - 1) ++count[std::countr_zero(bits)][s[i] < 0];
  }
  const int steps = std::bit_width(any);
  if (steps == 0) return to;
  *to++ = static_cast<uint16_t>(steps);
  uint16_t* at[9][2];
  for (int t = steps - 1; t >= 0; --t) {
    *to++ = count[t][0];
    *to++ = count[t][1];
    for (int sign = 0; sign < 2; ++sign) {
      at[t][sign] = to;
      to += count[t][sign];
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(std::abs(s[i]));
    if (magnitude > static_cast<uint32_t>(kSegmentMost)) continue;
    for (uint32_t bits = magnitude; bits; bits &= bits - 1)
      *at[std::countr_zero(bits)][s[i] < 0]++ = static_cast<uint16_t>(i - block_begin);
  }
  return to;
}

uint16_t* write_block(const int32_t* s, int64_t begin, int64_t end, uint16_t* to) {
  int64_t first = begin, total = 0;
  uint16_t heavy = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t magnitude = std::abs(s[i]);
    if (magnitude > kSegmentMost) {
      ++heavy;
      continue;
    }
    if (total + magnitude > kSegmentMost) {
      to = write_segment(s, begin, first, i, to);
      first = i;
      total = 0;
    }
    total += magnitude;
  }
  to = write_segment(s, begin, first, end, to);
  *to++ = kStreamEnd;
  *to++ = heavy;
  for (int64_t i = begin; heavy > 0 && i < end; ++i) {
    if (std::abs(s[i]) <= kSegmentMost) continue;
    *to++ = static_cast<uint16_t>(i - begin);
    *to++ = static_cast<uint16_t>(static_cast<uint32_t>(s[i]));
    *to++ = static_cast<uint16_t>(static_cast<uint32_t>(s[i]) >> 16);
  }
  return to;
}

// Returns the inputs that fire in any row of these.
void prepare_events(Context& ctx, const SpikeBlocks& blocks, const SpikeBatch& x, SpikePiece& p) {
  const int64_t n = blocks.count();
  uint16_t* stream = nullptr;
  int64_t *start = nullptr, *active_end = nullptr;
  uint32_t* active = nullptr;
  uint8_t* fires = nullptr;
  int64_t words = 0;
  std::vector<int64_t> row_words(static_cast<size_t>(x.m));
  for (int64_t r = 0; r < x.m; ++r) {
    row_words[static_cast<size_t>(r)] = words;
    words += stream_words(x.rows[r], n);
  }
  Carver carver;
  carver.plan(stream, words);
  carver.plan(start, x.m * n);
  carver.plan(active_end, n);
  carver.plan(active, x.k + kEventAhead);
  carver.plan(fires, x.k);
  carver.carve(ctx);
  over_rows(ctx, x.m, [&](int64_t r) {
    uint16_t* to = stream + row_words[static_cast<size_t>(r)];
    each_block(blocks, [&](int64_t block, int64_t begin, int64_t end) {
      start[r * n + block] = to - stream;
      to = write_block(x.counts + r * x.k, begin, end, to);
    });
    LACUNA_CHECK(to - stream <= row_words[static_cast<size_t>(r)] + stream_words(x.rows[r], n));
  });
  std::fill_n(fires, x.k, uint8_t{0});
  for (int64_t r = 0; r < x.m; ++r)
    for (int64_t i = 0; i < x.k; ++i) fires[i] |= x.counts[r * x.k + i] != 0;
  int64_t count = 0;
  each_block(blocks, [&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      active[count] = static_cast<uint32_t>(i);
      count += fires[i];
    }
    active_end[block] = count;
  });
  // The next tile's columns follow this one's.
  for (int64_t i = 0; i < std::min(count, kEventAhead); ++i) active[count + i] = active[i] + static_cast<uint32_t>(x.k);
  p.stream = stream;
  p.stream_start = start;
  p.active = active;
  p.active_end = active_end;
}

// ---- rows whose sums pass 31 bits -----------------------------------------------------------------

int32_t code_at(const SpikeWeight& w, int64_t tile, int64_t j, int64_t i) {
  if (w.arithmetic == SpikeArithmetic::kEvent)
    return static_cast<const int8_t*>(w.codes)[(tile * w.in + i) * kEventTile + j];
  const int64_t quads = ceil_div(w.in, 4);
  return static_cast<const uint8_t*>(w.codes)[((tile * quads + i / 4) * kDenseTile + j) * 4 + i % 4] - 128;
}

// One row with 64-bit sums: counts so large that V_th was held at its upper end.
void wide_row(const SpikeWeight& w, const int32_t* counts, const SpikeRow& row, float* y, bool accumulate) {
  const int64_t width = spike_tile(w.arithmetic), groups = w.groups();
  const bool event = w.arithmetic == SpikeArithmetic::kEvent;
  for (int64_t tile = 0; tile * width < w.out; ++tile) {
    float scaled[kEventTile] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * w.group, last = std::min(w.in, first + w.group);
      int64_t sums[kEventTile] = {};
      for (int64_t i = first; i < last; ++i) {
        if (counts[i] == 0) continue;
        if (!event) {
          for (int64_t j = 0; j < width; ++j) sums[j] += static_cast<int64_t>(counts[i]) * code_at(w, tile, j, i);
          continue;
        }
        for (uint32_t bits = static_cast<uint32_t>(std::abs(counts[i])); bits; bits &= bits - 1)
          for (int64_t j = 0; j < width; ++j) {
            const int64_t weight =
                static_cast<int64_t>(code_at(w, tile, j, i)) * (int64_t{1} << std::countr_zero(bits));
            sums[j] += counts[i] < 0 ? -weight : weight;
          }
      }
      if (w.overflow_start) {
        const int64_t* start = event ? w.overflow_start + tile * w.in + first : w.overflow_start + tile * groups + g;
        const int64_t end = event ? start[last - first] : start[1];
        for (int64_t e = start[0]; e < end; ++e)
          sums[w.overflow[e].output] += static_cast<int64_t>(counts[w.overflow[e].input]) * w.overflow[e].value;
      }
      for (int64_t j = 0; j < width; ++j)
        scaled[j] += static_cast<float>(sums[j]) * w.scales[(tile * groups + g) * width + j];
    }
    for (int64_t j = 0; j < width && tile * width + j < w.out; ++j) {
      const int64_t o = tile * width + j;
      const float value = scaled[j] * row.threshold + (w.bias ? w.bias[o] : 0.0f);
      y[o] = accumulate ? y[o] + value : value;
    }
  }
}

bool is_wide(const SpikeRow& row, int32_t most_code) {
  // Dense sums of one block stand 128 too high a count before they are set right.
  return row.total > (int64_t{1} << 30) / std::max(most_code, 1);
}

// ---- products -------------------------------------------------------------------------------------

void fake(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float* y, bool accumulate, int64_t y_stride) {
  float* values = ctx.activation(ActivationSlot::kSpikeValues, static_cast<size_t>(x.m * x.k));
  for (int64_t r = 0; r < x.m; ++r) {
    const float threshold = x.rows[r].threshold;
    for (int64_t i = r * x.k; i < (r + 1) * x.k; ++i) values[i] = static_cast<float>(x.counts[i]) * threshold;
  }
  // Rounding s * V_th to bf16 would undo what the counts hold exactly.
  const ActivationType before = ctx.activations;
  ctx.activations = ActivationType::kF32;
  cpu::linear(ctx, w.fake, values, x.m, y, accumulate ? LinearMode::kAccumulate : LinearMode::kStore, x.k, y_stride);
  ctx.activations = before;
}

// Rows [0, x.m) at most kSpikeRows of them, none wide.
void product(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float* y, bool accumulate, int64_t y_stride) {
  const SpikeBodies& bodies = spike_bodies();
  const bool event = w.arithmetic == SpikeArithmetic::kEvent;
  SpikePiece whole;
  whole.weight = &w;
  whole.blocks = cut(w);
  whole.rows = x.m;
  whole.row = x.rows;
  whole.counts = x.counts;
  whole.y = y;
  whole.y_stride = y_stride;
  whole.accumulate = accumulate;
  (event ? prepare_events : prepare_dense)(ctx, whole.blocks, x, whole);

  const int64_t width = spike_tile(w.arithmetic), tiles = ceil_div(w.out, width);
  const int64_t per_piece = std::max<int64_t>(1, kPieceBytes / (width * w.in));
  const size_t sums = static_cast<size_t>(kSpikeRows * width);
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<int32_t>(t, 2 * sums);
  ctx.pool.parallel_for(ceil_div(tiles, per_piece), [&](int64_t index, int thread) {
    SpikePiece p = whole;
    p.first_tile = index * per_piece;
    p.tiles = std::min(per_piece, tiles - p.first_tile);
    p.sums = ctx.workspace<int32_t>(thread, 2 * sums);
    p.scaled = reinterpret_cast<float*>(p.sums + sums);
    (event ? bodies.event : bodies.dense)(p);
  });
}

}  // namespace

const SpikeBodies& spike_bodies() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
      return spike_avx2();
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return spike_avx512();
  }
#endif
  return spike_portable();
}

void spike_linear(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float* y, bool accumulate,
                  int64_t y_stride) {
  if (w.arithmetic == SpikeArithmetic::kFake) return fake(ctx, w, x, y, accumulate, y_stride);
  // Runs of rows between those whose sums need 64 bits.
  for (int64_t r = 0; r < x.m;) {
    if (is_wide(x.rows[r], w.most)) {
      wide_row(w, x.counts + r * x.k, x.rows[r], y + r * y_stride, accumulate);
      ++r;
      continue;
    }
    int64_t end = r;
    while (end < x.m && end - r < kSpikeRows && !is_wide(x.rows[end], w.most)) ++end;
    product(ctx, w, {x.counts + r * x.k, x.rows + r, end - r, x.k}, y + r * y_stride, accumulate, y_stride);
    r = end;
  }
}

// ---- packing --------------------------------------------------------------------------------------

namespace {

// Asks for large pages under memory that has not been touched: a skipped column leaves no run of lines for the
// hardware to follow, so that walks of the page table are waited for. A refusal changes nothing but time.
void use_large_pages(const Buffer& buffer) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer.as<>()) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer.as<>()) + buffer.bytes()) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

PackedSpikeWeight pack_spike_weight(Context& ctx, const Tensor& codes, const float* scales, int64_t group,
                                    const float* bias, SpikeArithmetic arithmetic) {
  const int64_t n = codes.shape[0], k = codes.shape[1];
  const bool wide = codes.dtype == DType::kI16;
  const auto code = [&](int64_t o, int64_t i) -> int32_t {
    return wide ? codes.as<int16_t>()[o * k + i] : codes.as<int8_t>()[o * k + i];
  };
  PackedSpikeWeight packed;
  SpikeWeight& w = packed.view;
  w.arithmetic = arithmetic;
  w.out = n;
  w.in = k;
  w.group = std::min(group, k);
  w.bias = bias;
  const int64_t groups = w.groups();
  for (int64_t j = 0; j < n * k; ++j) w.most = std::max(w.most, std::abs(code(0, j)));

  if (arithmetic == SpikeArithmetic::kFake) {
    if (groups == 1 && !wide) {
      packed.scales = Buffer(ctx.memory, MemoryTag::kWeights, static_cast<size_t>(n) * sizeof(float));
      std::copy_n(scales, n, packed.scales.as<float>());
      w.fake = {codes, packed.scales.as<float>(), bias};
      return packed;
    }
    packed.codes = Buffer(ctx.memory, MemoryTag::kWeights, static_cast<size_t>(n * k) * sizeof(float));
    float* to = packed.codes.as<float>();
    for (int64_t o = 0; o < n; ++o)
      for (int64_t i = 0; i < k; ++i) to[o * k + i] = static_cast<float>(code(o, i)) * scales[o * groups + i / w.group];
    w.fake = {Tensor(to, DType::kF32, {n, k}), nullptr, bias};
    return packed;
  }

  const bool event = arithmetic == SpikeArithmetic::kEvent;
  const int64_t width = spike_tile(arithmetic), tiles = ceil_div(n, width), quads = ceil_div(k, 4);
  const int64_t tile_bytes = event ? width * k : width * quads * 4;
  packed.codes = Buffer(ctx.memory, MemoryTag::kWeights, static_cast<size_t>(tiles * tile_bytes));
  packed.scales = Buffer(ctx.memory, MemoryTag::kWeights, static_cast<size_t>(tiles * groups * width) * sizeof(float));
  use_large_pages(packed.codes);
  w.codes = packed.codes.as<>();
  w.scales = packed.scales.as<float>();
  ctx.pool.parallel_for(tiles, [&](int64_t tile, int) {
    const int64_t first = tile * width, count = std::min(width, n - first);
    uint8_t* to = packed.codes.as<uint8_t>() + tile * tile_bytes;
    std::memset(to, event ? 0 : 128, static_cast<size_t>(tile_bytes));
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < k; ++i) {
        const int32_t near = std::clamp(code(first + j, i), -127, 127);
        if (event)
          to[i * width + j] = static_cast<uint8_t>(near);
        else
          to[(i / 4 * width + j) * 4 + i % 4] = static_cast<uint8_t>(near + 128);
      }
    float* scale = packed.scales.as<float>() + tile * groups * width;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < width; ++j) scale[g * width + j] = j < count ? scales[(first + j) * groups + g] : 0.0f;
  });

  if (w.most > 127) {
    std::vector<SpikeOverflow> overflow;
    std::vector<int64_t> start;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t i = 0; i < k; ++i) {
        if (event || i % w.group == 0) start.push_back(static_cast<int64_t>(overflow.size()));
        for (int64_t j = 0; j < std::min(width, n - tile * width); ++j) {
          const int32_t c = code(tile * width + j, i);
          if (std::abs(c) > 127)
            overflow.push_back(
                {static_cast<int32_t>(i), static_cast<int16_t>(j), static_cast<int16_t>(c - std::clamp(c, -127, 127))});
        }
      }
    start.push_back(static_cast<int64_t>(overflow.size()));
    packed.overflow = Buffer(ctx.memory, MemoryTag::kWeights, overflow.size() * sizeof(SpikeOverflow));
    packed.overflow_start = Buffer(ctx.memory, MemoryTag::kWeights, start.size() * sizeof(int64_t));
    std::copy(overflow.begin(), overflow.end(), packed.overflow.as<SpikeOverflow>());
    std::copy(start.begin(), start.end(), packed.overflow_start.as<int64_t>());
    w.overflow = packed.overflow.as<SpikeOverflow>();
    w.overflow_start = packed.overflow_start.as<int64_t>();
    w.overflow_count = static_cast<int64_t>(overflow.size());
  }
  return packed;
}

}  // namespace lacuna::cpu

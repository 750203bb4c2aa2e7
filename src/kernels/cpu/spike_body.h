// The spike bodies, written once over vectors in the compiler's own notation and instantiated by each ISA file.
// Include it only inside an anonymous namespace of such a file (see spike_portable.cc): every function is
// compiled for that file's target and must not be merged with another's.
//
// S gives the dense product's inner step: Sums (16 int32 sums), zero(), store(int32*, Sums),
// dot(Sums, const uint8_t* codes, int32_t four_counts), and kBiased: sums come out 128 * sum(counts) too high;
// and the events': Shorts (kShorts int16 sums), no_shorts(), store_shorts(int16_t*, Shorts), add, subtract, and
// widen(const int8_t*) (GCC 12 makes four instructions of the one that converts a whole register).

// ---- neuron ---------------------------------------------------------------------------------------

inline bool fire_row(const float* x, int64_t width, float k, int32_t* counts, SpikeRow* row) {
  // Sixteen partial sums whatever the vectors' width, so that every ISA rounds alike.
  double part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int j = 0; j < 16; ++j) part[j] += static_cast<double>(__builtin_fabsf(x[i + j]));
  for (int j = 0; i + j < width; ++j) part[j] += static_cast<double>(__builtin_fabsf(x[i + j]));
  for (int step = 8; step > 0; step /= 2)
    for (int j = 0; j < step; ++j) part[j] += part[j + step];
  if (!(part[0] < __builtin_inf())) return false;
  const float mean = static_cast<float>(part[0] / static_cast<double>(width));
  float threshold = mean / k;
  threshold = threshold < 1e-5f ? 1e-5f : threshold > 1e4f ? 1e4f : threshold;
  row->threshold = threshold;

  float most = 0;
  for (i = 0; i < width; ++i) {
    const float s = __builtin_fabsf(x[i] / threshold);
    most = most > s ? most : s;
  }
  if (!(most < 2147483520.0f)) return false;  // the largest float that rounds to 31 bits is 2^31 - 128
  int64_t total = 0;
  int64_t spikes = 0, silent = 0;
  int32_t most_count = 0;
  for (i = 0; i < width; ++i) counts[i] = static_cast<int32_t>(__builtin_rintf(x[i] / threshold));
  for (i = 0; i < width; ++i) {
    const int32_t magnitude = counts[i] < 0 ? -counts[i] : counts[i];
    total += magnitude;
    silent += magnitude == 0;
    most_count = most_count > magnitude ? most_count : magnitude;
  }
  for (i = 0; i < width; ++i)
    spikes += __builtin_popcount(static_cast<uint32_t>(counts[i] < 0 ? -counts[i] : counts[i]));
  row->most = most_count;
  row->total = total;
  row->spikes = spikes;
  row->silent = silent;
  return true;
}

inline bool quantize_group(const float* w, int64_t count, float scale, int16_t* codes) {
  float most = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float q = __builtin_fabsf(w[i] / scale);
    finite = finite && q < 32767.0f;
    most = most > q ? most : q;
  }
  if (!finite || !(most < 32767.0f)) return false;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int16_t>(__builtin_rintf(w[i] / scale));
  return true;
}

// ---- scaling: one order for both products -----------------------------------------------------------

typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class T>
inline void store_as(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// scaled += sums * scales; sums = 0.
__attribute__((noinline)) void scale_group(int32_t* sums, const float* scales, float* scaled, int64_t tile) {
  for (int64_t j = 0; j < tile; j += 16) {
    const Floats16 f = __builtin_convertvector(load_as<Ints16>(sums + j), Floats16);
    store_as(scaled + j, load_as<Floats16>(scaled + j) + f * load_as<Floats16>(scales + j));
    store_as(sums + j, Ints16{});
  }
}

__attribute__((noinline)) void finish_row(const SpikePiece& p, int64_t tile_width, int64_t tile, int64_t row) {
  const SpikeWeight& w = *p.weight;
  const int64_t first = tile * tile_width;
  const int64_t count = w.out - first < tile_width ? w.out - first : tile_width;
  const float threshold = p.row[row].threshold;
  const float* scaled = p.scaled + row * tile_width;
  float* y = p.y + row * p.y_stride + first;
  for (int64_t j = 0; j < count; ++j) {
    const float value = scaled[j] * threshold + (w.bias ? w.bias[first + j] : 0.0f);
    y[j] = p.accumulate ? y[j] + value : value;
  }
}

// Runs `block_body(tile, group, block, begin, end)` over a tile's blocks, scales at every group's end.
template <class Body, class GroupBody>
inline void each_tile(const SpikePiece& p, int64_t width, const Body& block_body, const GroupBody& group_body) {
  const int64_t groups = p.blocks.groups();
  for (int64_t t = p.first_tile; t < p.first_tile + p.tiles; ++t) {
    __builtin_memset(p.sums, 0, static_cast<size_t>(p.rows * width) * sizeof(int32_t));
    __builtin_memset(p.scaled, 0, static_cast<size_t>(p.rows * width) * sizeof(float));
    int64_t block = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * p.blocks.group;
      const int64_t last = first + p.blocks.group < p.blocks.in ? first + p.blocks.group : p.blocks.in;
      for (int64_t begin = first; begin < last; begin += p.blocks.block, ++block)
        block_body(t, block, begin, begin + p.blocks.block < last ? begin + p.blocks.block : last);
      group_body(t, g, first, last);
      const float* scales = p.weight->scales + (t * groups + g) * width;
      for (int64_t r = 0; r < p.rows; ++r) scale_group(p.sums + r * width, scales, p.scaled + r * width, width);
    }
    for (int64_t r = 0; r < p.rows; ++r) finish_row(p, width, t, r);
  }
}

// ---- dense ----------------------------------------------------------------------------------------

// Sums of kRows rows over one block of `quads` quads of inputs, for the 64 outputs of a tile.
template <class S, int kRows>
inline void dense_block(const uint8_t* codes, const int8_t* near, int64_t near_stride, int64_t quads,
                        const int32_t* bias, int64_t bias_stride, int32_t* sums) {
  using Sums = typename S::Sums;
  Sums sum[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = S::zero();
  for (int64_t q = 0; q < quads; ++q, codes += 4 * kDenseTile) {
    int32_t four[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) __builtin_memcpy(&four[r], near + r * near_stride + 4 * q, 4);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      __builtin_prefetch(codes + 64 * c + 8192);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][c] = S::dot(sum[r][c], codes + 64 * c, four[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    // Codes are stored 128 too high where the dot product wants them unsigned.
    const int32_t high = S::kBiased ? 128 * bias[r * bias_stride] : 0;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      int32_t part[16];
      S::store(part, sum[r][c]);
      int32_t* to = sums + r * kDenseTile + 16 * c;
      for (int j = 0; j < 16; ++j) to[j] += part[j] - high;
    }
  }
}

template <class S>
void dense_piece(const SpikePiece& p) {
  const SpikeWeight& w = *p.weight;
  const int64_t quads = (w.in + 3) / 4, blocks = p.blocks.count(), groups = p.blocks.groups();
  const auto block_body = [&](int64_t tile, int64_t block, int64_t begin, int64_t end) {
    // Blocks begin at multiples of 4; the last quad is filled up with zero counts.
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + (tile * quads + begin / 4) * 4 * kDenseTile;
    const int64_t block_quads = (end - begin + 3) / 4;
    for (int64_t r = 0; r < p.rows;) {
      const int8_t* near = p.near + r * p.near_stride + begin;
      const int32_t* bias = p.block_sum + r * blocks + block;
      int32_t* sums = p.sums + r * kDenseTile;
      const int64_t left = p.rows - r;
      if (left >= 4) {
        dense_block<S, 4>(codes, near, p.near_stride, block_quads, bias, blocks, sums);
        r += 4;
      } else if (left >= 2) {
        dense_block<S, 2>(codes, near, p.near_stride, block_quads, bias, blocks, sums);
        r += 2;
      } else {
        dense_block<S, 1>(codes, near, p.near_stride, block_quads, bias, blocks, sums);
        r += 1;
      }
    }
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t* start = p.rest_start + r * blocks + block;
      for (int64_t e = start[0]; e < start[1]; ++e) {
        const int64_t input = p.rest[e].input - begin;
        const uint8_t* column = codes + input / 4 * 4 * kDenseTile + input % 4;
        int32_t* sums = p.sums + r * kDenseTile;
        for (int64_t j = 0; j < kDenseTile; ++j)
          sums[j] += p.rest[e].value * (static_cast<int32_t>(column[4 * j]) - 128);
      }
    }
  };
  const auto group_body = [&](int64_t tile, int64_t group, int64_t, int64_t) {
    if (!w.overflow_start) return;
    const int64_t* start = w.overflow_start + tile * groups + group;
    for (int64_t r = 0; r < p.rows; ++r) {
      const int32_t* counts = p.counts + r * w.in;
      int32_t* sums = p.sums + r * kDenseTile;
      for (int64_t e = start[0]; e < start[1]; ++e)
        sums[w.overflow[e].output] += counts[w.overflow[e].input] * w.overflow[e].value;
    }
  };
  each_tile(p, kDenseTile, block_body, group_body);
}

// ---- events ---------------------------------------------------------------------------------------

// Asks for columns ahead of their use: one call a spike keeps pace, since an active input has at least one.
struct EventAhead {
  const uint32_t* next;
  const uint32_t* limit;
  const int8_t* columns;
  void step() {
    if (next >= limit) return;
    const int8_t* column = columns + static_cast<int64_t>(*next++) * kEventTile;
    // To the second level: gaps between columns keep the hardware's prefetching out, and the first level
    // has too few misses in flight to take its place (bench/NOTES-spike.md).
    __builtin_prefetch(column, 0, 2);
    __builtin_prefetch(column + 64, 0, 2);
  }
};

// Adds one block of one row to sums [128].
template <class S>
inline void event_block(const int8_t* columns, const uint16_t* stream, int32_t* sums, EventAhead& ahead) {
  constexpr int kSums = static_cast<int>(kEventTile) / S::kShorts;
  while (*stream != kStreamEnd) {
    int steps = *stream++;
    typename S::Shorts sum[kSums];
#pragma GCC unroll 16
    for (int c = 0; c < kSums; ++c) sum[c] = S::no_shorts();
    for (; steps > 0; --steps) {
      const int adds = stream[0], takes = stream[1];
      stream += 2;
#pragma GCC unroll 16
      for (int c = 0; c < kSums; ++c) sum[c] = S::add(sum[c], sum[c]);
      for (int e = 0; e < adds; ++e) {
        const int8_t* column = columns + int64_t{*stream++} * kEventTile;
        ahead.step();
#pragma GCC unroll 16
        for (int c = 0; c < kSums; ++c) sum[c] = S::add(sum[c], S::widen(column + S::kShorts * c));
      }
      for (int e = 0; e < takes; ++e) {
        const int8_t* column = columns + int64_t{*stream++} * kEventTile;
        ahead.step();
#pragma GCC unroll 16
        for (int c = 0; c < kSums; ++c) sum[c] = S::subtract(sum[c], S::widen(column + S::kShorts * c));
      }
    }
    int16_t part[kEventTile];
#pragma GCC unroll 16
    for (int c = 0; c < kSums; ++c) S::store_shorts(part + S::kShorts * c, sum[c]);
    for (int64_t j = 0; j < kEventTile; ++j) sums[j] += part[j];
  }
  // Inputs of more spikes than a segment holds: every spike by itself, shifted to its step.
  int heavy = *++stream;
  ++stream;
  for (; heavy > 0; --heavy, stream += 3) {
    const int8_t* column = columns + int64_t{stream[0]} * kEventTile;
    const int32_t s = static_cast<int32_t>(stream[1] | static_cast<uint32_t>(stream[2]) << 16);
    for (uint32_t bits = static_cast<uint32_t>(s < 0 ? -s : s); bits; bits &= bits - 1) {
      const int step = __builtin_ctz(bits);
      ahead.step();
      for (int64_t j = 0; j < kEventTile; ++j) {
        const int32_t weight = static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(column[j])) << step);
        sums[j] += s < 0 ? -weight : weight;
      }
    }
  }
}

template <class S>
void event_piece(const SpikePiece& p) {
  const SpikeWeight& w = *p.weight;
  const int64_t blocks = p.blocks.count();
  const int64_t most = p.active_end[blocks - 1] < kEventAhead ? p.active_end[blocks - 1] : kEventAhead;
  EventAhead ahead{};
  const auto block_body = [&](int64_t tile, int64_t block, int64_t begin, int64_t) {
    const int8_t* tile_columns = static_cast<const int8_t*>(w.codes) + tile * w.in * kEventTile;
    if (block == 0) {
      // The tile before has asked for the first columns of this one.
      ahead = {p.active, p.active, tile_columns};
      if (tile == p.first_tile) {
        ahead.limit = p.active + most;
        for (int64_t i = 0; i < most; ++i) ahead.step();
      }
      ahead.next = p.active + most;
    }
    const bool last = block == blocks - 1 && tile == p.first_tile + p.tiles - 1;
    ahead.limit = p.active + p.active_end[block] + (last ? 0 : most);
    for (int64_t r = 0; r < p.rows; ++r)
      event_block<S>(tile_columns + begin * kEventTile, p.stream + p.stream_start[r * blocks + block],
                     p.sums + r * kEventTile, ahead);
  };
  const auto group_body = [&](int64_t tile, int64_t, int64_t first, int64_t last) {
    if (!w.overflow_start) return;
    const int64_t* start = w.overflow_start + tile * w.in;
    for (int64_t r = 0; r < p.rows; ++r) {
      const int32_t* counts = p.counts + r * w.in;
      int32_t* sums = p.sums + r * kEventTile;
      for (int64_t i = first; i < last; ++i) {
        if (counts[i] == 0) continue;
        for (int64_t e = start[i]; e < start[i + 1]; ++e) sums[w.overflow[e].output] += counts[i] * w.overflow[e].value;
      }
    }
  };
  each_tile(p, kEventTile, block_body, group_body);
}

template <class S>
constexpr SpikeBodies spike_table() {
  return {fire_row, quantize_group, dense_piece<S>, event_piece<S>};
}

#include "kernels/lanes.h"

#include <algorithm>

namespace lacuna {
namespace {

// Rows come in eights, what tiles of products with packed weights take, and no more than this many at a time, whose
// activations stay in the L2.
constexpr int64_t kRows = 8, kMostRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of [0, m) that make the threads end together.
int64_t rows_of_piece(int64_t m, int64_t threads) {
  const int64_t wanted = threads * ceil_div(m, threads * kMostRows);
  return ceil_div(ceil_div(m, wanted), kRows) * kRows;
}

// Adds a record of other rows of the same op.
void add(OpRecord& sum, const OpRecord& r) {
  sum.m += r.m;
  sum.n = std::max(sum.n, r.n);
  sum.k = std::max(sum.k, r.k);
  sum.macs += r.macs;
  sum.activation_bytes += r.activation_bytes;
  sum.kv_read_bytes += r.kv_read_bytes;
  sum.kv_write_bytes += r.kv_write_bytes;
  sum.duration_ns += r.duration_ns;
}

}  // namespace

struct Lanes::Lane : TraceSink {
  explicit Lane(MemoryAccount& memory) : ctx(memory, 1) { ctx.last_op = &last_op; }
  void record(const OpRecord& r) override {
    const size_t i = starts[phase] + at++;
    if (i == records.size())
      records.push_back(r);
    else
      add(records[i], r);
  }
  std::span<OpRecord> of_phase(size_t p) {
    if (p >= starts.size()) return {};
    const size_t end = p + 1 < starts.size() ? starts[p + 1] : records.size();
    return std::span(records).subspan(starts[p], end - starts[p]);
  }
  Context ctx;
  std::chrono::steady_clock::time_point last_op;
  // Of one op after the other of a phase, over the lane's pieces, and where each phase's begin. Phases are loops of the
  // chain, steps and mixings. All in one place: the caller's core fetches them from this lane's.
  std::vector<OpRecord> records;
  std::vector<size_t> starts;
  size_t phase = 0, at = 0;  // where the piece's next goes
};

void Lanes::begin(Context& ctx) {
  const int64_t threads = ctx.pool.size();
  if (static_cast<int64_t>(lanes_.size()) != threads || &lanes_[0]->ctx.memory != &ctx.memory) {
    lanes_.clear();
    for (int64_t t = 0; t < threads; ++t) lanes_.push_back(std::make_shared<Lane>(ctx.memory));
  }
  for (const auto& lane : lanes_) {
    lane->ctx.activations = ctx.activations;
    lane->ctx.layer = ctx.layer;
    lane->ctx.trace = ctx.trace ? lane.get() : nullptr;
    lane->records.clear();
    lane->starts.clear();
  }
}

Context& Lanes::enter(int thread, int64_t phase) {
  Lane& lane = *lanes_[static_cast<size_t>(thread)];
  if (!lane.ctx.trace) return lane.ctx;
  lane.phase = static_cast<size_t>(phase);
  lane.at = 0;
  while (lane.starts.size() <= lane.phase) lane.starts.push_back(lane.records.size());
  lane.last_op = std::chrono::steady_clock::now();
  return lane.ctx;
}

void Lanes::report(Context& ctx, int64_t phases) {
  if (!ctx.trace) return;
  const auto threads = static_cast<int64_t>(lanes_.size());
  for (size_t phase = 0; phase < static_cast<size_t>(phases); ++phase) {
    std::span<OpRecord> sum;
    for (const auto& lane : lanes_) {
      const std::span<OpRecord> own = lane->of_phase(phase);
      if (sum.empty()) {
        sum = own;
        continue;
      }
      for (size_t i = 0; i < own.size(); ++i) add(sum[i], own[i]);
    }
    for (OpRecord& r : sum) {
      r.duration_ns /= threads;
      ctx.trace->record(r);
    }
  }
}

void Lanes::rows(Context& ctx, int64_t m, const Rows& body) {
  Steps once;
  once.steps = 1;
  once.body = [&](Context& lane, int64_t, int64_t first, int64_t rows) { body(lane, first, rows); };
  chain(ctx, m, once);
}

// To the threads' runs of a chain's loop like cards, so that what gets shorter from first to last is shared out evenly.
void Lanes::deal(int64_t count, int64_t threads) {
  if (static_cast<int64_t>(dealt_.size()) == count && dealt_to_ == threads) return;
  dealt_to_ = threads;
  dealt_.resize(static_cast<size_t>(count));
  std::vector<int64_t> next(static_cast<size_t>(threads));
  for (int64_t r = 0; r < threads; ++r) next[static_cast<size_t>(r)] = count * r / threads;
  int64_t r = threads;
  for (int64_t i = 0; i < count; ++i) {
    do r = (r + threads - 1) % threads;
    while (next[static_cast<size_t>(r)] == count * (r + 1) / threads);
    dealt_[static_cast<size_t>(next[static_cast<size_t>(r)]++)] = i;
  }
}

void Lanes::chain(Context& ctx, int64_t m, const Steps& steps) {
  const int64_t phases = 2 * steps.steps - 1, rows = rows_of_piece(m, ctx.pool.size());
  begin(ctx);
  counts_.resize(static_cast<size_t>(phases));
  for (size_t i = 0; i < counts_.size(); ++i) counts_[i] = i % 2 == 0 ? ceil_div(m, rows) : steps.items;
  deal(steps.items, ctx.pool.size());
  const auto piece = [&](int64_t phase, int64_t index, int thread) {
    Context& lane = enter(thread, phase);
    if (phase % 2 == 0)
      steps.body(lane, phase / 2, index * rows, std::min(rows, m - index * rows));
    else
      steps.mix(lane, phase / 2, dealt_[static_cast<size_t>(index)], thread);
  };
  ctx.pool.parallel_chain(counts_, std::ref(piece));
  report(ctx, phases);
}

void Lanes::apart(Context& ctx, std::span<const Piece> pieces, int64_t m, const Steps& steps) {
  begin(ctx);
  const auto count = static_cast<int64_t>(pieces.size());
  deal(count, ctx.pool.size());
  const auto piece = [&](int64_t, int64_t index, int thread) {
    const auto at = static_cast<size_t>(dealt_[static_cast<size_t>(index)]);
    const Piece from = pieces[at], to = at + 1 < pieces.size() ? pieces[at + 1] : Piece{m, steps.items};
    for (int64_t step = 0; step < steps.steps; ++step) {
      steps.body(enter(thread, 2 * step), step, from.row, to.row - from.row);
      if (step + 1 == steps.steps) break;
      for (int64_t item = from.item; item < to.item; ++item) steps.mix(enter(thread, 2 * step + 1), step, item, thread);
    }
  };
  ctx.pool.parallel_chain({&count, 1}, std::ref(piece));
  report(ctx, 2 * steps.steps - 1);
}

}  // namespace lacuna

#include "kernels/lanes.h"

#include <algorithm>

namespace lacuna {
namespace {

// Rows come in eights, what tiles of products with packed weights take, and no more than this many at a time, whose
// activations stay in the L2.
constexpr int64_t kRows = 8, kMostRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds a record of other rows of the same op.
void add(OpRecord& sum, const OpRecord& r) {
  sum.m += r.m;
  sum.macs += r.macs;
  sum.activation_bytes += r.activation_bytes;
  sum.kv_read_bytes += r.kv_read_bytes;
  sum.kv_write_bytes += r.kv_write_bytes;
  sum.duration_ns += r.duration_ns;
}

}  // namespace

struct Lanes::Lane : TraceSink {
  explicit Lane(MemoryAccount& memory) : ctx(memory, 1) {}
  void record(const OpRecord& r) override {
    if (at == records.size())
      records.push_back(r);
    else
      add(records[at], r);
    ++at;
  }
  Context ctx;
  std::vector<OpRecord> records;  // of one op after the other, over the lane's pieces
  size_t at = 0;                  // where the piece's next goes
};

void Lanes::pieces(Context& ctx, int64_t count, const std::function<void(Context& lane, int64_t index)>& body) {
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
  }
  const auto piece = [&](int64_t index, int thread) {
    Lane& lane = *lanes_[static_cast<size_t>(thread)];
    lane.at = 0;
    body(lane.ctx, index);
  };
  ctx.pool.parallel_for(count, std::ref(piece));
  if (!ctx.trace) return;
  std::vector<OpRecord>* sum = &lanes_[0]->records;
  for (const auto& lane : lanes_) {
    std::vector<OpRecord>& other = lane->records;
    if (&other == sum) continue;
    if (sum->empty()) sum->swap(other);
    for (size_t i = 0; i < other.size(); ++i) add((*sum)[i], other[i]);
  }
  for (OpRecord& r : *sum) {
    r.duration_ns /= threads;
    ctx.trace->record(r);
  }
}

void Lanes::rows(Context& ctx, int64_t m, const std::function<void(Context& lane, int64_t first, int64_t rows)>& body) {
  // As many pieces as make the threads end together.
  const int64_t threads = ctx.pool.size(), wanted = threads * ceil_div(m, threads * kMostRows);
  const int64_t rows = ceil_div(ceil_div(m, wanted), kRows) * kRows;
  pieces(ctx, ceil_div(m, rows),
         [&](Context& lane, int64_t index) { body(lane, index * rows, std::min(rows, m - index * rows)); });
}

}  // namespace lacuna

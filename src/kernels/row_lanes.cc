#include "kernels/row_lanes.h"

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

struct RowLanes::Lane : TraceSink {
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

void RowLanes::run(Context& ctx, int64_t m,
                   const std::function<void(Context& lane, int64_t first, int64_t rows)>& body) {
  const int64_t threads = ctx.pool.size();
  if (static_cast<int64_t>(lanes_.size()) != threads || &lanes_[0]->ctx.memory != &ctx.memory) {
    lanes_.clear();
    for (int64_t t = 0; t < threads; ++t) lanes_.push_back(std::make_shared<Lane>(ctx.memory));
  }
  for (const auto& lane : lanes_) {
    lane->ctx.activations = ctx.activations;
    lane->ctx.trace = ctx.trace ? lane.get() : nullptr;
    lane->records.clear();
  }
  // As many pieces as make the threads end together.
  const int64_t pieces = threads * ceil_div(m, threads * kMostRows);
  const int64_t rows = ceil_div(ceil_div(m, pieces), kRows) * kRows;
  const auto piece = [&](int64_t index, int thread) {
    Lane& lane = *lanes_[static_cast<size_t>(thread)];
    lane.at = 0;
    body(lane.ctx, index * rows, std::min(rows, m - index * rows));
  };
  ctx.pool.parallel_for(ceil_div(m, rows), std::ref(piece));
  if (!ctx.trace) return;
  std::vector<OpRecord>& sum = std::max_element(lanes_.begin(), lanes_.end(), [](const auto& a, const auto& b) {
                                 return a->records.size() < b->records.size();
                               })->get()->records;
  for (const auto& lane : lanes_)
    for (size_t i = 0; &lane->records != &sum && i < lane->records.size(); ++i) add(sum[i], lane->records[i]);
  for (OpRecord& r : sum) {
    r.duration_ns /= threads;
    ctx.trace->record(r);
  }
}

}  // namespace lacuna

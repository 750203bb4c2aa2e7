#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/context.h"

namespace lacuna {

// Runs pieces of a batch through several ops, each piece on one thread: for ops so small that sharing out each of
// them costs as much as it saves, and leaves a thread to find its rows in another core's caches. A body gets a context
// of one thread, whose ops and workspaces are its own. What its ops report goes to the caller's trace as one record an
// op, with the time that the threads spent in it divided by their number; every piece must run the same ops.
class Lanes {
 public:
  using Rows = std::function<void(Context& lane, int64_t first, int64_t rows)>;
  // body(lane, first, rows) for pieces of [0, m).
  void rows(Context& ctx, int64_t m, const Rows& body);

  // Rows [0, m) through `steps` steps, and through a mixing of rows between any two: body(lane, step, first, rows), and
  // mix(lane, step, item, thread) for every item after a step, once all rows that it mixes are there. The longest items
  // come first.
  struct Steps {
    int64_t steps = 0;
    std::function<void(Context& lane, int64_t step, int64_t first, int64_t rows)> body;
    int64_t items = 0;
    std::function<void(Context& lane, int64_t step, int64_t item, int thread)> mix;
  };
  // Threads meet before and after every mixing. A thread has the same rows in every step, and in the next call alike.
  void chain(Context& ctx, int64_t m, const Steps& steps);
  // Rows [row, next.row) are mixed by the items [item, next.item) only. A piece goes through all steps on its thread,
  // the longest pieces first, and has the same in the next call alike.
  struct Piece {
    int64_t row = 0, item = 0;
  };
  void apart(Context& ctx, std::span<const Piece> pieces, int64_t m, const Steps& steps);

 private:
  struct Lane;
  void begin(Context& ctx);
  void deal(int64_t count, int64_t threads);
  Context& enter(int thread, int64_t phase);
  void report(Context& ctx, int64_t phases);
  std::vector<std::shared_ptr<Lane>> lanes_;  // one a thread
  std::vector<int64_t> counts_, dealt_;
  int64_t dealt_to_ = 0;  // threads
};

}  // namespace lacuna

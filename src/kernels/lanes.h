#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels/context.h"

namespace lacuna {

// Runs pieces of a batch through several ops, each piece on one thread: for ops so small that sharing out each of
// them costs as much as it saves, and leaves a thread to find its rows in another core's caches. A body gets a context
// of one thread, whose ops and workspaces are its own. What its ops report goes to the caller's trace as one record an
// op, with the time that the threads spent in it divided by their number; every piece must run the same ops.
class Lanes {
 public:
  // body(lane, first, rows) for pieces of [0, m).
  void rows(Context& ctx, int64_t m, const std::function<void(Context& lane, int64_t first, int64_t rows)>& body);

 private:
  struct Lane;
  // body(lane, index) for every index below count.
  void pieces(Context& ctx, int64_t count, const std::function<void(Context& lane, int64_t index)>& body);
  std::vector<std::shared_ptr<Lane>> lanes_;  // one a thread
};

}  // namespace lacuna

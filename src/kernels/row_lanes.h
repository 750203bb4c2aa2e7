#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels/context.h"

namespace lacuna {

// Takes the rows of a batch through several ops a piece at a time, each piece on one thread: small ops that would
// otherwise share out microseconds of work one by one, and find each other's rows in another core's caches.
class RowLanes {
 public:
  // Calls body(lane, first, rows) for pieces of [0, m): `lane` is a context of one thread, whose ops and workspaces are
  // that thread's own. What its ops report goes to ctx.trace as one record an op over all rows, with the time
  // that the threads spent in it divided by their number; every piece must run the same ops.
  void run(Context& ctx, int64_t m, const std::function<void(Context& lane, int64_t first, int64_t rows)>& body);

 private:
  struct Lane;
  std::vector<std::shared_ptr<Lane>> lanes_;  // one a thread
};

}  // namespace lacuna

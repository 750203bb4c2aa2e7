#include "kernels/lanes.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "kernels/elementwise.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::normals;

struct Records : TraceSink {
  void record(const OpRecord& r) override { all.push_back(r); }
  std::vector<OpRecord> all;
};

// Steps that count what they saw: body adds one to its rows, a mixing wants the rows of its item to be as many steps
// along as it is itself.
struct Counted {
  Counted(int64_t m, std::vector<Lanes::Piece> p) : x(static_cast<size_t>(m)), pieces(std::move(p)) {
    steps.steps = 4;
    steps.items = pieces.empty() ? 0 : static_cast<int64_t>(pieces.size());
    steps.body = [this](Context& lane, int64_t step, int64_t first, int64_t rows) {
      for (int64_t i = first; i < first + rows; ++i) bad += x[static_cast<size_t>(i)]++ != 2 * step;
      std::vector<float> some(static_cast<size_t>(rows * 8));
      silu(lane, some.data(), rows * 8);
    };
    steps.mix = [this, m](Context& lane, int64_t step, int64_t item, int) {
      const auto at = static_cast<size_t>(item);
      const int64_t end = at + 1 < pieces.size() ? pieces[at + 1].row : m;
      for (int64_t i = pieces[at].row; i < end; ++i) bad += x[static_cast<size_t>(i)]++ != 2 * step + 1;
      float one = 0;
      silu(lane, &one, 1);
    };
  }
  std::vector<std::atomic<int64_t>> x;
  std::vector<Lanes::Piece> pieces;
  Lanes::Steps steps;
  std::atomic<int> bad{0};
};

TEST(Lanes, EveryRowTakesEveryStepInOrder) {
  for (const int threads : {1, 2, 3, 5})
    for (const int64_t m : {1, 8, 16, 33, 200}) {
      Engine e(threads);
      Records records;
      e.ctx.trace = &records;
      Lanes lanes;
      for (const bool apart : {false, true, false, true}) {
        // Pieces of 1, 2, 3 … rows, an item each.
        std::vector<Lanes::Piece> pieces;
        for (int64_t row = 0, n = 1; row < m; row += n++) pieces.push_back({row, static_cast<int64_t>(pieces.size())});
        Counted c(m, pieces);
        records.all.clear();
        if (apart)
          lanes.apart(e.ctx, c.pieces, m, c.steps);
        else
          lanes.chain(e.ctx, m, c.steps);
        EXPECT_EQ(c.bad, 0);
        for (const auto& n : c.x) EXPECT_EQ(n, 7);
        // A record an op: of a step all rows, of a mixing all items.
        ASSERT_EQ(records.all.size(), 7u);
        for (size_t i = 0; i < 7; ++i)
          EXPECT_EQ(records.all[i].activation_bytes, i % 2 == 0 ? 2 * 8 * 4 * m : 8 * c.steps.items);
      }
    }
}

TEST(Lanes, ErrorsComeBackFromAnyStep) {
  for (const bool apart : {false, true})
    for (int64_t bad = 0; bad < 7; ++bad) {
      Engine e(2);
      Lanes lanes;
      Counted c(64, {{0, 0}, {16, 1}, {32, 2}, {48, 3}});
      const auto fail = [bad](int64_t phase, int64_t at) {
        if (phase == bad && at >= 32) throw BadInput("x");
      };
      const auto body = c.steps.body;
      const auto mix = c.steps.mix;
      c.steps.body = [&](Context& lane, int64_t step, int64_t first, int64_t rows) {
        fail(2 * step, first);
        body(lane, step, first, rows);
      };
      c.steps.mix = [&](Context& lane, int64_t step, int64_t item, int thread) {
        fail(2 * step + 1, item * 16);
        mix(lane, step, item, thread);
      };
      if (apart)
        EXPECT_THROW(lanes.apart(e.ctx, c.pieces, 64, c.steps), BadInput);
      else
        EXPECT_THROW(lanes.chain(e.ctx, 64, c.steps), BadInput);
      EXPECT_EQ(c.bad, 0);
    }
}

}  // namespace
}  // namespace lacuna

#include "base/threads.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"

namespace lacuna {
namespace {

TEST(ThreadPool, EveryIndexOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int64_t count : {0, 1, 2, 3, 17, 1000}) {
      std::vector<std::atomic<int>> hits(static_cast<size_t>(count));
      pool.parallel_for(count, [&](int64_t i, int thread) {
        ASSERT_GE(thread, 0);
        ASSERT_LT(thread, pool.size());
        ++hits[static_cast<size_t>(i)];
      });
      for (auto& h : hits) EXPECT_EQ(h.load(), 1);
    }
  }
}

TEST(ThreadPool, ManyShortLoopsInARow) {
  ThreadPool pool(3);
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 5000; ++round)
    pool.parallel_for(4, [&](int64_t i, int) { sum += i; });
  EXPECT_EQ(sum.load(), 5000 * 6);
}

TEST(ThreadPool, RunsGiveEveryIndexOnceAndNeighboursToAThread) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    for (int64_t count : {0, 1, 2, 5, 6, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
      pool.parallel_runs(count, [&](int64_t i, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, threads);
        seen[static_cast<size_t>(i)]++;
      });
      for (const auto& n : seen) EXPECT_EQ(n, 1);
    }
    EXPECT_THROW(pool.parallel_runs(50, [](int64_t i, int) { if (i == 30) throw BadInput("x"); }), BadInput);
  }
}

TEST(ThreadPool, LoopsOfAChainFollowEachOther) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      const std::vector<int64_t> counts = {5, 1, 0, 64, 3, 7};
      std::vector<std::vector<std::atomic<int>>> seen;
      for (const int64_t n : counts) seen.emplace_back(static_cast<size_t>(n));
      std::atomic<int> early{0};
      pool.parallel_chain(counts, [&](int64_t loop, int64_t i, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, threads);
        for (int64_t l = 0; l < loop; ++l)
          for (const auto& n : seen[static_cast<size_t>(l)]) early += n != 1;
        seen[static_cast<size_t>(loop)][static_cast<size_t>(i)]++;
      });
      EXPECT_EQ(early, 0);
      for (const auto& loop : seen)
        for (const auto& n : loop) EXPECT_EQ(n, 1);
    }
    pool.parallel_chain({}, [](int64_t, int64_t, int) { FAIL(); });
    // Nobody waits for a loop that will not end.
    std::atomic<int> later{0};
    const std::vector<int64_t> three = {8, 20, 8};
    EXPECT_THROW(pool.parallel_chain(three, [&](int64_t loop, int64_t i, int) {
      if (loop == 1 && i == 13) throw BadInput("x");
      later += loop == 2;
    }), BadInput);
    EXPECT_EQ(later, 0);
  }
}

TEST(ThreadPool, FirstExceptionComesBackAndThePoolLivesOn) {
  ThreadPool pool(2);
  EXPECT_THROW(pool.parallel_for(100, [](int64_t i, int) { if (i == 37) throw BadInput("index {}", i); }), BadInput);
  std::atomic<int> done{0};
  pool.parallel_for(10, [&](int64_t, int) { ++done; });
  EXPECT_EQ(done.load(), 10);
}

TEST(Error, SaysKindAndSentence) {
  const CorruptData e("{}: tensor '{}': found {}, expected {}", "a.safetensors", "w", 3, 4);
  EXPECT_EQ(e.kind(), ErrorKind::kCorruptData);
  EXPECT_STREQ(e.what(), "a.safetensors: tensor 'w': found 3, expected 4");
}

}  // namespace
}  // namespace lacuna

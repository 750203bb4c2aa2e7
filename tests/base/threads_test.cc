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

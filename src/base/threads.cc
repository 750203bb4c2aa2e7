#include "base/threads.h"

#include <sched.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lacuna {
namespace {

// How long a worker spins before it sleeps. A decode step issues a loop every few microseconds;
// sleeping and waking through the kernel costs 5-50 us each, more than most of those loops.
constexpr int kSpins = 4000;

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = available_cores();
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { worker(t); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

void ThreadPool::run_pieces(int thread) {
  try {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      (*body_)(index, thread);
    }
  } catch (...) {
    std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_.store(count_, std::memory_order_relaxed);
  }
}

void ThreadPool::worker(int thread) {
  uint64_t seen = 0;
  for (;;) {
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpins) {
        cpu_relax();
        continue;
      }
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    // Announce, then look: either the caller sees this worker inside, or the worker sees the loop closed.
    inside_.fetch_add(1);
    if (open_.load()) run_pieces(thread);
    inside_.fetch_sub(1);
  }
}

void ThreadPool::parallel_for(int64_t count, const std::function<void(int64_t, int)>& body) {
  if (count <= 0) return;
  if (count == 1 || workers_.empty()) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  body_ = &body;
  count_ = count;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  open_.store(true);
  {
    std::lock_guard lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  run_pieces(0);
  // Nothing is left to hand out. A worker that never got a core is not waited for: on a busy machine
  // that wait would cost a time slice per loop.
  open_.store(false);
  for (int spins = 0; inside_.load() != 0; ++spins) {
    if (spins < kSpins)
      cpu_relax();
    else
      std::this_thread::yield();
  }
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::parallel_runs(int64_t count, const std::function<void(int64_t, int)>& body) {
  const auto only = [&](int64_t, int64_t index, int thread) { body(index, thread); };
  parallel_chain({&count, 1}, std::ref(only));
}

void ThreadPool::parallel_chain(std::span<const int64_t> counts,
                                const std::function<void(int64_t, int64_t, int)>& body) {
  const auto loops = static_cast<int64_t>(counts.size()), runs = int64_t{size()};
  if (const auto need = static_cast<size_t>(loops * (runs + 1)); need > link_count_) {
    links_ = std::make_unique<Run[]>(need);
    link_count_ = need;
  }
  for (int64_t l = 0; l < loops; ++l) {
    Run* link = &links_[static_cast<size_t>(l * (runs + 1))];
    for (int64_t r = 0; r < runs; ++r) {
      link[r].next.store(counts[static_cast<size_t>(l)] * r / runs, std::memory_order_relaxed);
      link[r].end = counts[static_cast<size_t>(l)] * (r + 1) / runs;
    }
    link[runs].next.store(0, std::memory_order_relaxed);
  }
  std::atomic<bool> failed{false};
  const auto follow = [&](int64_t, int thread) {
    for (int64_t l = 0; l < loops; ++l) {
      Run* link = &links_[static_cast<size_t>(l * (runs + 1))];
      std::atomic<int64_t>& done = link[runs].next;
      const int64_t count = counts[static_cast<size_t>(l)];
      // The own run first; who is done with it helps with the others, unless that was the last of all.
      for (int64_t r = 0, all = 0; r < runs && all < count; ++r) {
        Run& run = link[(thread + r) % runs];
        int64_t mine = 0;
        try {
          for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end; ++mine) body(l, i, thread);
        } catch (...) {
          failed.store(true);
          throw;
        }
        if (mine > 0) all = done.fetch_add(mine, std::memory_order_acq_rel) + mine;
      }
      for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
        if (failed.load(std::memory_order_relaxed)) return;
        if (spins < kSpins)
          cpu_relax();
        else
          std::this_thread::yield();
      }
    }
  };
  parallel_for(runs, std::ref(follow));
}

}  // namespace lacuna

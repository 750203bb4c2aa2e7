#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace lacuna {

// A fixed team of threads that runs one parallel loop at a time. The caller takes part.
// Work is handed out in pieces whose bounds do not depend on the number of threads, so that a
// body that writes only its own piece gives the same bits for any team size.
class ThreadPool {
 public:
  // threads = 0: one for each core this process may run on.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(index, thread) for every index in [0, count); indices are taken in order, one at a
  // time, by whichever thread is free. thread is in [0, size()). The first exception is rethrown
  // here once all threads have stopped. Loops must not be nested on the same pool.
  void parallel_for(int64_t count, const std::function<void(int64_t index, int thread)>& body);
  // The same, but thread t begins with the t-th run of neighbouring indices and takes others' when it is done: for bodies
  // that ask for the memory of the next index ahead.
  void parallel_runs(int64_t count, const std::function<void(int64_t index, int thread)>& body);
  // Loops of counts[0], counts[1], … indices, each once the one before it is done; what loop `i` wrote, loop i + 1 sees.
  // Each is shared out as by parallel_runs, so that rows that several loops share out alike stay with their thread, but
  // the threads are called together once.
  void parallel_chain(std::span<const int64_t> counts,
                      const std::function<void(int64_t loop, int64_t index, int thread)>& body);

 private:
  void worker(int thread);
  void run_pieces(int thread);

  struct alignas(64) Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::vector<std::thread> workers_;
  std::unique_ptr<Run[]> links_;  // of a chain, one a loop and thread, and behind them one a loop: indices that are done
  size_t link_count_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> generation_{0};  // loops issued so far: what a waiting worker watches
  std::atomic<bool> open_{false};        // a loop may be joined
  std::atomic<int> inside_{0};           // workers that may be touching the loop
  bool stop_ = false;
  std::exception_ptr error_;
};

// Cores this process may run on.
int available_cores();

}  // namespace lacuna

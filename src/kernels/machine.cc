#include "kernels/machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/machine_bodies.h"

namespace lacuna::cpu {

const MachineBodies& machine_bodies() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kScalar: break;
    case Isa::kAvx2: return machine_avx2();
    case Isa::kAvx512: return machine_avx512();
    case Isa::kAvx512Bf16: return machine_avx512_bf16();
  }
#endif
  return machine_portable();
}

}  // namespace lacuna::cpu

namespace lacuna {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_of(const std::function<void()>& work) {
  const Clock::time_point start = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Repeats `work` for about `seconds`, three times at least, and gives the median duration of one run.
double median_seconds(const std::function<void()>& work, double seconds) {
  std::vector<double> times;
  const Clock::time_point start = Clock::now();
  do {
    times.push_back(seconds_of(work));
  } while (times.size() < 3 || std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Where the results of the loops end up, so that none of them is optimised away.
volatile float sink;

// Pieces for each thread: enough that one which is interrupted does not set the time alone.
constexpr int64_t kPiecesPerThread = 8;

double peak_rate(Context& ctx, const cpu::PeakLoop& loop, double seconds) {
  if (!loop.run) return 0;
  const int64_t pieces = ctx.pool.size() * kPiecesPerThread;
  const auto run = [&](int64_t rounds) {
    ctx.pool.parallel_for(pieces, [&](int64_t, int) { sink = loop.run(rounds); });
  };
  // Find how many rounds take a seventh of the time, then take the median of runs of that length.
  int64_t rounds = 256;
  double once = 0;
  while ((once = seconds_of([&] { run(rounds); })) < seconds / 64) rounds *= 2;
  rounds = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(rounds) * seconds / 7 / once));
  const double typical = median_seconds([&] { run(rounds); }, seconds / 7 * 5);
  return static_cast<double>(loop.ops_per_round) * static_cast<double>(rounds) * static_cast<double>(pieces) / typical;
}

}  // namespace

MachineLimits measure_machine(Context& ctx, double seconds, size_t buffer_bytes) {
  // One piece of the read test: long enough for the prefetchers, short enough to share out evenly.
  constexpr size_t kReadPiece = size_t{1} << 20;
  if (!(seconds > 0)) throw BadInput("measure_machine: {} seconds were asked for; expected more than 0", seconds);
  if (buffer_bytes < kReadPiece)
    throw BadInput("measure_machine: a buffer of {} bytes was asked for; expected at least {}", buffer_bytes, kReadPiece);
  const cpu::MachineBodies& b = cpu::machine_bodies();
  MachineLimits limits;
  limits.isa = isa_name(cpu_isa());
  if (b.int8.run) limits.isa += "+vnni";

  {
    const int64_t pieces = static_cast<int64_t>(buffer_bytes / kReadPiece);
    Buffer buffer(ctx.memory, MemoryTag::kScratch, static_cast<size_t>(pieces) * kReadPiece);
    // Written first: pages that nobody wrote share one page of zeros, which a cache holds.
    ctx.pool.parallel_for(pieces, [&](int64_t i, int) {
      std::memset(buffer.as<char>() + static_cast<size_t>(i) * kReadPiece, 1, kReadPiece);
    });
    const double typical = median_seconds(
        [&] {
          ctx.pool.parallel_for(pieces, [&](int64_t i, int) {
            sink = b.read(buffer.as<char>() + static_cast<size_t>(i) * kReadPiece, kReadPiece);
          });
        },
        seconds * 0.4);
    limits.read_bytes_per_s = static_cast<double>(buffer.bytes()) / typical;
  }
  limits.f32_flops_per_s = peak_rate(ctx, b.f32, seconds * 0.2);
  limits.bf16_flops_per_s = b.bf16.run ? peak_rate(ctx, b.bf16, seconds * 0.2) : limits.f32_flops_per_s;
  limits.int8_ops_per_s = peak_rate(ctx, b.int8, seconds * 0.2);
  return limits;
}

}  // namespace lacuna

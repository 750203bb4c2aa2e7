// Limit-finding loops, written once over a vector type S (V, kLanes, kSums, load, broadcast, add, fma,
// sum). Include it only inside an anonymous namespace of an ISA file, as linear_body.h.

// Distance at which a core's own prefetchers are helped along; measured: see bench/NOTES.md.
constexpr size_t kReadAhead = 2048;

template <class S>
float read_all(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  constexpr size_t kVector = S::kLanes * sizeof(float);
  typename S::V sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  for (size_t at = 0; at < bytes; at += 4 * kVector) {
    for (size_t line = 0; line < 4 * kVector; line += 64) __builtin_prefetch(p + at + line + kReadAhead);
    for (int i = 0; i < 4; ++i) sum[i] = S::add(sum[i], S::load(reinterpret_cast<const float*>(p + at + i * kVector)));
  }
  return S::sum(S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3])));
}

// Step::step(sum, a, b) is the instruction under test. S::kSums sums are enough for two units of latency
// six to stay busy, or what the registers hold. Factors below one keep the sums finite; starting
// values that the compiler cannot know to be equal keep it from computing one sum for all.
template <class S, class Step>
float peak(int64_t rounds) {
  const float half = 0.5f;
  const typename S::V a = S::broadcast(&half), b = S::broadcast(&half);
  volatile float unknown = 0;
  typename S::V sum[S::kSums];
#pragma GCC unroll 32
  for (int i = 0; i < S::kSums; ++i) {
    const float start = unknown;
    sum[i] = S::broadcast(&start);
  }
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < S::kSums; ++i) sum[i] = Step::step(sum[i], a, b);
  }
  typename S::V all = sum[0];
#pragma GCC unroll 32
  for (int i = 1; i < S::kSums; ++i) all = S::add(all, sum[i]);
  return S::sum(all);
}

template <class S>
struct FmaStep {
  static typename S::V step(typename S::V sum, typename S::V a, typename S::V b) { return S::fma(sum, a, b); }
};

// products: multiply-adds that one lane of the instruction does.
template <class S, class Step>
constexpr PeakLoop peak_loop(int64_t products) {
  return {peak<S, Step>, 2 * products * S::kLanes * S::kSums};
}

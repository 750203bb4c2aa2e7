#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "evict/policy.h"

namespace lacuna {

enum class WindowReduce : uint8_t { kL2, kMean, kMax };  // how a column of window attention becomes a number

// Columns a piece of work covers. Partial results of this many floats stay in the first-level cache.
inline constexpr int64_t kColumnBlock = 1024;

// body(begin, end) over [0, count) in pieces whose bounds do not depend on the number of threads.
template <typename Body>
void for_columns(ThreadPool& pool, int64_t count, const Body& body) {
  pool.parallel_for((count + kColumnBlock - 1) / kColumnBlock, [&](int64_t piece, int) {
    body(piece * kColumnBlock, std::min(count, (piece + 1) * kColumnBlock));
  });
}

// Loops over columns in steps of 16 floats, a number the compiler knows: that is what makes it use
// vector instructions at -O2.
void add_squares(const float* __restrict row, int64_t n, float* __restrict out);                          // out += row^2
void add_products(const float* __restrict a, const float* __restrict b, int64_t n, float* __restrict out);  // out += a b
void add_scaled(const float* __restrict row, float scale, int64_t n, float* __restrict out);              // out += scale row
void take_largest(const float* __restrict row, int64_t n, float* __restrict out);                         // out = max(out, row)
float dot(const float* a, const float* b, int64_t n);
float absolute_sum(const float* row, int64_t n);

// Rows of evidence that a policy with this window reads: the newest ones.
inline int first_row(const HeadEvidence& e, int window) { return std::max(0, e.rows - window); }

// out[i - begin] = the reduction of query head h's attention to candidate i over the window.
void reduce_window(const HeadEvidence& e, int window, int h, WindowReduce how, int64_t begin, int64_t end, float* out);

// Mean over the window and the heads of the group; out [candidates].
void mean_window_attention(const HeadEvidence& e, int window, float* out);

// Pooling with an odd kernel, stride 1 and zero padding; the average is always divided by the kernel.
std::vector<float> average_pool(const std::vector<float>& in, int kernel);
std::vector<float> max_pool(const std::vector<float>& in, int kernel);

// For values that all heads of a layer hold about one position: sums[h][i] = the sum over heads of
// values[.] at the position of head h's entry i. Heads may hold different positions.
std::vector<std::vector<double>> sum_over_heads(const LayerScores& layer, std::vector<float> HeadScores::*values);

}  // namespace lacuna

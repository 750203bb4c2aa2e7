#include "evict/columns.h"

#include <cmath>

namespace lacuna {

namespace {

constexpr int kStep = 16;

// Four floats; the compiler maps them to whatever the target has.
typedef float Lanes __attribute__((vector_size(16)));

Lanes load(const float* from) {
  Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

}  // namespace

void add_squares(const float* __restrict row, int64_t n, float* __restrict out) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int j = 0; j < kStep; ++j) out[i + j] += row[i + j] * row[i + j];
  for (; i < n; ++i) out[i] += row[i] * row[i];
}

void add_products(const float* __restrict a, const float* __restrict b, int64_t n, float* __restrict out) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int j = 0; j < kStep; ++j) out[i + j] += a[i + j] * b[i + j];
  for (; i < n; ++i) out[i] += a[i] * b[i];
}

void add_scaled(const float* __restrict row, float scale, int64_t n, float* __restrict out) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int j = 0; j < kStep; ++j) out[i + j] += scale * row[i + j];
  for (; i < n; ++i) out[i] += scale * row[i];
}

void take_largest(const float* __restrict row, int64_t n, float* __restrict out) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int j = 0; j < kStep; ++j) out[i + j] = std::max(out[i + j], row[i + j]);
  for (; i < n; ++i) out[i] = std::max(out[i], row[i]);
}

float dot(const float* a, const float* b, int64_t n) {
  Lanes s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + 4) * load(b + i + 4);
    s2 += load(a + i + 8) * load(b + i + 8);
    s3 += load(a + i + 12) * load(b + i + 12);
  }
  s0 = (s0 + s1) + (s2 + s3);
  float sum = (s0[0] + s0[1]) + (s0[2] + s0[3]);
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

float absolute_sum(const float* row, int64_t n) {
  Lanes s0{}, s1{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const Lanes a = load(row + i), b = load(row + i + 4);
    s0 += a < 0 ? -a : a;
    s1 += b < 0 ? -b : b;
  }
  s0 += s1;
  float sum = (s0[0] + s0[1]) + (s0[2] + s0[3]);
  for (; i < n; ++i) sum += std::fabs(row[i]);
  return sum;
}

void reduce_window(const HeadEvidence& e, int window, int h, WindowReduce how, int64_t begin, int64_t end, float* out) {
  const int64_t n = end - begin;
  const int from = first_row(e, window);
  std::fill(out, out + n, 0.0f);
  for (int t = from; t < e.rows; ++t) {
    const float* row = e.prob_row(h, t) + begin;
    if (how == WindowReduce::kL2) add_squares(row, n, out);
    if (how == WindowReduce::kMean) add_scaled(row, 1.0f, n, out);
    if (how == WindowReduce::kMax) take_largest(row, n, out);
  }
  if (how == WindowReduce::kL2)
    for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(out[i]);
  if (how == WindowReduce::kMean) {
    const float scale = 1.0f / static_cast<float>(std::max(1, e.rows - from));
    for (int64_t i = 0; i < n; ++i) out[i] *= scale;
  }
}

void mean_window_attention(const HeadEvidence& e, int window, float* out) {
  for_columns(*e.pool, e.candidates, [&](int64_t begin, int64_t end) {
    float head[kColumnBlock];
    std::fill(out + begin, out + end, 0.0f);
    for (int h = 0; h < e.group; ++h) {
      reduce_window(e, window, h, WindowReduce::kMean, begin, end, head);
      add_scaled(head, 1.0f / static_cast<float>(e.group), end - begin, out + begin);
    }
  });
}

std::vector<float> average_pool(const std::vector<float>& in, int kernel) {
  const int64_t n = static_cast<int64_t>(in.size()), half = kernel / 2;
  std::vector<float> out(in.size(), 0.0f);
  const float scale = 1.0f / static_cast<float>(kernel);
  for (int64_t shift = -half; shift <= half; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(n, n - shift);
    if (begin < end) add_scaled(in.data() + begin + shift, scale, end - begin, out.data() + begin);
  }
  return out;
}

std::vector<float> max_pool(const std::vector<float>& in, int kernel) {
  const int64_t n = static_cast<int64_t>(in.size()), half = kernel / 2;
  std::vector<float> out = in;
  for (int64_t shift = -half; shift <= half; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(n, n - shift);
    if (begin < end) take_largest(in.data() + begin + shift, end - begin, out.data() + begin);
  }
  return out;
}

std::vector<std::vector<double>> sum_over_heads(const LayerScores& layer, std::vector<float> HeadScores::*values) {
  int32_t last = -1;
  for (const HeadScores& head : layer.heads)
    if (!head.position.empty()) last = std::max(last, head.position.back());
  std::vector<double> by_position(static_cast<size_t>(last + 1), 0.0);
  for (const HeadScores& head : layer.heads)
    for (size_t i = 0; i < head.position.size(); ++i) by_position[static_cast<size_t>(head.position[i])] += (head.*values)[i];
  std::vector<std::vector<double>> out(layer.heads.size());
  for (size_t h = 0; h < out.size(); ++h)
    for (int32_t position : layer.heads[h].position) out[h].push_back(by_position[static_cast<size_t>(position)]);
  return out;
}

}  // namespace lacuna

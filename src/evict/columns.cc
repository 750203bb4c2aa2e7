#include "evict/columns.h"

#include <cmath>

namespace lacuna {

void reduce_window(const HeadEvidence& e, int window, int h, WindowReduce how, int64_t begin, int64_t end, float* out) {
  const int64_t n = end - begin;
  const int from = first_row(e, window);
  std::fill(out, out + n, 0.0f);
  for (int t = from; t < e.rows; ++t) {
    const float* row = e.prob_row(h, t) + begin;
    switch (how) {
      case WindowReduce::kL2:
        for (int64_t i = 0; i < n; ++i) out[i] += row[i] * row[i];
        break;
      case WindowReduce::kMean:
        for (int64_t i = 0; i < n; ++i) out[i] += row[i];
        break;
      case WindowReduce::kMax:
        for (int64_t i = 0; i < n; ++i) out[i] = std::max(out[i], row[i]);
        break;
    }
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
      for (int64_t i = begin; i < end; ++i) out[i] += head[i - begin];
    }
    const float scale = 1.0f / static_cast<float>(e.group);
    for (int64_t i = begin; i < end; ++i) out[i] *= scale;
  });
}

std::vector<float> average_pool(const std::vector<float>& in, int kernel) {
  const int64_t n = static_cast<int64_t>(in.size()), half = kernel / 2;
  std::vector<float> out(in.size(), 0.0f);
  for (int64_t shift = -half; shift <= half; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(n, n - shift);
    for (int64_t i = begin; i < end; ++i) out[static_cast<size_t>(i)] += in[static_cast<size_t>(i + shift)];
  }
  const float scale = 1.0f / static_cast<float>(kernel);
  for (float& x : out) x *= scale;
  return out;
}

std::vector<float> max_pool(const std::vector<float>& in, int kernel) {
  const int64_t n = static_cast<int64_t>(in.size()), half = kernel / 2;
  std::vector<float> out = in;
  for (int64_t shift = -half; shift <= half; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(n, n - shift);
    for (int64_t i = begin; i < end; ++i)
      out[static_cast<size_t>(i)] = std::max(out[static_cast<size_t>(i)], in[static_cast<size_t>(i + shift)]);
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

#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "evict/score_board.h"
#include "fake_model.h"

namespace lacuna {

// Everything about one layer's prefill, in double precision and without any shortcut.
struct OracleLayer {
  int heads = 0, kv_heads = 0, d = 0, group = 0;
  int64_t n = 0, hidden = 0;
  double scale = 0;
  std::vector<std::vector<double>> attention;  // [H] of [n, n]: causal softmax of every query
  std::vector<std::vector<double>> queries_raw;  // [H] of [n, d]
  std::vector<std::vector<double>> keys, values;  // [G] of [n, d]
  std::vector<std::vector<double>> projected;  // [H] of [n, D]: v W_O^h
  std::vector<double> gain;                    // [H]: Frobenius norm of W_O^h

  double a(int h, int64_t t, int64_t i) const { return attention[static_cast<size_t>(h)][static_cast<size_t>(t * n + i)]; }
  double k(int g, int64_t i, int j) const { return keys[static_cast<size_t>(g)][static_cast<size_t>(i * d + j)]; }
  double v(int g, int64_t i, int j) const { return values[static_cast<size_t>(g)][static_cast<size_t>(i * d + j)]; }
  double pv(int h, int64_t i, int64_t o) const { return projected[static_cast<size_t>(h)][static_cast<size_t>(i * hidden + o)]; }
  double length2(int h, int64_t i) const {
    double s = 0;
    for (int64_t o = 0; o < hidden; ++o) s += pv(h, i, o) * pv(h, i, o);
    return std::sqrt(s);
  }
  double length1(int h, int64_t i) const {
    double s = 0;
    for (int64_t o = 0; o < hidden; ++o) s += std::fabs(pv(h, i, o));
    return s;
  }
};

// Records all queries of a prefill, passing everything on to another observer.
class Recorder : public LayerObserver {
 public:
  Recorder(const Model& model, LayerObserver* next) : model_(model), next_(next) {}
  bool wants_raw_queries() const override { return true; }
  void on_chunk(const LayerTap& tap, SequenceState& state) override {
    const AttentionLayer& a = *model_.attention(tap.layer);
    const int64_t row = int64_t{a.query_heads} * a.head_dim;
    auto& q = queries[tap.layer];
    q.insert(q.end(), tap.q, tap.q + tap.tokens * row);
    auto& raw = raw_queries[tap.layer];
    raw.insert(raw.end(), tap.q_raw, tap.q_raw + tap.tokens * row);
    if (next_) next_->on_chunk(tap, state);
  }
  void on_layer_end(int layer, SequenceState& state) override {
    if (next_) next_->on_layer_end(layer, state);
  }
  std::map<int, std::vector<float>> queries, raw_queries;

 private:
  const Model& model_;
  LayerObserver* next_;
};

inline std::vector<std::vector<double>> output_blocks(const Model& model, int layer) {
  const AttentionLayer& a = *model.attention(layer);
  OutputProjections projections(model);
  std::vector<std::vector<double>> blocks;  // [H] of [D, d]
  std::vector<float> block(static_cast<size_t>(a.output.out() * a.head_dim));
  for (int h = 0; h < a.query_heads; ++h) {
    projections.block(layer, h, block.data());
    blocks.emplace_back(block.begin(), block.end());
  }
  return blocks;
}

inline OracleLayer oracle_layer(Context& ctx, const Model& model, const SequenceState& state, const Recorder& recorder, int layer) {
  const AttentionLayer& a = *model.attention(layer);
  OracleLayer o;
  o.heads = a.query_heads;
  o.kv_heads = a.kv_heads;
  o.group = a.query_heads / a.kv_heads;
  o.d = a.head_dim;
  o.hidden = a.output.out();
  o.scale = a.scale;
  o.n = state.kv.length(layer, 0);
  const auto blocks = output_blocks(model, layer);
  for (int g = 0; g < a.kv_heads; ++g) {
    std::vector<float> k(static_cast<size_t>(o.n * o.d)), v(k.size());
    kv_read(ctx, state.kv.layout(layer), state.kv.view(layer, g), 0, o.n, k.data(), v.data());
    o.keys.emplace_back(k.begin(), k.end());
    o.values.emplace_back(v.begin(), v.end());
  }
  const auto& q = recorder.queries.at(layer);
  const auto& raw = recorder.raw_queries.at(layer);
  for (int h = 0; h < o.heads; ++h) {
    const int g = h / o.group;
    std::vector<double> p(static_cast<size_t>(o.n * o.n), 0.0), r(static_cast<size_t>(o.n * o.d)), projected(static_cast<size_t>(o.n * o.hidden), 0.0);
    for (int64_t t = 0; t < o.n; ++t) {
      double sum = 0;
      const int64_t begin = a.window > 0 ? std::max<int64_t>(0, t - a.window + 1) : 0;
      std::vector<double> logit(static_cast<size_t>(t + 1), 0.0);
      double top = -1e300;
      for (int64_t i = begin; i <= t; ++i) {
        for (int j = 0; j < o.d; ++j) logit[static_cast<size_t>(i)] += static_cast<double>(q[static_cast<size_t>((t * o.heads + h) * o.d + j)]) * o.k(g, i, j);
        logit[static_cast<size_t>(i)] *= o.scale;
        top = std::max(top, logit[static_cast<size_t>(i)]);
      }
      for (int64_t i = begin; i <= t; ++i) sum += p[static_cast<size_t>(t * o.n + i)] = std::exp(logit[static_cast<size_t>(i)] - top);
      for (int64_t i = begin; i <= t; ++i) p[static_cast<size_t>(t * o.n + i)] /= sum;
      for (int j = 0; j < o.d; ++j) r[static_cast<size_t>(t * o.d + j)] = raw[static_cast<size_t>((t * o.heads + h) * o.d + j)];
      for (int64_t c = 0; c < o.hidden; ++c)
        for (int j = 0; j < o.d; ++j)
          projected[static_cast<size_t>(t * o.hidden + c)] += blocks[static_cast<size_t>(h)][static_cast<size_t>(c * o.d + j)] * o.v(g, t, j);
    }
    o.attention.push_back(std::move(p));
    o.queries_raw.push_back(std::move(r));
    o.projected.push_back(std::move(projected));
    double square = 0;
    for (const double w : blocks[static_cast<size_t>(h)]) square += w * w;
    o.gain.push_back(std::sqrt(square));
  }
  return o;
}

using HeadList = std::vector<std::vector<double>>;  // [G] of [candidates]

inline std::vector<double> oracle_pool(const std::vector<double>& x, int kernel, bool maximum = false) {
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<double> out(x.size(), 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = std::max<int64_t>(0, i - kernel / 2); j <= std::min(n - 1, i + kernel / 2); ++j)
      out[static_cast<size_t>(i)] = maximum ? std::max(out[static_cast<size_t>(i)], x[static_cast<size_t>(j)]) : out[static_cast<size_t>(i)] + x[static_cast<size_t>(j)] / kernel;
  return out;
}

// The brute-force kept set: entries sorted by score, then layer, head, position.
struct OracleEntry {
  double score;
  int layer, head;
  int64_t slot;
};
inline void oracle_sort(std::vector<OracleEntry>& entries) {
  std::sort(entries.begin(), entries.end(), [](const OracleEntry& a, const OracleEntry& b) {
    if (a.score != b.score) return a.score > b.score;
    return std::tie(a.layer, a.head, a.slot) < std::tie(b.layer, b.head, b.slot);
  });
}

}  // namespace lacuna

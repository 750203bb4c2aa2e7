#pragma once

#include <cmath>
#include <random>

#include "kernels/elementwise.h"
#include "models/forward.h"

namespace lacuna {

struct FakeShape {
  int layers = 2, query_heads = 4, kv_heads = 2, head_dim = 8;
  int64_t hidden = 24, vocab = 50;
  std::vector<int64_t> windows;             // sliding window of each layer; empty = none
  std::vector<bool> attention;              // false: a layer without attention; empty = all have it
  DType output_dtype = DType::kF32;
  float sharpness = 6;                      // scale of the query weights: larger = more peaked attention
};

// A small attention-only model with random weights: norm, grouped-query attention with rotary
// embedding, residual. Everything that eviction sees of a model, in any shape.
class FakeModel : public Model {
 public:
  FakeModel(const FakeShape& shape, uint32_t seed) : shape_(shape) {
    std::mt19937 random(seed);
    const auto fill = [&](size_t n, double scale) {
      std::normal_distribution<double> normal(0, scale);
      std::vector<float> out(n);
      for (float& x : out) x = static_cast<float>(normal(random));
      return out;
    };
    const int64_t d = shape.head_dim, D = shape.hidden, q = shape.query_heads * d, kv = shape.kv_heads * d;
    info_.architecture = "fake";
    info_.layers = shape.layers;
    info_.hidden = D;
    info_.vocab = shape.vocab;
    info_.max_positions = 1 << 20;
    embedding_ = fill(static_cast<size_t>(shape.vocab * D), 1);
    head_ = fill(static_cast<size_t>(shape.vocab * D), 1 / std::sqrt(static_cast<double>(D)));
    ones_.assign(static_cast<size_t>(D), 1.0f);
    for (int j = 0; j < shape.head_dim / 2; ++j) inv_freq_.push_back(static_cast<float>(std::pow(10000.0, -2.0 * j / shape.head_dim)));
    const double in = 1 / std::sqrt(static_cast<double>(D));
    layers_.resize(static_cast<size_t>(shape.layers));
    for (int l = 0; l < shape.layers; ++l) {
      Layer& layer = layers_[static_cast<size_t>(l)];
      layer.q = fill(static_cast<size_t>(q * D), in * shape.sharpness / std::sqrt(static_cast<double>(d)));
      layer.k = fill(static_cast<size_t>(kv * D), in);
      layer.v = fill(static_cast<size_t>(kv * D), in);
      layer.o = fill(static_cast<size_t>(D * q), 1 / std::sqrt(static_cast<double>(q)));
      layer.attention.query_heads = shape.query_heads;
      layer.attention.kv_heads = shape.kv_heads;
      layer.attention.head_dim = shape.head_dim;
      layer.attention.scale = 1 / std::sqrt(static_cast<float>(d));
      layer.attention.window = shape.windows.empty() ? 0 : shape.windows[static_cast<size_t>(l)];
      layer.attention.inv_freq = inv_freq_;
      store_output(layer, D, q);
      layer.present = shape.attention.empty() || shape.attention[static_cast<size_t>(l)];
    }
  }
  FakeModel(const FakeModel&) = delete;
  FakeModel& operator=(const FakeModel&) = delete;

  const ModelInfo& info() const override { return info_; }
  const AttentionLayer* attention(int layer) const override {
    const Layer& l = layers_[static_cast<size_t>(layer)];
    return l.present ? &l.attention : nullptr;
  }
  SequenceState new_state(MemoryAccount& account, const KvOptions& options) const override {
    KvCacheShape shape;
    for (const Layer& l : layers_) shape.layers.push_back(l.present ? KvCacheShape::Layer{shape_.kv_heads, shape_.head_dim} : KvCacheShape::Layer{});
    shape.dtype = options.dtype;
    shape.page_slots = options.page_slots;
    return {KvCache(account, std::move(shape)), {}, 0};
  }
  void embed(Context&, std::span<const int32_t> ids, float* hidden) const override {
    for (size_t i = 0; i < ids.size(); ++i)
      std::copy_n(embedding_.begin() + ids[i] * shape_.hidden, shape_.hidden, hidden + static_cast<int64_t>(i) * shape_.hidden);
  }
  void forward_layer(Context& ctx, int layer, float* hidden, int64_t m, std::span<const BatchRows> rows,
                     std::span<LayerObserver* const> observers, int64_t first_token, int64_t call_tokens) override {
    const Layer& l = layers_[static_cast<size_t>(layer)];
    if (!l.present) return;
    const int64_t D = shape_.hidden, q_row = int64_t{shape_.query_heads} * shape_.head_dim, kv_row = int64_t{shape_.kv_heads} * shape_.head_dim;
    std::vector<float> x(static_cast<size_t>(m * D)), q(static_cast<size_t>(m * q_row)), k(static_cast<size_t>(m * kv_row)), v(k.size()),
        mixed(q.size());
    rms_norm(ctx, hidden, m, D, ones_.data(), 1e-6f, x.data());
    linear(ctx, matrix(l.q, q_row, D), x.data(), m, q.data());
    linear(ctx, matrix(l.k, kv_row, D), x.data(), m, k.data());
    linear(ctx, matrix(l.v, kv_row, D), x.data(), m, v.data());
    const std::vector<float> raw = q;
    for (size_t i = 0; i < rows.size(); ++i) {
      const BatchRows& r = rows[i];
      std::vector<float> cos, sin;
      for (int64_t t = 0; t < r.tokens; ++t)
        for (float f : inv_freq_) {
          cos.push_back(std::cos(static_cast<float>(r.first_position + t) * f));
          sin.push_back(std::sin(static_cast<float>(r.first_position + t) * f));
        }
      rope(ctx, q.data() + r.first_row * q_row, r.tokens, shape_.query_heads, shape_.head_dim, cos.data(), sin.data());
      rope(ctx, k.data() + r.first_row * kv_row, r.tokens, shape_.kv_heads, shape_.head_dim, cos.data(), sin.data());
      r.state->kv.append(ctx, layer, k.data() + r.first_row * kv_row, v.data() + r.first_row * kv_row, r.tokens, r.first_position);
      const AttentionSequence sequence{q.data() + r.first_row * q_row, mixed.data() + r.first_row * q_row, r.tokens, r.first_position,
                                       r.state->kv.views(layer)};
      const AttentionShape shape{shape_.query_heads, shape_.kv_heads, l.attention.scale, l.attention.window, 0, 0};
      lacuna::attention(ctx, r.state->kv.layout(layer), shape, {&sequence, 1});
      if (observers[i])
        observers[i]->on_chunk({layer, first_token, r.tokens, call_tokens, r.first_position, raw.data() + r.first_row * q_row,
                                q.data() + r.first_row * q_row, mixed.data() + r.first_row * q_row},
                               *r.state);
      if (l.attention.window > 0) r.state->kv.drop_before(layer, r.first_position + r.tokens - l.attention.window + 1);
    }
    linear(ctx, l.attention.output, mixed.data(), m, hidden, LinearMode::kAccumulate);
  }
  void final_norm(Context& ctx, const float* hidden, int64_t m, float* out) const override {
    rms_norm(ctx, hidden, m, shape_.hidden, ones_.data(), 1e-6f, out);
  }
  void head(Context& ctx, const float* normed, int64_t m, float* logits) const override {
    linear(ctx, matrix(head_, shape_.vocab, shape_.hidden), normed, m, logits);
  }

 private:
  struct Layer {
    std::vector<float> q, k, v, o, row_scale;
    std::vector<BF16> o_bf16;
    std::vector<int8_t> o_int8;
    AttentionLayer attention;
    bool present = true;
  };
  static LinearWeight matrix(const std::vector<float>& w, int64_t rows, int64_t columns) {
    LinearWeight out;
    out.weight = Tensor(w.data(), DType::kF32, {rows, columns});
    return out;
  }
  void store_output(Layer& layer, int64_t rows, int64_t columns) {
    layer.attention.output = matrix(layer.o, rows, columns);
    if (shape_.output_dtype == DType::kBF16) {
      for (float x : layer.o) layer.o_bf16.push_back(to_bf16(x));
      layer.attention.output.weight = Tensor(layer.o_bf16.data(), DType::kBF16, {rows, columns});
    } else if (shape_.output_dtype == DType::kI8) {
      for (int64_t r = 0; r < rows; ++r) {
        float top = 0;
        for (int64_t c = 0; c < columns; ++c) top = std::max(top, std::fabs(layer.o[static_cast<size_t>(r * columns + c)]));
        layer.row_scale.push_back(top / 127);
        for (int64_t c = 0; c < columns; ++c)
          layer.o_int8.push_back(static_cast<int8_t>(std::lround(layer.o[static_cast<size_t>(r * columns + c)] / layer.row_scale.back())));
      }
      layer.attention.output.weight = Tensor(layer.o_int8.data(), DType::kI8, {rows, columns});
      layer.attention.output.row_scale = layer.row_scale.data();
    }
  }

  FakeShape shape_;
  ModelInfo info_;
  std::vector<float> embedding_, head_, ones_, inv_freq_;
  std::vector<Layer> layers_;
};

inline std::vector<int32_t> random_prompt(int64_t tokens, int64_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(vocab));
  return ids;
}

}  // namespace lacuna

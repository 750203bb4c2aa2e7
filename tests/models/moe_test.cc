#include "models/moe.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace lacuna {
namespace {

using Values = std::vector<float>;

Values normals(size_t n, uint32_t seed, double scale = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal(0, scale);
  Values x(n);
  for (float& f : x) f = static_cast<float>(normal(rng));
  return x;
}

LinearWeight matrix(const Values& w, int64_t out, int64_t in) {
  LinearWeight l;
  l.weight = Tensor(w.data(), DType::kF32, {out, in});
  return l;
}

// A layer with random weights, which it owns.
struct Layer {
  Layer(const RouterShape& shape, int64_t f, int shared, uint32_t seed) : f(f) {
    weights.shape = shape;
    const auto d = static_cast<size_t>(shape.hidden), width = static_cast<size_t>(f);
    router = normals(static_cast<size_t>(shape.experts) * d, seed);
    weights.router = router.data();
    for (int e = 0; e < shape.experts + shared; ++e)
      for (int part = 0; part < 3; ++part)
        owned.push_back(normals(width * d, ++seed, 1 / std::sqrt(static_cast<double>(part < 2 ? d : width))));
    for (int e = 0; e < shape.experts + shared; ++e) {
      const Values* at = &owned[static_cast<size_t>(3 * e)];
      (e < shape.experts ? weights.experts : weights.shared)
          .push_back({matrix(at[0], f, shape.hidden), matrix(at[1], f, shape.hidden), matrix(at[2], shape.hidden, f)});
    }
  }
  Layer(const Layer&) = delete;

  // The definition, a token at a time.
  std::vector<double> expert(size_t e, const float* x) const {
    const auto d = static_cast<size_t>(weights.shape.hidden), width = static_cast<size_t>(f);
    const Values &gate = owned[3 * e], &up = owned[3 * e + 1], &down = owned[3 * e + 2];
    std::vector<double> h(width), y(d);
    for (size_t j = 0; j < width; ++j) {
      double g = 0, u = 0;
      for (size_t c = 0; c < d; ++c) {
        g += double{gate[j * d + c]} * x[c];
        u += double{up[j * d + c]} * x[c];
      }
      h[j] = g / (1 + std::exp(-g)) * u;
    }
    for (size_t c = 0; c < d; ++c)
      for (size_t j = 0; j < width; ++j) y[c] += down[c * width + j] * h[j];
    return y;
  }
  std::vector<double> token(const float* x, std::vector<int64_t>* used = nullptr) const {
    const auto d = static_cast<size_t>(weights.shape.hidden), experts = static_cast<size_t>(weights.shape.experts);
    std::vector<double> logit(experts), y(d);
    for (size_t e = 0; e < experts; ++e)
      for (size_t c = 0; c < d; ++c) logit[e] += double{router[e * d + c]} * x[c];
    double total = 0;
    for (double l : logit) total += std::exp(l);
    std::vector<size_t> order(experts);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logit[a] > logit[b]; });
    for (size_t j = 0; j < static_cast<size_t>(weights.shape.top_k); ++j) {
      const size_t e = order[j];
      const double p =
          weights.shape.gate == RouterGate::kSoftmax ? std::exp(logit[e]) / total : 1 / (1 + std::exp(-logit[e]));
      const auto part = expert(e, x);
      for (size_t c = 0; c < d; ++c) y[c] += p * part[c];
      if (used) ++(*used)[e];
    }
    for (size_t s = 0; s < weights.shared.size(); ++s) {
      const auto part = expert(experts + s, x);
      for (size_t c = 0; c < d; ++c) y[c] += part[c];
    }
    return y;
  }

  int64_t f;
  MoeWeights weights;
  Values router;
  std::vector<Values> owned;
};

struct Engine {
  explicit Engine(int threads = 2) : ctx(memory, threads) { ctx.activations = ActivationType::kF32; }
  MemoryAccount memory;
  Context ctx;
  MoeBlock block;
  Values run(const MoeWeights& w, const float* x, int64_t m, const Values& before) {
    Values out = before;
    block.forward(ctx, LayerCall{.row_count = m}, w, x, out.data());
    return out;
  }
  Values run(const MoeWeights& w, const float* x, int64_t m) {
    return run(w, x, m, Values(static_cast<size_t>(m * w.shape.hidden)));
  }
};

TEST(Moe, MatchesTheDefinitionInDouble) {
  EXPECT_TRUE(rc::check([] {
    RouterShape s;
    s.hidden = *rc::gen::inRange(1, 70);
    s.experts = *rc::gen::inRange(1, 12);
    s.top_k = *rc::gen::inRange(1, s.experts + 1);
    s.gate = *rc::gen::element(RouterGate::kSoftmax, RouterGate::kSigmoid);
    const auto m = *rc::gen::inRange<int64_t>(1, 50);
    Layer layer(s, *rc::gen::inRange(1, 90), *rc::gen::inRange(0, 3), *rc::gen::inRange<uint32_t>(0, 1000));
    const auto d = static_cast<size_t>(s.hidden);
    const auto x = normals(static_cast<size_t>(m) * d, 77), before = normals(static_cast<size_t>(m) * d, 78);
    Engine e;
    OpTotals totals;
    e.ctx.trace = &totals;
    e.ctx.layer = 1;
    const Values got = e.run(layer.weights, x.data(), m, before);
    std::vector<int64_t> used(static_cast<size_t>(s.experts));
    for (size_t i = 0; i < static_cast<size_t>(m); ++i) {
      const auto wanted = layer.token(&x[i * d], &used);
      for (size_t c = 0; c < d; ++c)
        RC_ASSERT(std::fabs(got[i * d + c] - before[i * d + c] - wanted[c]) < 2e-5 * (1 + std::fabs(wanted[c])));
    }
    RC_ASSERT(totals.expert_tokens().at(1) == used);
    RC_ASSERT(totals.of(OpKind::kExpert).experts ==
              std::count_if(used.begin(), used.end(), [](int64_t n) { return n > 0; }));
  }));
}

TEST(Moe, ExpertsWithoutTokensAreNotRead) {
  RouterShape s{32, 8, 1, RouterGate::kSoftmax};
  Layer layer(s, 40, 1, 3);
  // Expert 5 always wins, and touching any other ends in NaN, or in a fault at their unmapped weights.
  for (size_t c = 0; c < 32; ++c)
    for (size_t e = 0; e < 8; ++e) layer.router[e * 32 + c] = e == 5 ? 1.0f : -1.0f;
  Values x(32 * 20, 0.5f);
  Engine e;
  const Values whole = e.run(layer.weights, x.data(), 20);
  for (size_t other = 0; other < 8; ++other) {
    if (other == 5) continue;
    layer.weights.experts[other].gate.dense.weight.data = layer.weights.experts[other].up.dense.weight.data =
        reinterpret_cast<const void*>(64);
    layer.weights.experts[other].down.dense.weight.data = reinterpret_cast<const void*>(64);
  }
  OpTotals totals;
  e.ctx.trace = &totals;
  e.ctx.layer = 0;
  EXPECT_EQ(e.run(layer.weights, x.data(), 20), whole);
  EXPECT_EQ(totals.expert_tokens(), (std::vector<std::vector<int64_t>>{{0, 0, 0, 0, 0, 20, 0, 0}}));
  OpTotals twice = totals, none;
  twice += totals;
  twice += none;
  none += twice;
  EXPECT_EQ(none.expert_tokens(), (std::vector<std::vector<int64_t>>{{0, 0, 0, 0, 0, 40, 0, 0}}));
  EXPECT_EQ(none.of(OpKind::kExpert).macs, 2 * totals.of(OpKind::kExpert).macs);
  // Bytes of weights: the router's, and those of one expert and the shared one.
  EXPECT_EQ(totals.total().weight_bytes, 8 * 32 * 4 + 2 * 3 * 32 * 40 * 4);
}

TEST(Moe, OneExpertIsTheDenseFeedForward) {
  Layer layer({48, 1, 1, RouterGate::kSoftmax}, 64, 0, 5);
  const auto x = normals(48 * 30, 6);
  Engine e;
  Values dense(48 * 30);
  feed_forward(e.ctx, LayerCall{.row_count = 30}, layer.weights.experts[0], x.data(), dense.data(), LinearMode::kStore);
  EXPECT_EQ(e.run(layer.weights, x.data(), 30), dense);  // softmax over one expert is exactly 1
}

TEST(Moe, AllExpertsIsTheWholeMixture) {
  Layer layer({24, 6, 6, RouterGate::kSoftmax}, 32, 0, 7);
  const auto x = normals(24, 8);
  Engine e;
  OpTotals totals;
  e.ctx.trace = &totals;
  e.ctx.layer = 0;
  const Values got = e.run(layer.weights, x.data(), 1);
  const auto wanted = layer.token(x.data());
  for (size_t c = 0; c < 24; ++c) EXPECT_NEAR(got[c], wanted[c], 1e-5);
  EXPECT_EQ(totals.expert_tokens()[0], std::vector<int64_t>(6, 1));
}

TEST(Moe, ThreadsDoNotMatterBitForBitAndBatchSplitOnlyRounds) {
  Layer layer({64, 8, 2, RouterGate::kSigmoid}, 96, 1, 9);
  const int64_t m = 90;
  const auto x = normals(static_cast<size_t>(64 * m), 10);
  const Values whole = Engine(1).run(layer.weights, x.data(), m);
  EXPECT_EQ(Engine(3).run(layer.weights, x.data(), m), whole);
  Engine e;
  const auto split = [&](int64_t step) {
    Values parts;
    for (int64_t i = 0; i < m; i += step) {
      const Values part = e.run(layer.weights, x.data() + i * 64, std::min(step, m - i));
      parts.insert(parts.end(), part.begin(), part.end());
    }
    return parts;
  };
  const Values single = split(1);
  // Up to 8 rows a product uses one body: then the split does not matter to the last bit.
  EXPECT_EQ(split(8), single);
  EXPECT_EQ(split(3), single);
  for (const int64_t step : {17, 50}) {
    const Values parts = split(step);
    for (size_t i = 0; i < whole.size(); ++i) ASSERT_NEAR(parts[i], whole[i], 2e-6f * (1 + std::abs(whole[i])));
  }
  for (size_t i = 0; i < whole.size(); ++i) ASSERT_NEAR(single[i], whole[i], 2e-6f * (1 + std::abs(whole[i])));
}

}  // namespace
}  // namespace lacuna

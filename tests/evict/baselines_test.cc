// Each baseline's score against its published formula, with explicit attention and explicit v W_O.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <numeric>

#include "base/error.h"
#include "evict/replay.h"
#include "oracle.h"

namespace lacuna {
namespace {

constexpr int kWindow = 6;

HeadList mean_window(const OracleLayer& o, int window) {
  HeadList out(static_cast<size_t>(o.kv_heads));
  const int64_t rows = std::min<int64_t>(window, o.n);
  for (int g = 0; g < o.kv_heads; ++g)
    for (int64_t i = 0; i < o.n - window; ++i) {
      double sum = 0;
      for (int h = 0; h < o.group; ++h)
        for (int64_t t = o.n - rows; t < o.n; ++t) sum += o.a(g * o.group + h, t, i);
      out[static_cast<size_t>(g)].push_back(sum / static_cast<double>(rows * o.group));
    }
  return out;
}

HeadList snapkv(const OracleLayer& o) {
  HeadList out = mean_window(o, kWindow);
  for (auto& head : out) head = oracle_pool(head, 5);
  return out;
}

HeadList tova(const OracleLayer& o) {
  std::vector<double> shared;
  for (int64_t i = 0; i < o.n - 1; ++i) {
    double sum = 0;
    for (int h = 0; h < o.heads; ++h) sum += o.a(h, o.n - 1, i);
    shared.push_back(sum / o.heads);
  }
  return HeadList(static_cast<size_t>(o.kv_heads), shared);
}

HeadList h2o(const OracleLayer& o) {
  HeadList out(static_cast<size_t>(o.kv_heads));
  for (int g = 0; g < o.kv_heads; ++g)
    for (int64_t i = 0; i < o.n; ++i) {
      double sum = 0;
      for (int h = 0; h < o.group; ++h)
        for (int64_t t = 0; t < o.n; ++t) sum += o.a(g * o.group + h, t, i);
      out[static_cast<size_t>(g)].push_back(sum / o.group / static_cast<double>(o.n - i));
    }
  return out;
}

HeadList keydiff(const OracleLayer& o) {
  HeadList out(static_cast<size_t>(o.kv_heads));
  for (int g = 0; g < o.kv_heads; ++g) {
    const auto norm = [&](int64_t i) {
      double s = 0;
      for (int j = 0; j < o.d; ++j) s += o.k(g, i, j) * o.k(g, i, j);
      return std::sqrt(s);
    };
    std::vector<double> anchor(static_cast<size_t>(o.d), 0.0);
    for (int64_t i = 0; i < o.n; ++i)
      for (int j = 0; j < o.d; ++j) anchor[static_cast<size_t>(j)] += o.k(g, i, j) / norm(i) / static_cast<double>(o.n);
    double length = 0;
    for (double x : anchor) length += x * x;
    for (int64_t i = 0; i < o.n; ++i) {
      double dot = 0;
      for (int j = 0; j < o.d; ++j) dot += o.k(g, i, j) * anchor[static_cast<size_t>(j)];
      out[static_cast<size_t>(g)].push_back(-dot / norm(i) / std::sqrt(length));
    }
  }
  return out;
}

HeadList knorm(const OracleLayer& o) {
  HeadList out(static_cast<size_t>(o.kv_heads));
  for (int g = 0; g < o.kv_heads; ++g)
    for (int64_t i = 0; i < o.n; ++i) {
      double s = 0;
      for (int j = 0; j < o.d; ++j) s += o.k(g, i, j) * o.k(g, i, j);
      out[static_cast<size_t>(g)].push_back(-std::sqrt(s));
    }
  return out;
}

// The rotation matrices of the next positions, averaged entry by entry.
HeadList expected_attention(const OracleLayer& o, std::span<const float> inv_freq, int future) {
  const int d = o.d, half = d / 2;
  std::vector<double> r(static_cast<size_t>(d * d), 0.0);
  for (int t = 0; t < future; ++t)
    for (int j = 0; j < half; ++j) {
      const double angle = static_cast<double>(static_cast<float>(o.n + t) * inv_freq[static_cast<size_t>(j)]);
      r[static_cast<size_t>(j * d + j)] += std::cos(angle) / future;
      r[static_cast<size_t>((j + half) * d + j + half)] += std::cos(angle) / future;
      r[static_cast<size_t>(j * d + j + half)] -= std::sin(angle) / future;
      r[static_cast<size_t>((j + half) * d + j)] += std::sin(angle) / future;
    }
  HeadList out(static_cast<size_t>(o.kv_heads), std::vector<double>(static_cast<size_t>(o.n), 0.0));
  for (int h = 0; h < o.heads; ++h) {
    const int g = h / o.group;
    std::vector<double> mu(static_cast<size_t>(d), 0.0), rotated(mu), sigma(static_cast<size_t>(d * d), 0.0), half_way(sigma), cov(sigma);
    const auto& q = o.queries_raw[static_cast<size_t>(h)];
    const double count = static_cast<double>(o.n - 4);
    for (int64_t t = 4; t < o.n; ++t)
      for (int j = 0; j < d; ++j) mu[static_cast<size_t>(j)] += q[static_cast<size_t>(t * d + j)] / count;
    for (int64_t t = 4; t < o.n; ++t)
      for (int a = 0; a < d; ++a)
        for (int b = 0; b < d; ++b)
          sigma[static_cast<size_t>(a * d + b)] += (q[static_cast<size_t>(t * d + a)] - mu[static_cast<size_t>(a)]) * (q[static_cast<size_t>(t * d + b)] - mu[static_cast<size_t>(b)]) / count;
    for (int a = 0; a < d; ++a)
      for (int b = 0; b < d; ++b) {
        rotated[static_cast<size_t>(a)] += r[static_cast<size_t>(a * d + b)] * mu[static_cast<size_t>(b)];
        for (int c = 0; c < d; ++c) half_way[static_cast<size_t>(a * d + b)] += r[static_cast<size_t>(a * d + c)] * sigma[static_cast<size_t>(c * d + b)];
      }
    for (int a = 0; a < d; ++a)
      for (int b = 0; b < d; ++b)
        for (int c = 0; c < d; ++c) cov[static_cast<size_t>(a * d + b)] += half_way[static_cast<size_t>(a * d + c)] * r[static_cast<size_t>(b * d + c)];
    std::vector<double> e;
    double sum = 0;
    for (int64_t i = 4; i < o.n; ++i) {
      double linear = 0, square = 0;
      for (int a = 0; a < d; ++a) {
        linear += rotated[static_cast<size_t>(a)] * o.k(g, i, a);
        for (int b = 0; b < d; ++b) square += o.k(g, i, a) * cov[static_cast<size_t>(a * d + b)] * o.k(g, i, b);
      }
      e.push_back(std::exp(linear / std::sqrt(d) + square / d / 2));
      sum += e.back();
    }
    for (int64_t i = 4; i < o.n; ++i) {
      double length = 0;
      for (int j = 0; j < d; ++j) length += o.v(g, i, j) * o.v(g, i, j);
      out[static_cast<size_t>(g)][static_cast<size_t>(i)] += e[static_cast<size_t>(i - 4)] / sum * std::sqrt(length) / o.group;
    }
  }
  return out;
}

HeadList cake(const OracleLayer& o, double& preference) {
  HeadList out(static_cast<size_t>(o.kv_heads));
  double entropy = 0, spread = 0;
  for (int g = 0; g < o.kv_heads; ++g) {
    for (int64_t i = 0; i < o.n - kWindow; ++i) {
      double score = 0;
      for (int h = g * o.group; h < (g + 1) * o.group; ++h) {
        double mean = 0, variance = 0;
        for (int64_t t = o.n - kWindow; t < o.n; ++t) {
          mean += o.a(h, t, i) / kWindow;
          entropy -= o.a(h, t, i) * std::log(o.a(h, t, i) + 1e-10);
        }
        for (int64_t t = o.n - kWindow; t < o.n; ++t) variance += (o.a(h, t, i) - mean) * (o.a(h, t, i) - mean) / (kWindow - 1);
        spread += variance;
        score += (mean + 200 * variance) / o.group;
      }
      out[static_cast<size_t>(g)].push_back(score);
    }
    out[static_cast<size_t>(g)] = oracle_pool(out[static_cast<size_t>(g)], 5);
  }
  preference = std::pow(entropy, 1 / 1.6) * std::pow(spread, 1 / 0.4);
  return out;
}

HeadList lava(const OracleLayer& o, double& preference) {
  HeadList out(static_cast<size_t>(o.kv_heads), std::vector<double>(static_cast<size_t>(o.n - kWindow), 0.0));
  double total = 0;
  for (int g = 0; g < o.kv_heads; ++g) {
    double longest = 0;
    for (int64_t i = 0; i < o.n - kWindow; ++i) {
      double length = 0;
      for (int j = 0; j < o.d; ++j) length += std::fabs(o.v(g, i, j));
      longest = std::max(longest, length);
    }
    for (int h = g * o.group; h < (g + 1) * o.group; ++h) {
      std::vector<double> mean;
      for (int64_t i = 0; i < o.n - kWindow; ++i) {
        double sum = 0;
        for (int64_t t = o.n - kWindow; t < o.n; ++t) sum += o.a(h, t, i) / kWindow;
        mean.push_back(sum);
      }
      mean = oracle_pool(mean, 7, true);
      for (size_t i = 0; i < mean.size(); ++i) out[static_cast<size_t>(g)][i] = std::max(out[static_cast<size_t>(g)][i], mean[i] * longest);
    }
    for (double x : out[static_cast<size_t>(g)]) total += x;
  }
  double entropy = 0, count = 0;
  for (const auto& head : out)
    for (double x : head) {
      entropy -= x / total * std::log(x / total + 1e-16);
      ++count;
    }
  preference = entropy / std::log(count);
  return out;
}

// Without the first stage: the worst case, floored at the head's mean, times the share of the value length.
HeadList layer_defensive(const OracleLayer& o) {
  HeadList out(static_cast<size_t>(o.kv_heads), std::vector<double>(static_cast<size_t>(o.n - kWindow), 0.0));
  for (int g = 0; g < o.kv_heads; ++g) {
    auto& head = out[static_cast<size_t>(g)];
    for (int h = g * o.group; h < (g + 1) * o.group; ++h)
      for (int64_t t = o.n - kWindow; t < o.n; ++t) {
        std::vector<double> row;
        for (int64_t i = 0; i < o.n - kWindow; ++i) row.push_back(o.a(h, t, i));
        const auto pooled = oracle_pool(row, 5);
        const double scale = std::accumulate(row.begin(), row.end(), 0.0) / std::accumulate(pooled.begin(), pooled.end(), 0.0);
        for (size_t i = 0; i < row.size(); ++i) head[i] = std::max(head[i], pooled[i] * scale);
      }
    const double mean = std::accumulate(head.begin(), head.end(), 0.0) / static_cast<double>(head.size());
    for (double& x : head) x = std::max(x, mean);
  }
  for (int64_t i = 0; i < o.n - kWindow; ++i) {
    double sum = 0;
    for (int h = 0; h < o.heads; ++h) sum += o.length1(h, i);
    for (int g = 0; g < o.kv_heads; ++g) {
      double own = 0;
      for (int h = g * o.group; h < (g + 1) * o.group; ++h) own += o.length1(h, i);
      out[static_cast<size_t>(g)][static_cast<size_t>(i)] *= own / sum;
    }
  }
  return out;
}

// LagKV's rank of each token in its block; blocks of `lag` after four sinks, the last has no reference.
HeadList lagkv_standard(const OracleLayer& o, int lag) {
  HeadList out(static_cast<size_t>(o.kv_heads), std::vector<double>(static_cast<size_t>(o.n), -1.0));
  const int64_t blocks = (o.n - 4) / lag;
  for (int g = 0; g < o.kv_heads; ++g)
    for (int64_t b = 0; b + 1 < blocks; ++b) {
      const int64_t begin = 4 + b * lag;
      std::vector<double> total(static_cast<size_t>(lag), 0.0);
      for (const bool value : {false, true}) {
        const auto x = [&](int64_t i, int j) { return value ? o.v(g, i, j) : o.k(g, i, j); };
        std::vector<double> spread;
        double sum = 0;
        for (int64_t t = 0; t < lag; ++t) {
          std::vector<double> scaled;
          double mean = 0, variance = 0;
          for (int j = 0; j < o.d; ++j) {
            double low = 1e300, high = -1e300;
            for (int64_t s = 0; s < lag; ++s) {
              low = std::min(low, x(begin + lag + s, j));
              high = std::max(high, x(begin + lag + s, j));
            }
            scaled.push_back((x(begin + t, j) - low) / (high - low));
            mean += scaled.back() / o.d;
          }
          for (double y : scaled) variance += (y - mean) * (y - mean) / (o.d - 1);
          spread.push_back(std::exp(std::sqrt(variance)));
          sum += spread.back();
        }
        for (int64_t t = 0; t < lag; ++t) total[static_cast<size_t>(t)] += spread[static_cast<size_t>(t)] / sum;
      }
      for (int64_t t = 0; t < lag; ++t)
        out[static_cast<size_t>(g)][static_cast<size_t>(begin + t)] =
            static_cast<double>(std::count_if(total.begin(), total.end(), [&](double y) { return y < total[static_cast<size_t>(t)]; })) / lag;
    }
  return out;
}

RC_GTEST_PROP(Baselines, ScoresAreTheFormulas, ()) {
  FakeShape shape;
  shape.layers = *rc::gen::inRange(1, 3);
  shape.kv_heads = *rc::gen::inRange(1, 4);
  shape.query_heads = shape.kv_heads * *rc::gen::inRange(1, 4);
  shape.head_dim = 4 * *rc::gen::inRange(1, 4);
  shape.sharpness = 2;
  const int64_t n = *rc::gen::inRange(22, 80);
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  const int chunk = *rc::gen::inRange(1, 90);
  const std::string w = "window=6";
  const std::vector<std::string> specs = {"snapkv:" + w, "tova", "h2o", "keydiff", "knorm", "expected_attention:future=32",
                                          "cake:tau1=1.6,tau2=0.4," + w, "lava:" + w, "layer_defensive:mass=0," + w, "lagkv:lag=8",
                                          "criticalkv:snapkv:" + w, "adakv:snapkv:" + w, "pyramidkv:" + w};
  MemoryAccount memory;
  Context ctx(memory, *rc::gen::inRange(1, 3));
  ctx.activations = ActivationType::kF32;
  FakeModel model(shape, seed);
  std::vector<std::shared_ptr<const Policy>> policies;
  for (const auto& s : specs) policies.push_back(make_policy(s));
  ScoreBoard board(ctx, model, policies);
  Recorder recorder(model, &board);
  SequenceState state = model.new_state(memory, {});
  prefill(ctx, model, state, random_prompt(n, shape.vocab, seed), &recorder, {.chunk = chunk}, nullptr);

  for (int l = 0; l < shape.layers; ++l) {
    const OracleLayer o = oracle_layer(ctx, model, state, recorder, l);
    double cake_preference = 0, lava_preference = 0;
    const HeadList snap = snapkv(o);
    const std::vector<HeadList> expected = {snap, tova(o), h2o(o), keydiff(o), knorm(o),
                                            expected_attention(o, model.attention(l)->inv_freq, 32), cake(o, cake_preference),
                                            lava(o, lava_preference), layer_defensive(o), {}, snap, snap, snap};
    for (size_t p = 0; p < specs.size(); ++p) {
      if (expected[p].empty()) continue;
      for (int g = 0; g < o.kv_heads; ++g) {
        const auto& found = board.scores(p, l).heads[static_cast<size_t>(g)].score;
        const auto& e = expected[p][static_cast<size_t>(g)];
        RC_ASSERT(found.size() == e.size());
        double size = 0;
        for (double x : e) size = std::max(size, std::fabs(x));
        for (size_t i = 0; i < e.size(); ++i)
          if (!(std::fabs(found[i] - e[i]) <= 3e-4 * std::fabs(e[i]) + 1e-5 * size))
            RC_FAIL(specs[p] + " layer " + std::to_string(l) + " entry " + std::to_string(i) + ": " + std::to_string(found[i]) + " instead of " +
                    std::to_string(e[i]));
      }
    }
    RC_ASSERT(std::fabs(board.scores(6, l).preference - cake_preference) <= 3e-3 * cake_preference);
    RC_ASSERT(std::fabs(board.scores(7, l).preference - lava_preference) <= 1e-4 * lava_preference);
    // CriticalKV's second list.
    for (int g = 0; g < o.kv_heads; ++g)
      for (int64_t i = 0; i < n - kWindow; ++i) {
        double length = 0;
        for (int h = g * o.group; h < (g + 1) * o.group; ++h) length += o.length1(h, i) / o.group;
        const double e = (snap[static_cast<size_t>(g)][static_cast<size_t>(i)] + 1e-4) * length;
        RC_ASSERT(std::fabs(board.scores(10, l).heads[static_cast<size_t>(g)].second[static_cast<size_t>(i)] - e) <= 1e-3 * e);
      }
    const HeadList lag = lagkv_standard(o, 8);
    for (int g = 0; g < o.kv_heads; ++g)
      for (int64_t i = 0; i < n; ++i) {
        const float found = board.scores(9, l).heads[static_cast<size_t>(g)].score[static_cast<size_t>(i)];
        const double e = lag[static_cast<size_t>(g)][static_cast<size_t>(i)];
        if (e < 0)
          RC_ASSERT(found >= 1.0f);
        else
          RC_ASSERT(std::fabs(found - e) <= 1.01 / 8);  // neighbours in rank may differ by rounding only
      }
  }
}

TEST(Baselines, LayerDefensiveFirstStageTakesTheMass) {
  FakeShape shape;
  MemoryAccount memory;
  Context ctx(memory, 1);
  FakeModel model(shape, 7);
  const auto policy = make_policy("layer_defensive:window=6");
  ScoreBoard board(ctx, model, {policy});
  Recorder recorder(model, &board);
  SequenceState state = model.new_state(memory, {});
  prefill(ctx, model, state, random_prompt(60, shape.vocab, 3), &recorder, {}, nullptr);
  const OracleLayer o = oracle_layer(ctx, model, state, recorder, 0);
  const HeadList mean = mean_window(o, kWindow);
  // The share that the authors' code takes off: attention to the six candidates before the window.
  double near = 0;
  for (int h = 0; h < o.heads; ++h)
    for (int64_t t = o.n - kWindow; t < o.n; ++t)
      for (int64_t i = o.n - 2 * kWindow; i < o.n - kWindow; ++i) near += o.a(h, t, i) / kWindow / o.heads;
  LayerScores scores = board.scores(0, 0);
  policy->apply_quota(scores, 10.5);
  for (int g = 0; g < o.kv_heads; ++g) {
    std::vector<size_t> order(mean[static_cast<size_t>(g)].size());
    std::iota(order.begin(), order.end(), size_t{0});
    const auto& m = mean[static_cast<size_t>(g)];
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return m[a] > m[b]; });
    const double total = std::accumulate(m.begin(), m.end(), 0.0);
    double mass = 0;
    size_t taken = 0;
    for (; taken < 10; ++taken) {
      mass += m[order[taken]] / total;
      if (mass >= 0.9 - near) break;
    }
    for (size_t r = 0; r < order.size(); ++r) {
      const float s = scores.heads[static_cast<size_t>(g)].score[order[r]];
      if (r < taken) {
        EXPECT_EQ(s, scores.peak) << "head " << g << " rank " << r;
      }
    }
    EXPECT_GT(taken, 0u);
  }
}

// The replayed attention, from a dense run over context + replay in which everything is kept.
TEST(Baselines, KvzipIsTheLargestReplayedAttention) {
  FakeShape shape;
  shape.layers = 1;  // deeper layers of the replay see chunk boundaries that an explicit oracle would have to copy
  MemoryAccount memory;
  Context ctx(memory, 2);
  ctx.activations = ActivationType::kF32;
  FakeModel model(shape, 11);
  const auto context = random_prompt(45, shape.vocab, 5);
  const std::vector<int32_t> instruction = {3, 1, 4};
  SequenceState state = model.new_state(memory, {});
  prefill(ctx, model, state, context, nullptr, {}, nullptr);
  const size_t before = state.kv.allocated_bytes();
  const auto found = replay_attention(ctx, model, state, context, instruction, {.chunk = 10});
  EXPECT_EQ(state.next_position, 45);
  EXPECT_EQ(state.kv.length(0, 0), 45);
  EXPECT_EQ(state.kv.allocated_bytes(), before);

  std::vector<int32_t> both = context;
  both.insert(both.end(), instruction.begin(), instruction.end());
  both.insert(both.end(), context.begin(), context.end());
  SequenceState dense = model.new_state(memory, {});
  Recorder recorder(model, nullptr);
  prefill(ctx, model, dense, both, &recorder, {}, nullptr);
  const OracleLayer o = oracle_layer(ctx, model, dense, recorder, 0);
  for (int g = 0; g < o.kv_heads; ++g)
    for (int64_t i = 0; i < 45; ++i) {
      double best = 0;
      for (int h = g * o.group; h < (g + 1) * o.group; ++h)
        for (int64_t t = 45; t < o.n; ++t) best = std::max(best, o.a(h, t, i));
      EXPECT_NEAR(found[0][static_cast<size_t>(g)][static_cast<size_t>(i)], best, 1e-5 + 1e-4 * best) << "head " << g << " token " << i;
    }
}

TEST(Baselines, RandomIsSeededAndEven) {
  FakeShape shape;
  MemoryAccount memory;
  Context ctx(memory, 1);
  FakeModel model(shape, 1);
  ScoreBoard board(ctx, model, {make_policy("random"), make_policy("random:seed=0"), make_policy("random:seed=1")});
  SequenceState state = model.new_state(memory, {});
  prefill(ctx, model, state, random_prompt(2000, shape.vocab, 2), &board, {}, nullptr);
  const auto& a = board.scores(0, 0).heads[0].score;
  EXPECT_EQ(a, board.scores(1, 0).heads[0].score);
  EXPECT_NE(a, board.scores(2, 0).heads[0].score);
  EXPECT_NE(a, board.scores(0, 1).heads[0].score);
  EXPECT_NE(a, board.scores(0, 0).heads[1].score);
  double mean = 0;
  for (float x : a) mean += x / static_cast<double>(a.size());
  EXPECT_NEAR(mean, 0.5, 0.03);
}

}  // namespace
}  // namespace lacuna

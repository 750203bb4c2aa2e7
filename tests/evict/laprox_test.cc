// LaProx against explicit attention, explicit v W_O and plain loops, in double, for every switch.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "evict/evictor.h"
#include "oracle.h"

namespace lacuna {
namespace {

struct Switches {
  std::string gqa = "score_mean", pool_at = "score", normalise = "layer_sum", reduce = "l2", value = "projected";
  int kernel = 7, window = 8;
  bool floor = false;
  std::string spec() const {
    return "laprox:gqa=" + gqa + ",pool_at=" + pool_at + ",pool_kernel=" + std::to_string(kernel) + ",normalise=" + normalise +
           ",window_reduce=" + reduce + ",value=" + value + ",window=" + std::to_string(window) + (floor ? ",floor=head_mean" : "");
  }
};

double reduce(const std::vector<double>& column, const std::string& how) {
  double square = 0, sum = 0, top = 0;
  for (double a : column) {
    square += a * a;
    sum += a;
    top = std::max(top, a);
  }
  return how == "l2" ? std::sqrt(square) : how == "mean" ? sum / static_cast<double>(column.size()) : top;
}

HeadList oracle(const OracleLayer& o, const Switches& s) {
  const int64_t candidates = std::max<int64_t>(0, o.n - s.window), rows = std::min<int64_t>(s.window, o.n);
  HeadList out;
  const auto u = [&](int h, int64_t i) { return s.value == "none" ? 1.0 : s.value == "projected" ? o.length2(h, i) : o.length1(h, i); };
  for (int g = 0; g < o.kv_heads; ++g) {
    std::vector<double> p(static_cast<size_t>(candidates), 0.0);
    std::vector<std::vector<double>> c(static_cast<size_t>(o.group));
    std::vector<double> mean_head;
    for (int64_t i = 0; i < candidates; ++i) {
      std::vector<double> mean(static_cast<size_t>(rows), 0.0);
      for (int h = 0; h < o.group; ++h) {
        std::vector<double> column;
        for (int64_t t = o.n - rows; t < o.n; ++t) {
          column.push_back(o.a(g * o.group + h, t, i));
          mean[static_cast<size_t>(t - o.n + rows)] += column.back() / o.group;
        }
        c[static_cast<size_t>(h)].push_back(reduce(column, s.reduce));
      }
      mean_head.push_back(reduce(mean, s.reduce));
    }
    if (s.pool_at == "attention") {
      for (auto& list : c) list = oracle_pool(list, s.kernel);
      mean_head = oracle_pool(mean_head, s.kernel);
    }
    for (int64_t i = 0; i < candidates; ++i) {
      double& score = p[static_cast<size_t>(i)];
      if (s.gqa == "exact") {
        // The matrix that evicting (g, i) removes from the layer's output, entry by entry.
        std::vector<double> lengths;
        for (int64_t t = o.n - rows; t < o.n; ++t) {
          double square = 0;
          for (int64_t x = 0; x < o.hidden; ++x) {
            double entry = 0;
            for (int h = 0; h < o.group; ++h) entry += o.a(g * o.group + h, t, i) * o.pv(g * o.group + h, i, x);
            square += entry * entry;
          }
          lengths.push_back(std::sqrt(square));
        }
        score = reduce(lengths, s.reduce);
      } else if (s.gqa == "attn_mean") {
        for (int h = 0; h < o.group; ++h) score += mean_head[static_cast<size_t>(i)] * u(g * o.group + h, i) / o.group;
      } else {
        for (int h = 0; h < o.group; ++h) {
          const double x = c[static_cast<size_t>(h)][static_cast<size_t>(i)] * u(g * o.group + h, i);
          score = s.gqa == "score_max" ? std::max(score, x) : score + x / o.group;
        }
      }
    }
    if (s.pool_at == "score") p = oracle_pool(p, s.kernel);
    if (s.floor && candidates > 0) {
      const double mean = std::accumulate(p.begin(), p.end(), 0.0) / static_cast<double>(candidates);
      for (double& x : p) x = std::max(x, mean);
    }
    out.push_back(std::move(p));
  }
  double scale = 0;
  if (s.normalise == "none") return out;
  if (s.normalise == "layer_sum") {
    for (const auto& head : out) scale += std::accumulate(head.begin(), head.end(), 0.0);
  } else {
    for (int64_t t = o.n - rows; t < o.n; ++t)
      for (int64_t x = 0; x < o.hidden; ++x) {
        double entry = 0;
        for (int h = 0; h < o.heads; ++h)
          for (int64_t i = 0; i <= t; ++i) entry += o.a(h, t, i) * o.pv(h, i, x);
        scale += entry * entry;
      }
    scale = std::sqrt(scale);
  }
  for (auto& head : out)
    for (double& x : head) x /= scale;
  return out;
}

// What rounding may do to a layer's exact scores, as shares of their sum: at most to one, and to all. Their squares are
// sums of products of values and projections in f32 that may cancel, between heads and where the output is narrow: an
// error in proportion to the terms' square.
struct Rounding {
  double most = 0, all = 0;
};
Rounding exact_rounding(const OracleLayer& o, const Switches& s) {
  constexpr double kSquare = 2e-7;
  Switches plain = s;
  plain.normalise = plain.pool_at = "none";
  const HeadList scores = oracle(o, plain);
  plain.gqa = "score_mean";
  plain.value = "none";
  const HeadList weights = oracle(o, plain);
  double sum = 0;
  Rounding r;
  for (int g = 0; g < o.kv_heads; ++g) {
    const auto first = o.gain.begin() + g * o.group;
    const double gain = *std::max_element(first, first + o.group);
    for (size_t i = 0; i < scores[static_cast<size_t>(g)].size(); ++i) {
      double square = 0;
      for (int j = 0; j < o.d; ++j) square += std::pow(o.v(g, static_cast<int64_t>(i), j), 2);
      const double score = scores[static_cast<size_t>(g)][i];
      const double terms = o.group * weights[static_cast<size_t>(g)][i] * gain * std::sqrt(square);
      const double error = std::min(kSquare * terms * terms / score, std::sqrt(kSquare) * terms);
      sum += score;
      r.all += error;
      r.most = std::max(r.most, error);
    }
  }
  return sum > 0 ? Rounding{r.most / sum, r.all / sum} : Rounding{};
}

std::vector<Switches> all_switches() {
  std::vector<Switches> out;
  for (const char* gqa : {"score_mean", "attn_mean", "exact", "score_max"})
    for (const char* pool : {"score", "attention", "none"})
      for (const char* reduce : {"l2", "mean", "max"}) {
        if (std::string(gqa) == "exact" && std::string(pool) == "attention") continue;
        Switches s;
        s.gqa = gqa;
        s.pool_at = pool;
        s.reduce = reduce;
        out.push_back(s);
      }
  for (const char* normalise : {"none", "output"}) out.push_back({.normalise = normalise});
  for (const char* value : {"projected_l1", "none"}) out.push_back({.value = value});
  out.push_back({.window = 5, .floor = true});
  out.push_back({.kernel = 3, .window = 1});
  return out;
}

FakeShape random_fake(bool rich) {
  FakeShape shape;
  shape.layers = *rc::gen::inRange(1, 4);
  shape.kv_heads = *rc::gen::inRange(1, 4);
  shape.query_heads = shape.kv_heads * *rc::gen::inRange(1, 4);
  shape.head_dim = 4 * *rc::gen::inRange(1, 4);
  shape.hidden = *rc::gen::inRange(1, 40);  // also narrower than a head
  shape.output_dtype = *rc::gen::element(DType::kF32, DType::kBF16, DType::kI8);
  if (rich && *rc::gen::arbitrary<bool>()) {
    for (int l = 0; l < shape.layers; ++l) shape.attention.push_back(l == 0 || *rc::gen::arbitrary<bool>());
  }
  return shape;
}

RC_GTEST_PROP(LaProx, FastPathIsTheOracleForEverySwitch, ()) {
  const FakeShape shape = random_fake(true);
  const int64_t n = *rc::gen::inRange(1, 70);
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  MemoryAccount memory;
  Context ctx(memory, *rc::gen::inRange(1, 3));
  ctx.activations = ActivationType::kF32;
  FakeModel model(shape, seed);
  const auto switches = all_switches();
  std::vector<std::shared_ptr<const Policy>> policies;
  for (const Switches& s : switches) policies.push_back(make_policy(s.spec()));
  ScoreBoard board(ctx, model, policies);
  Recorder recorder(model, &board);
  SequenceState state = model.new_state(memory, {.page_slots = 16});
  prefill(ctx, model, state, random_prompt(n, shape.vocab, seed), &recorder, {.chunk = *rc::gen::inRange(1, 80)}, nullptr);

  for (int l = 0; l < shape.layers; ++l) {
    if (!model.attention(l)) continue;
    const OracleLayer o = oracle_layer(ctx, model, state, recorder, l);
    for (size_t p = 0; p < switches.size(); ++p) {
      const HeadList expected = oracle(o, switches[p]);
      double size = 0;
      for (const auto& head : expected)
        for (double x : head) size = std::max(size, x);
      const bool exact = switches[p].gqa == "exact";
      const Rounding rounding = exact ? exact_rounding(o, switches[p]) : Rounding{};
      for (int g = 0; g < o.kv_heads; ++g) {
        const auto& found = board.scores(p, l).heads[static_cast<size_t>(g)].score;
        RC_ASSERT(found.size() == expected[static_cast<size_t>(g)].size());
        for (size_t i = 0; i < found.size(); ++i) {
          const double e = expected[static_cast<size_t>(g)][i];
          const double tolerance = exact ? std::max(1e-4 * size, rounding.most + e * rounding.all) : 2e-6 * size;
          if (!(std::fabs(found[i] - e) <= 1e-4 * e + tolerance))
            RC_FAIL(switches[p].spec() + " layer " + std::to_string(l) + " entry " + std::to_string(i) + ": " + std::to_string(found[i]) +
                    " instead of " + std::to_string(e));
        }
      }
    }
  }
}

// Scores of the very same floats, put in order by a plain sort, give the kept set.
RC_GTEST_PROP(LaProx, SelectionIsTheSortedList, ()) {
  const FakeShape shape = random_fake(true);
  const int64_t n = *rc::gen::inRange(10, 120);
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  const int window = *rc::gen::inRange(1, 9);
  MemoryAccount memory;
  Context ctx(memory, 1);
  FakeModel model(shape, seed);
  ScoreBoard board(ctx, model, {make_policy("laprox:window=" + std::to_string(window))});
  SequenceState state = model.new_state(memory, {});
  prefill(ctx, model, state, random_prompt(n, shape.vocab, seed), &board, {}, nullptr);
  const int64_t k = *rc::gen::inRange<int64_t>(window, n + 3);
  const auto keep = board.select(0, parse_budget(std::to_string(k)), state.kv);

  std::vector<OracleEntry> entries;
  int64_t heads = 0;
  for (int l = 0; l < shape.layers; ++l)
    for (int g = 0; g < state.kv.kv_heads(l); ++g, ++heads)
      for (int64_t i = 0; i < n - window; ++i)
        entries.push_back({board.scores(0, l).heads[static_cast<size_t>(g)].score[static_cast<size_t>(i)], l, g, i});
  oracle_sort(entries);
  const size_t stay = static_cast<size_t>(std::max<int64_t>(0, heads * (std::min(k, n) - std::min<int64_t>(n, window))));
  RC_ASSERT(stay <= entries.size());
  ScoreBoard::KeepMap expected(static_cast<size_t>(shape.layers));
  for (int l = 0; l < shape.layers; ++l) expected[static_cast<size_t>(l)].resize(static_cast<size_t>(state.kv.kv_heads(l)));
  for (size_t i = 0; i < stay; ++i)
    expected[static_cast<size_t>(entries[i].layer)][static_cast<size_t>(entries[i].head)].push_back(static_cast<int32_t>(entries[i].slot));
  for (auto& layer : expected)
    for (auto& head : layer) {
      for (int64_t i = std::max<int64_t>(0, n - window); i < n; ++i) head.push_back(static_cast<int32_t>(i));
      std::sort(head.begin(), head.end());
    }
  RC_ASSERT(keep == expected);
}

// The named policy is the two switches that it stands for, and its own switches go first.
TEST(LaProx, ExactIsTwoSwitches) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  FakeModel model(FakeShape{}, 5);
  ScoreBoard board(ctx, model, {make_policy("laprox_exact:window=8"), make_policy("laprox:gqa=exact,normalise=none,window=8"),
                                make_policy("laprox_exact:gqa=score_mean,normalise=layer_sum,window=8"), make_policy("laprox:window=8")});
  SequenceState state = model.new_state(memory, {});
  prefill(ctx, model, state, random_prompt(80, FakeShape{}.vocab, 5), &board, {}, nullptr);
  for (int l = 0; l < FakeShape{}.layers; ++l)
    for (size_t g = 0; g < board.scores(0, l).heads.size(); ++g) {
      EXPECT_EQ(board.scores(0, l).heads[g].score, board.scores(1, l).heads[g].score);
      EXPECT_EQ(board.scores(2, l).heads[g].score, board.scores(3, l).heads[g].score);
      EXPECT_NE(board.scores(0, l).heads[g].score, board.scores(3, l).heads[g].score);
    }
}

// What evicting costs is at most Z (1 - kept share), where the score is the bound's own summand.
RC_GTEST_PROP(LaProx, LossIsBelowTheBound, ()) {
  const FakeShape shape = random_fake(false);
  const int64_t n = *rc::gen::inRange(20, 90);
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  MemoryAccount memory;
  Context ctx(memory, 1);
  ctx.activations = ActivationType::kF32;
  FakeModel model(shape, seed);
  const std::string gqa = *rc::gen::element<std::string>("score_mean", "exact");
  ScoreBoard board(ctx, model, {make_policy("laprox:window=8,pool_at=none,gqa=" + gqa)}, nullptr, true);
  SequenceState state = model.new_state(memory, {});
  const auto prompt = random_prompt(n, shape.vocab, seed);
  prefill(ctx, model, state, prompt, &board, {}, nullptr);
  EvictionReport report;
  board.select(0, parse_budget(std::to_string(*rc::gen::inRange(8, 20))), state.kv, &report);

  Evictor evictor(ctx, model, make_policy("laprox:window=8,pool_at=none,gqa=" + gqa), parse_budget(report.budget), {.measure_error = true});
  SequenceState evicted = model.new_state(memory, {});
  prefill(ctx, model, evicted, prompt, &evictor, {}, nullptr);
  const EvictionReport measured = evictor.report(evicted);
  RC_ASSERT(report.layers.size() == static_cast<size_t>(shape.layers));
  for (size_t l = 0; l < report.layers.size(); ++l) {
    const LayerReport& r = report.layers[l];
    RC_ASSERT(r.error_plain >= 0);
    RC_ASSERT(r.error_plain <= r.bound * 1.001 + 1e-4 * r.output_norm);
    RC_ASSERT(std::fabs(measured.layers[l].error - r.error) <= 1e-3 * (r.output_norm + r.error));
    RC_ASSERT(std::fabs(measured.layers[l].bound - r.bound) <= 1e-4 * r.bound + 1e-6);
  }
}

}  // namespace
}  // namespace lacuna

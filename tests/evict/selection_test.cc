// The selection against plain sorting, one-shot against streaming, for every rule.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "base/error.h"
#include "evict/selection.h"
#include "oracle.h"

namespace lacuna {
namespace {

struct Case {
  SelectionRule rule;
  BudgetPlan plan;
  CacheSizes sizes;
  std::vector<LayerScores> scores;
  int64_t candidates() const { return sizes.slots() - sizes.protected_slots(rule.window); }
};

// Scores from a few values only, so that ties are everywhere.
Case random_case(Scope scope, bool ragged) {
  Case c;
  c.rule.scope = scope;
  c.rule.window = *rc::gen::inRange(0, 5);
  const int layers = *rc::gen::inRange(1, 6);
  const int levels = *rc::gen::element(2, 6, 1000000);
  const int64_t common = *rc::gen::inRange(0, 40);
  c.sizes.length.resize(static_cast<size_t>(layers));
  c.scores.resize(static_cast<size_t>(layers));
  for (int l = 0; l < layers; ++l) {
    const int heads = l == 1 ? *rc::gen::inRange(0, 3) : *rc::gen::inRange(1, 4);
    for (int h = 0; h < heads; ++h) {
      const int64_t length = ragged ? *rc::gen::inRange(0, 40) : common;
      c.sizes.length[static_cast<size_t>(l)].push_back(length);
      HeadScores head;
      for (int64_t i = 0; i < length - c.rule.window; ++i) {
        head.slot.push_back(static_cast<int32_t>(i));
        head.position.push_back(static_cast<int32_t>(i));
        head.score.push_back(static_cast<float>(*rc::gen::inRange(0, levels)) / static_cast<float>(levels));
        head.second.push_back(static_cast<float>(*rc::gen::inRange(0, levels)));
      }
      c.scores[static_cast<size_t>(l)].heads.push_back(std::move(head));
    }
    c.scores[static_cast<size_t>(l)].preference = *rc::gen::inRange(0, 100);
  }
  c.plan.evict = true;
  c.plan.keep = *rc::gen::inRange<int64_t>(0, c.candidates() + 1);
  return c;
}

Selection run(const Case& c, bool streaming) {
  Selection s(c.rule, c.plan, c.sizes);
  int last = 0;
  for (size_t l = 0; l < c.sizes.length.size(); ++l)
    if (!c.sizes.length[l].empty()) last = static_cast<int>(l);
  for (int l = 0; l <= last; ++l) {
    if (c.sizes.length[static_cast<size_t>(l)].empty()) continue;
    s.add_layer(l, c.scores[static_cast<size_t>(l)]);
    if (streaming || l == last) s.shrink(l == last);
  }
  return s;
}

std::vector<std::vector<std::vector<int32_t>>> slots(const Case& c, const Selection& s) {
  std::vector<std::vector<std::vector<int32_t>>> out(c.sizes.length.size());
  for (size_t l = 0; l < out.size(); ++l)
    for (size_t h = 0; h < c.sizes.length[l].size(); ++h) out[l].push_back(s.layer(static_cast<int>(l)).heads[h].slot);
  return out;
}

int64_t count(const std::vector<std::vector<std::vector<int32_t>>>& kept) {
  int64_t n = 0;
  for (const auto& layer : kept)
    for (const auto& head : layer) n += static_cast<int64_t>(head.size());
  return n;
}

std::vector<OracleEntry> entries_of(const Case& c, int layer, int head) {
  std::vector<OracleEntry> out;
  const auto& scores = c.scores[static_cast<size_t>(layer)].heads[static_cast<size_t>(head)];
  for (size_t i = 0; i < scores.score.size(); ++i)
    out.push_back({scores.slot[i] < c.rule.sinks ? std::numeric_limits<double>::infinity() : static_cast<double>(scores.score[i]), layer,
                   head, scores.slot[i]});
  return out;
}

void take(std::vector<std::vector<std::vector<int32_t>>>& kept, std::vector<OracleEntry> entries, int64_t n) {
  oracle_sort(entries);
  for (int64_t i = 0; i < std::min(n, static_cast<int64_t>(entries.size())); ++i)
    kept[static_cast<size_t>(entries[static_cast<size_t>(i)].layer)][static_cast<size_t>(entries[static_cast<size_t>(i)].head)].push_back(
        static_cast<int32_t>(entries[static_cast<size_t>(i)].slot));
}

std::vector<std::vector<std::vector<int32_t>>> empty(const Case& c) {
  std::vector<std::vector<std::vector<int32_t>>> out(c.sizes.length.size());
  for (size_t l = 0; l < out.size(); ++l) out[l].resize(c.sizes.length[l].size());
  return out;
}

void in_order(std::vector<std::vector<std::vector<int32_t>>>& kept) {
  for (auto& layer : kept)
    for (auto& head : layer) std::sort(head.begin(), head.end());
}

RC_GTEST_PROP(Selection, ModelWideIsTheSortedListAndStreams, ()) {
  Case c = random_case(Scope::kModel, *rc::gen::arbitrary<bool>());
  const int64_t heads = c.sizes.heads();
  c.rule.sinks = *rc::gen::inRange(0, 3);
  c.plan.keep = std::max(c.plan.keep, std::min(c.candidates(), heads * c.rule.sinks));
  auto expected = empty(c);
  std::vector<OracleEntry> all;
  for (size_t l = 0; l < c.sizes.length.size(); ++l)
    for (size_t h = 0; h < c.sizes.length[l].size(); ++h)
      for (const OracleEntry& e : entries_of(c, static_cast<int>(l), static_cast<int>(h))) all.push_back(e);
  take(expected, all, c.plan.keep);
  in_order(expected);
  RC_ASSERT(slots(c, run(c, false)) == expected);
  RC_ASSERT(slots(c, run(c, true)) == expected);
}

RC_GTEST_PROP(Selection, EveryRuleStreamsToItsOneShotSetAndKeepsExactlyK, ()) {
  Case c = random_case(*rc::gen::element(Scope::kHead, Scope::kLayer, Scope::kModel), *rc::gen::arbitrary<bool>());
  c.rule.share = *rc::gen::element(LayerShare::kEven, LayerShare::kPyramid, LayerShare::kMeasured);
  c.rule.guarantee = *rc::gen::element(0.0, 0.2, 1.0);
  c.rule.first_stage = *rc::gen::element(1.0, 0.5, 0.0);
  const auto once = slots(c, run(c, false));
  RC_ASSERT(count(once) == c.plan.keep);
  if (c.rule.streams()) RC_ASSERT(slots(c, run(c, true)) == once);
}

// Layer budgets that are only known in the end: what an earlier layer is given meanwhile is never too little.
RC_GTEST_PROP(Selection, MeasuredBudgetsStream, ()) {
  Case c = random_case(*rc::gen::element(Scope::kHead, Scope::kLayer), *rc::gen::arbitrary<bool>());
  c.rule.share = LayerShare::kMeasured;
  for (LayerScores& layer : c.scores) layer.preference = *rc::gen::element(0.0, 0.01, 1.0, 1.0, 2.5);
  const auto once = slots(c, run(c, false));
  RC_ASSERT(count(once) == c.plan.keep);
  RC_ASSERT(slots(c, run(c, true)) == once);
}

RC_GTEST_PROP(Selection, HeadsOfEqualLengthShareEvenly, ()) {
  Case c = random_case(Scope::kHead, false);
  const int64_t heads = c.sizes.heads();
  RC_PRE(heads > 0);
  auto expected = empty(c);
  int64_t index = 0;
  for (size_t l = 0; l < c.sizes.length.size(); ++l)
    for (size_t h = 0; h < c.sizes.length[l].size(); ++h, ++index)
      take(expected, entries_of(c, static_cast<int>(l), static_cast<int>(h)), c.plan.keep / heads + (index < c.plan.keep % heads));
  in_order(expected);
  RC_ASSERT(slots(c, run(c, true)) == expected);
}

RC_GTEST_PROP(Selection, LayersCompareTheirHeadsAndGuaranteeAShare, ()) {
  Case c = random_case(Scope::kLayer, false);
  c.rule.guarantee = *rc::gen::element(0.0, 0.2, 0.5);
  // As many entries as divide evenly, so that the layer budgets are plain.
  const int64_t heads = c.sizes.heads();
  RC_PRE(heads > 0);
  c.plan.keep -= c.plan.keep % heads;
  const int64_t each = c.plan.keep / heads;
  const int64_t safe = static_cast<int64_t>(c.rule.guarantee * static_cast<double>(each));
  auto expected = empty(c);
  for (size_t l = 0; l < c.sizes.length.size(); ++l) {
    std::vector<OracleEntry> layer;
    for (size_t h = 0; h < c.sizes.length[l].size(); ++h) {
      auto head = entries_of(c, static_cast<int>(l), static_cast<int>(h));
      oracle_sort(head);
      for (int64_t i = 0; i < static_cast<int64_t>(head.size()); ++i) {
        if (i < safe) head[static_cast<size_t>(i)].score = std::numeric_limits<double>::infinity();
        layer.push_back(head[static_cast<size_t>(i)]);
      }
    }
    take(expected, layer, each * static_cast<int64_t>(c.sizes.length[l].size()));
  }
  in_order(expected);
  RC_ASSERT(slots(c, run(c, true)) == expected);
}

RC_GTEST_PROP(Selection, SecondStageFillsEachHeadsOtherHalf, ()) {
  Case c = random_case(*rc::gen::element(Scope::kHead, Scope::kModel), false);
  const auto counts = slots(c, run(c, false));
  c.rule.first_stage = 0.5;
  auto expected = empty(c);
  for (size_t l = 0; l < counts.size(); ++l)
    for (size_t h = 0; h < counts[l].size(); ++h) {
      const int64_t n = static_cast<int64_t>(counts[l][h].size());
      auto first = entries_of(c, static_cast<int>(l), static_cast<int>(h));
      oracle_sort(first);
      std::vector<OracleEntry> rest;
      for (int64_t i = 0; i < static_cast<int64_t>(first.size()); ++i) {
        OracleEntry e = first[static_cast<size_t>(i)];
        e.score = i < n / 2 ? std::numeric_limits<double>::infinity()
                            : static_cast<double>(c.scores[l].heads[h].second[static_cast<size_t>(e.slot)]);
        rest.push_back(e);
      }
      take(expected, rest, n);
    }
  in_order(expected);
  RC_ASSERT(slots(c, run(c, false)) == expected);
}

RC_GTEST_PROP(Selection, MassKeepsTheShortestListThatReachesIt, ()) {
  Case c = random_case(Scope::kModel, *rc::gen::arbitrary<bool>());
  c.plan.by_mass = true;
  c.plan.mass = *rc::gen::element(0.3, 0.9, 0.99, 1.0);
  const Selection s = run(c, true);
  const auto kept = slots(c, s);
  for (size_t l = 0; l < kept.size(); ++l) {
    std::vector<OracleEntry> all;
    double total = 0;
    for (size_t h = 0; h < kept[l].size(); ++h)
      for (const OracleEntry& e : entries_of(c, static_cast<int>(l), static_cast<int>(h))) {
        all.push_back(e);
        total += e.score;
      }
    oracle_sort(all);
    double mass = 0;
    int64_t n = 0;
    while (n < static_cast<int64_t>(all.size()) && mass < c.plan.mass * total) mass += all[static_cast<size_t>(n++)].score;
    auto expected = empty(c);
    take(expected, all, n);
    in_order(expected);
    RC_ASSERT(kept[l] == expected[l]);
    RC_ASSERT(s.kept_share(static_cast<int>(l)) >= c.plan.mass - 1e-9);
  }
}

std::vector<int64_t> pyramid(int64_t length, int64_t mean, int layers = 5, int window = 0, bool holds_window = false) {
  SelectionRule rule;
  rule.window = window;
  rule.pyramid_holds_window = holds_window;
  rule.scope = Scope::kHead;
  rule.share = LayerShare::kPyramid;
  CacheSizes sizes;
  sizes.length.assign(static_cast<size_t>(layers), {length, length});
  BudgetPlan plan;
  plan.keep = layers * 2 * mean;
  Selection s(rule, plan, sizes);
  HeadScores head;
  for (int i = 0; i < length - window; ++i) {
    head.slot.push_back(i);
    head.position.push_back(i);
    head.score.push_back(1);
  }
  LayerScores scores;
  scores.heads = {head, head};
  std::vector<int64_t> kept;
  for (int l = 0; l < layers; ++l) {
    s.add_layer(l, scores);
    s.shrink(l == layers - 1);
  }
  for (int l = 0; l < layers; ++l) kept.push_back(static_cast<int64_t>(s.layer(l).heads[0].slot.size()));
  return kept;
}

TEST(Selection, PyramidFallsLinearlyWithDepth) {
  // Mean 100, beta 20: 195 at the bottom, 5 at the top.
  const std::vector<int64_t> found = pyramid(1000, 100), expected = {195, 148, 100, 52, 5};
  for (size_t l = 0; l < 5; ++l) EXPECT_NEAR(static_cast<double>(found[l]), static_cast<double>(expected[l]), 1) << l;
  // The first layer cannot hold more than it has: the slope gives way, the mean stays.
  EXPECT_EQ(pyramid(1000, 600), (std::vector<int64_t>{1000, 800, 600, 400, 200}));
}

// PyramidKVPress.get_layer_budget: slots of a layer, the window among them.
double kvpress_budget(int layer, int layers, double n, double k, double window, double beta) {
  double least = k / beta, most = 2 * k - least;
  if (most >= n - window) {
    most = n - window;
    least = 2 * k - most;
  }
  if (!(n >= most && most >= least && least >= window)) return k;
  return most - layer * (most - least) / (layers - 1);
}

TEST(Selection, PyramidFollowsKvpressOnRequest) {
  EXPECT_TRUE(rc::check([] {
    const int layers = *rc::gen::inRange(2, 12), window = *rc::gen::element(0, 8, 32, 64);
    const auto length = *rc::gen::inRange<int64_t>(200, 3000);
    const auto mean = *rc::gen::inRange<int64_t>(1, (length - window) * 9 / 10);
    const auto found = pyramid(length, mean, layers, window, true);
    for (int l = 0; l < layers; ++l) {
      const double expected = kvpress_budget(l, layers, static_cast<double>(length), static_cast<double>(mean + window),
                                             window, 20) -
                              window;
      // Whole slots, and no more than the candidates there are: what is over goes to the other layers.
      if (expected <= static_cast<double>(length - window))
        RC_ASSERT(std::abs(static_cast<double>(found[static_cast<size_t>(l)]) - expected) <= 1.0);
    }
  }));
  // docs/policies.md: nine layers, 4096 tokens, 5 %, a window of 32 (205 slots a head).
  const std::vector<int64_t> original = pyramid(4096, 173, 9, 32), kvpress = pyramid(4096, 173, 9, 32, true);
  EXPECT_EQ(kvpress, std::vector<int64_t>(9, 173));
  EXPECT_NEAR(static_cast<double>(original.front()), 337, 1);
  EXPECT_NEAR(static_cast<double>(original.back()), 9, 1);
}

TEST(Selection, NanGoesFirst) {
  SelectionRule rule;
  CacheSizes sizes;
  sizes.length = {{3}};
  BudgetPlan plan;
  plan.keep = 2;
  Selection s(rule, plan, sizes);
  LayerScores scores;
  scores.heads.push_back({{0, 1, 2}, {0, 1, 2}, {NAN, 0.0f, 1.0f}, {}, {}});
  s.add_layer(0, scores);
  s.shrink(true);
  EXPECT_EQ(s.layer(0).heads[0].slot, (std::vector<int32_t>{1, 2}));
}

}  // namespace
}  // namespace lacuna

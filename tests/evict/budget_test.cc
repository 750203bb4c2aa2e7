#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "base/error.h"
#include "evict/budget.h"

namespace lacuna {
namespace {

TEST(Budget, ReadsEveryForm) {
  using Kind = Budget::Kind;
  const std::tuple<const char*, Kind, double> forms[] = {
      {"256", Kind::kTokens, 256},          {"5%", Kind::kFraction, 0.05},        {"2.5%", Kind::kFraction, 0.025},
      {"100%", Kind::kFraction, 1},         {"0.05", Kind::kFraction, 0.05},      {"64MiB", Kind::kBytes, 64.0 * 1048576},
      {"1.5 KiB", Kind::kBytes, 1536},      {"2GB", Kind::kBytes, 2e9},           {"4096B", Kind::kBytes, 4096},
      {"mass:0.99", Kind::kMass, 0.99},     {"mass:1", Kind::kMass, 1},           {"1.0", Kind::kFraction, 1},
  };
  for (const auto& [text, kind, value] : forms) {
    const Budget b = parse_budget(text);
    EXPECT_EQ(b.kind, kind) << text;
    EXPECT_DOUBLE_EQ(b.value, value) << text;
    EXPECT_EQ(b.text, text);
  }
}

TEST(Budget, RefusesNonsense) {
  for (const char* text : {"", "-1", "0", "0%", "-5%", "101%", "1.5", "nan", "inf", "mass:", "mass:0", "mass:1.01", "mass:x", "5 %%", "MiB",
                           "-3MiB", "12XiB", "1e30", "0x10", "5%5", "0.0", "99999999999999999999", "1e3", "0B", " 5"})
    EXPECT_THROW(parse_budget(text), BadInput) << text;
}

KvCacheShape shape_of(int layers, int heads, int page_slots = 16) {
  KvCacheShape shape;
  shape.layers.assign(static_cast<size_t>(layers), {heads, 8});
  shape.page_slots = page_slots;
  return shape;
}

CacheSizes even(int layers, int heads, int64_t length) {
  CacheSizes sizes;
  sizes.length.assign(static_cast<size_t>(layers), std::vector<int64_t>(static_cast<size_t>(heads), length));
  return sizes;
}

SelectionRule window_rule(int window, bool counts = true, int sinks = 0) {
  SelectionRule rule;
  rule.window = window;
  rule.counts_window = counts;
  rule.sinks = sinks;
  return rule;
}

TEST(Budget, CountsTheWindowOrNot) {
  const auto shape = shape_of(3, 2);
  BudgetPlan plan = plan_budget(parse_budget("40"), window_rule(32), shape, even(3, 2, 128));
  EXPECT_TRUE(plan.evict);
  EXPECT_EQ(plan.keep, 6 * (40 - 32));
  EXPECT_EQ(plan.target, 6 * 40);
  plan = plan_budget(parse_budget("40"), window_rule(32, false), shape, even(3, 2, 128));
  EXPECT_EQ(plan.keep, 6 * 40);
  plan = plan_budget(parse_budget("50%"), window_rule(32), shape, even(3, 2, 128));
  EXPECT_EQ(plan.keep, 6 * (64 - 32));
  plan = plan_budget(parse_budget("5%"), window_rule(2), shape, even(3, 2, 130));
  EXPECT_EQ(plan.keep, 39 - 6 * 2);  // 5 % of 780 entries
}

TEST(Budget, CoveringThePromptEvictsNothing) {
  const auto shape = shape_of(2, 2);
  for (const char* text : {"128", "1000000", "100%", "1.0", "1GiB", "mass:1"})
    EXPECT_FALSE(plan_budget(parse_budget(text), window_rule(32), shape, even(2, 2, 128)).evict) << text;
  // Nor does any budget when the prompt is no longer than the window.
  for (const char* text : {"1", "5%", "1KiB", "mass:0.5"})
    EXPECT_FALSE(plan_budget(parse_budget(text), window_rule(32), shape, even(2, 2, 32)).evict) << text;
}

TEST(Budget, BelowTheWindowIsRefused) {
  const auto shape = shape_of(2, 2);
  for (const char* text : {"31", "10%", "2KiB"})
    EXPECT_THROW(plan_budget(parse_budget(text), window_rule(32), shape, even(2, 2, 128)), BadInput) << text;
  EXPECT_NO_THROW(plan_budget(parse_budget("32"), window_rule(32), shape, even(2, 2, 128)));
  EXPECT_THROW(plan_budget(parse_budget("35"), window_rule(32, true, 4), shape, even(2, 2, 128)), BadInput);
  EXPECT_NO_THROW(plan_budget(parse_budget("36"), window_rule(32, true, 4), shape, even(2, 2, 128)));
}

TEST(Budget, MassNeedsScoresThatAddUp) {
  SelectionRule rule = window_rule(4);
  rule.non_negative = false;
  EXPECT_THROW(plan_budget(parse_budget("mass:0.9"), rule, shape_of(1, 1), even(1, 1, 64)), BadInput);
}

RC_GTEST_PROP(Budget, BytesBoundHoldsForEverySpread, ()) {
  const int layers = *rc::gen::inRange(1, 5), heads = *rc::gen::inRange(1, 4), page = *rc::gen::element(1, 7, 16, 32);
  const auto shape = shape_of(layers, heads, page);
  CacheSizes sizes = even(layers, heads, 0);
  for (auto& layer : sizes.length)
    for (int64_t& n : layer) n = *rc::gen::inRange(0, 100);
  RC_ASSERT(bytes_of(shape, sizes) <= bytes_bound(shape, sizes.slots()));
}

RC_GTEST_PROP(Budget, BytesBudgetIsTheLargestThatFits, ()) {
  const int layers = *rc::gen::inRange(1, 5), heads = *rc::gen::inRange(1, 4);
  const auto shape = shape_of(layers, heads, *rc::gen::element(4, 16));
  const CacheSizes sizes = even(layers, heads, *rc::gen::inRange(8, 300));
  const int64_t bytes = *rc::gen::inRange<int64_t>(1, static_cast<int64_t>(bytes_of(shape, sizes)) + 1000);
  try {
    const BudgetPlan plan = plan_budget(parse_budget(std::to_string(bytes) + "B"), window_rule(4), shape, sizes);
    if (!plan.evict) {
      RC_ASSERT(bytes_of(shape, sizes) <= static_cast<size_t>(bytes) || plan.target >= sizes.slots());
      return;
    }
    const int64_t total = plan.keep + sizes.protected_slots(4);
    RC_ASSERT(bytes_bound(shape, total) <= static_cast<size_t>(bytes));
    RC_ASSERT(bytes_bound(shape, total + 1) > static_cast<size_t>(bytes));
  } catch (const BadInput&) {
    RC_ASSERT(bytes_bound(shape, sizes.protected_slots(4)) > static_cast<size_t>(bytes));
  }
}

TEST(Budget, HardLimitRefusesBeforeAnythingRuns) {
  const auto shape = shape_of(4, 2);
  const CacheSizes sizes = even(4, 2, 320);
  const size_t layer = bytes_of(shape, even(1, 2, 320)), kept = bytes_bound(shape, 8 * 64);
  KvLimit limit;
  limit.bytes = kept + layer;
  const BudgetPlan plan = plan_budget(parse_budget("64"), window_rule(32), shape, sizes, limit);
  EXPECT_LE(plan.peak_bytes, limit.bytes);
  limit.bytes = kept + layer - 1;
  EXPECT_THROW(plan_budget(parse_budget("64"), window_rule(32), shape, sizes, limit), OutOfMemory);
  // Rules that cannot stream hold the dense cache for a moment.
  limit.bytes = kept + layer;
  limit.streaming = false;
  EXPECT_THROW(plan_budget(parse_budget("64"), window_rule(32), shape, sizes, limit), OutOfMemory);
  // A budget in bytes adapts to the limit instead, as long as the windows fit.
  limit.streaming = true;
  const Budget all = parse_budget(std::to_string(limit.bytes) + "B");
  const BudgetPlan fitted = plan_budget(all, window_rule(32), shape, sizes, limit);
  EXPECT_LE(fitted.peak_bytes, limit.bytes);
  EXPECT_GE(fitted.keep, 8 * (64 - 32));
  limit.growth = 64;
  EXPECT_LE(plan_budget(all, window_rule(32), shape, sizes, limit).peak_bytes, limit.bytes);
  limit.used_elsewhere = limit.bytes;
  EXPECT_THROW(plan_budget(all, window_rule(32), shape, sizes, limit), OutOfMemory);
}

}  // namespace
}  // namespace lacuna

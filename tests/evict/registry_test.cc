#include <gtest/gtest.h>

#include "base/error.h"
#include "evict/policy.h"

namespace lacuna {
namespace {

TEST(Registry, EveryNameMakesAPolicy) {
  for (const std::string& name : policy_names()) {
    const auto policy = make_policy(name);
    EXPECT_EQ(policy->name().substr(0, policy->name().find(':')), name);
    EXPECT_EQ(make_policy(policy->name())->name(), policy->name());
  }
  EXPECT_GE(policy_names().size(), 18u);
}

TEST(Registry, SwitchesAndBases) {
  EXPECT_EQ(make_policy("laprox:gqa=exact,pool_at=none,window=64")->rule().window, 64);
  EXPECT_EQ(make_policy("laprox:sinks=4,budget_counts_window=false")->rule().sinks, 4);
  EXPECT_FALSE(make_policy("laprox:sinks=4,budget_counts_window=false")->rule().counts_window);
  EXPECT_EQ(make_policy("adakv")->name(), "adakv:snapkv");
  EXPECT_EQ(make_policy("criticalkv:adakv:snapkv:window=64")->rule().window, 64);
  EXPECT_EQ(make_policy("criticalkv:adakv:snapkv")->rule().scope, Scope::kLayer);
  EXPECT_EQ(make_policy("adakv:guarantee=0.3:laprox:gqa=exact")->rule().guarantee, 0.3);
  EXPECT_EQ(make_policy("adakv:pyramidkv")->rule().share, LayerShare::kPyramid);
  EXPECT_FALSE(make_policy("pyramidkv")->rule().pyramid_holds_window);
  EXPECT_TRUE(make_policy("pyramidkv:rule=kvpress")->rule().pyramid_holds_window);
}

TEST(Registry, ErrorsNameWhatIsAllowed) {
  const std::pair<const char*, const char*> wrong[] = {
      {"", "laprox"},
      {"lap", "laprox"},
      {"laprox:gqa=mean", "score_mean"},
      {"laprox:gpa=exact", "pool_at"},
      {"laprox:window=0", "from 1"},
      {"laprox:window=x", "whole number"},
      {"laprox:window=8,window=9", "twice"},
      {"laprox:pool_kernel=4", "odd"},
      {"laprox:exact", "key=value"},
      {"laprox:gqa=exact,pool_at=attention", "attention"},
      {"laprox:budget_counts_window=maybe", "true"},
      {"knorm:window=3", "no switches"},
      {"adakv:guarantee=2:snapkv", "from 0 to 1"},
      {"adakv:nothing", "nothing"},
      {"criticalkv:criticalkv:snapkv", "two stages"},
      {"criticalkv:layer_defensive", "two stages"},
      {"snapkv:adakv", "stands on no other"},
  };
  for (const auto& [spec, hint] : wrong) {
    try {
      make_policy(spec);
      ADD_FAILURE() << spec << " was accepted";
    } catch (const BadInput& e) {
      EXPECT_NE(std::string(e.what()).find(hint), std::string::npos) << spec << ": " << e.what();
    }
  }
}

}  // namespace
}  // namespace lacuna

#include "formats/spikingbrain_moe_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace lacuna {
namespace {

using Json = nlohmann::json;

// The 76B model as the report describes it.
Json whole() {
  return {{"model_type", "spikingbrain_moe"},
          {"vocab_size", 152064},
          {"hidden_size", 3584},
          {"intermediate_size", 18944},
          {"num_hidden_layers", 28},
          {"num_attention_heads", 28},
          {"num_key_value_heads", 4},
          {"max_position_embeddings", 131072},
          {"rope_theta", 1000000.0},
          {"sliding_window", 4096},
          {"num_sink_tokens", 128},
          {"num_experts", 16},
          {"num_experts_per_tok", 1},
          {"num_shared_experts", 1},
          {"dense_layers", {0, 1, 2, 4, 6, 8, 10}}};
}

SpikingBrainMoeConfig parse(const Json& json) {
  return parse_spikingbrain_moe_config(ConfigFile::parse(json.dump(), "dir/config.json"));
}

TEST(SpikingBrainMoeConfig, TheReportsModel) {
  const SpikingBrainMoeConfig m = parse(whole());
  EXPECT_EQ(m.head_dim, 128);
  EXPECT_EQ(m.kv_heads, 4);
  EXPECT_TRUE(m.qkv_bias);
  for (int i = 0; i < 28; ++i) EXPECT_EQ(m.layer_window[static_cast<size_t>(i)], (i + 1) % 7 == 0 ? 0 : 4096) << i;
  int dense = 0;
  for (int i = 0; i < 28; ++i) dense += m.layer_dense[static_cast<size_t>(i)];
  EXPECT_EQ(dense, 7);
  EXPECT_TRUE(m.layer_dense[10]);
  EXPECT_FALSE(m.layer_dense[11]);
  EXPECT_EQ(m.sinks, 128);
  EXPECT_EQ(m.experts, 16);
  EXPECT_EQ(m.experts_per_token, 1);
  EXPECT_EQ(m.shared_experts, 1);
  EXPECT_EQ(m.router, RouterFunction::kSoftmax);
  EXPECT_EQ(m.branch_norm, BranchNorm::kAfterProjection);
  EXPECT_FALSE(m.learned_branch_weights);
  EXPECT_EQ(m.linear_weight, 0.5f);
  EXPECT_TRUE(m.sink_rope && m.linear_sees_sinks && m.softmax_rope);
  EXPECT_EQ(m.rope.theta, 1e6);
}

TEST(SpikingBrainMoeConfig, EverySwitch) {
  Json json = whole();
  json["router_function"] = "sigmoid";
  json["branch_norm"] = "before_projection";
  json["branch_weights"] = "learned";
  json["linear_branch_weight"] = 0.25;
  json["softmax_branch_weight"] = -1;
  json["sink_rope"] = json["linear_sees_sinks"] = json["softmax_rope"] = json["attention_bias"] = false;
  json["tie_word_embeddings"] = true;
  json["full_attention_layers"] = Json::array();
  json["head_dim"] = 33;  // no rotary embedding, so odd heads are fine
  const SpikingBrainMoeConfig m = parse(json);
  EXPECT_EQ(m.router, RouterFunction::kSigmoid);
  EXPECT_EQ(m.branch_norm, BranchNorm::kBeforeProjection);
  EXPECT_TRUE(m.learned_branch_weights && m.tie_word_embeddings);
  EXPECT_EQ(m.linear_weight, 0.25f);
  EXPECT_EQ(m.softmax_weight, -1.0f);
  EXPECT_FALSE(m.sink_rope || m.linear_sees_sinks || m.softmax_rope || m.qkv_bias);
  EXPECT_EQ(m.layer_window, std::vector<int64_t>(28, 4096));
  EXPECT_EQ(m.head_dim, 33);
}

TEST(SpikingBrainMoeConfig, WithoutExpertsEveryLayerIsDense) {
  Json json = whole();
  for (const char* field : {"num_experts", "num_experts_per_tok", "num_shared_experts", "dense_layers"})
    json.erase(field);
  const SpikingBrainMoeConfig m = parse(json);
  EXPECT_EQ(m.experts, 0);
  EXPECT_EQ(m.layer_dense, std::vector<bool>(28, true));
}

TEST(SpikingBrainMoeConfig, NoWindowNeededWhenAllLayersAreFull) {
  Json json = whole();
  json["num_hidden_layers"] = 2;
  json["dense_layers"] = {1};
  json["full_attention_layers"] = {1, 0};
  json.erase("sliding_window");
  EXPECT_EQ(parse(json).layer_window, (std::vector<int64_t>{0, 0}));
}

TEST(SpikingBrainMoeConfig, FaultsNameFileFieldFoundAndExpected) {
  struct Fault {
    const char* field;
    Json value;
    const char* says;
  };
  const Fault faults[] = {{"sliding_window", 0, "found 0"},
                          {"sliding_window", nullptr, "from 1"},
                          {"sliding_window", -3, "from 1"},
                          {"num_key_value_heads", 5, "divisor of num_attention_heads, 28"},
                          {"num_attention_heads", 27, "divisor"},
                          {"hidden_size", 3585, "multiple of num_attention_heads"},
                          {"head_dim", 33, "even"},
                          {"head_dim", 1 << 17, "from 1 to 65536"},
                          {"num_experts_per_tok", 0, "from 1 to 16"},
                          {"num_experts_per_tok", 17, "from 1 to 16"},
                          {"num_experts", 0, "since num_experts is 0"},
                          {"num_experts", -1, "from 0"},
                          {"num_shared_experts", -1, "from 0"},
                          {"dense_layers", {3, 28}, "from 0 to 27"},
                          {"dense_layers", {3, 5, 3}, "3 stands there again"},
                          {"dense_layers", {-1}, "from 0 to 27"},
                          {"dense_layers", "all", "integer"},
                          {"full_attention_layers", {6, 6}, "6 stands there again"},
                          {"full_attention_layers", {28}, "from 0 to 27"},
                          {"num_sink_tokens", -1, "from 0"},
                          {"num_sink_tokens", 1e9, "from 0"},
                          {"norm_eps", 0, "a number"},
                          {"linear_branch_weight", 1e30, "a number"},
                          {"softmax_branch_weight", "x", "a number"},
                          {"branch_weights", 3, "text"},
                          {"branch_weights", "fixd", "\"fixed\" or \"learned\""},
                          {"branch_norm", "both", "before_projection"},
                          {"router_function", "relu", "\"softmax\" or \"sigmoid\""},
                          {"sink_rope", 1, "true or false"},
                          {"rope_theta", 0, "a number"},
                          {"num_hidden_layers", 0, "from 1"}};
  for (const Fault& f : faults) {
    Json json = whole();
    json[f.field] = f.value;
    try {
      parse(json);
      ADD_FAILURE() << f.field << " = " << f.value.dump() << " was accepted";
    } catch (const CorruptData& e) {
      const std::string what = e.what();
      for (const char* part : {"dir/config.json", f.says}) EXPECT_NE(what.find(part), std::string::npos) << what;
    }
  }
}

TEST(SpikingBrainMoeConfig, NumbersThatAreNotFiniteAreRefused) {
  for (const char* number : {"NaN", "Infinity", "1e999", "-1e999"}) {
    std::string text = whole().dump();
    text.insert(1, "\"linear_branch_weight\":" + std::string(number) + ",");
    EXPECT_THROW(parse_spikingbrain_moe_config(ConfigFile::parse(text, "config.json")), CorruptData) << number;
  }
}

TEST(SpikingBrainMoeConfig, WhatCannotRunIsUnsupported) {
  Json json = whole();
  json["rope_scaling"] = {{"rope_type", "dynamic"}, {"factor", 2.0}};
  EXPECT_THROW(parse(json), Unsupported);
  json["sink_rope"] = false;
  EXPECT_EQ(parse(json).rope.type, RopeType::kDynamic);
  json = whole();
  json["hidden_act"] = "gelu";
  EXPECT_THROW(parse(json), Unsupported);
  json["model_type"] = "gla_swa";
  EXPECT_THROW(parse(json), Unsupported);
}

}  // namespace
}  // namespace lacuna

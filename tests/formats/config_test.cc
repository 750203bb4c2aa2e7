#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "formats/config.h"
#include "refusals.h"

namespace lacuna {
namespace {

using refusals::expect_says;

namespace fs = std::filesystem;
using Json = nlohmann::json;

Json base(const char* type) {
  return {{"model_type", type},          {"vocab_size", 100},        {"hidden_size", 64},
          {"intermediate_size", 96},     {"num_hidden_layers", 4},   {"num_attention_heads", 8},
          {"num_key_value_heads", 2},    {"hidden_act", "silu"},     {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-5},        {"rope_theta", 5000.0}};
}

ModelConfig parse(const Json& json) { return parse_model_config(ConfigFile::parse(json.dump(), "dir/config.json")); }

template <typename E = CorruptData>
std::string refusal(const Json& json) {
  return refusals::refusal<E>([&] { parse(json); });
}

TEST(ModelConfig, Llama) {
  Json json = base("llama");
  json["attention_bias"] = true;
  json["eos_token_id"] = {2, 7};
  json["bos_token_id"] = 1;
  json["sliding_window"] = 64;  // not a Llama field: no effect
  const ModelConfig m = parse(json);
  EXPECT_EQ(m.model_type, "llama");
  EXPECT_EQ(m.vocab, 100);
  EXPECT_EQ(m.head_dim, 8);
  EXPECT_EQ(m.kv_heads, 2);
  EXPECT_FLOAT_EQ(m.rms_norm_eps, 1e-5f);
  EXPECT_TRUE(m.qkv_bias && m.o_bias);
  EXPECT_FALSE(m.mlp_bias || m.qk_norm || m.tie_word_embeddings);
  EXPECT_EQ(m.layer_window, std::vector<int64_t>(4, 0));
  EXPECT_EQ(m.eos_ids, (std::vector<int32_t>{2, 7}));
  EXPECT_EQ(m.bos_id, 1);
  EXPECT_EQ(m.rope.theta, 5000.0);
  EXPECT_EQ(m.stored, StoredWeights::kFloat);
}

TEST(ModelConfig, FamiliesDiffer) {
  EXPECT_TRUE(parse(base("qwen2")).qkv_bias);
  EXPECT_FALSE(parse(base("qwen2")).o_bias);
  EXPECT_EQ(parse(base("qwen3")).head_dim, 128) << "the family's default";
  EXPECT_TRUE(parse(base("qwen3")).qk_norm);
  EXPECT_FALSE(parse(base("mistral")).qkv_bias);
  Json json = base("llama");
  json.erase("num_key_value_heads");
  EXPECT_EQ(parse(json).kv_heads, 8);
  json["mlp_bias"] = true;
  EXPECT_TRUE(parse(json).mlp_bias);
  json["num_key_value_heads"] = nullptr;
  json["head_dim"] = 32;
  EXPECT_EQ(parse(json).kv_heads, 8);
  EXPECT_EQ(parse(json).head_dim, 32);
}

TEST(ModelConfig, Windows) {
  Json json = base("mistral");
  EXPECT_EQ(parse(json).layer_window, std::vector<int64_t>(4, 4096)) << "absent means the family's default";
  json["sliding_window"] = nullptr;
  EXPECT_EQ(parse(json).layer_window, std::vector<int64_t>(4, 0));
  json["sliding_window"] = 48;
  EXPECT_EQ(parse(json).layer_window, std::vector<int64_t>(4, 48));

  json = base("qwen2");
  json["sliding_window"] = 48;
  json["max_window_layers"] = 2;
  EXPECT_EQ(parse(json).layer_window, std::vector<int64_t>(4, 0)) << "use_sliding_window is off";
  json["use_sliding_window"] = true;
  EXPECT_EQ(parse(json).layer_window, (std::vector<int64_t>{0, 0, 48, 48}));
  json["layer_types"] = {"sliding_attention", "full_attention", "full_attention", "full_attention"};
  EXPECT_EQ(parse(json).layer_window, (std::vector<int64_t>{48, 0, 0, 0}));
  json["layer_types"] = {"full_attention"};
  expect_says(refusal(json), {"layer_types", "4 entries"});
  json["layer_types"] = {"chunked_attention", "full_attention", "full_attention", "full_attention"};
  expect_says(refusal<Unsupported>(json), {"layer_types", "chunked_attention"});
  json["layer_types"] = {"sliding_attention", "full_attention", "full_attention", "full_attention"};
  json["sliding_window"] = nullptr;
  expect_says(refusal(json), {"sliding_window"});
}

TEST(ModelConfig, FaultsNameFileFieldFoundAndExpected) {
  const auto with = [](const char* field, Json value) {
    Json json = base("llama");
    json[field] = std::move(value);
    return json;
  };
  expect_says(refusal(with("vocab_size", "many")), {"dir/config.json", "'vocab_size'", "\"many\"", "integer"});
  expect_says(refusal(with("hidden_size", -64)), {"'hidden_size'", "-64"});
  expect_says(refusal(with("hidden_size", 0)), {"'hidden_size'"});
  expect_says(refusal(with("hidden_size", 65)), {"'hidden_size'", "65", "8"});
  expect_says(refusal(with("num_hidden_layers", 1e18)), {"'num_hidden_layers'"});
  expect_says(refusal(with("num_hidden_layers", 2.5)), {"'num_hidden_layers'", "2.5"});
  expect_says(refusal(with("num_key_value_heads", 3)), {"'num_key_value_heads'", "3", "8"});
  expect_says(refusal(with("num_key_value_heads", 16)), {"'num_key_value_heads'", "16"});
  expect_says(refusal(with("head_dim", 7)), {"'head_dim'", "7", "even"});
  expect_says(refusal(with("rms_norm_eps", -1)), {"'rms_norm_eps'", "-1"});
  expect_says(refusal(with("tie_word_embeddings", 1)), {"'tie_word_embeddings'", "true or false"});
  expect_says(refusal(with("eos_token_id", -2)), {"'eos_token_id'", "-2"});
  expect_says(refusal(with("max_position_embeddings", uint64_t{18446744073709551615u})), {"'max_position_embeddings'"});
  expect_says(refusal<Unsupported>(with("model_type", "gpt_neox")), {"'model_type'", "gpt_neox", "llama"});
  expect_says(refusal<Unsupported>(with("hidden_act", "gelu")), {"'hidden_act'", "gelu", "silu"});
  expect_says(refusal<Unsupported>(with("partial_rotary_factor", 0.5)), {"partial_rotary_factor", "0.5"});
  for (const char* field : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type"}) {
    Json json = base("llama");
    json.erase(field);
    expect_says(refusal(json), {field, "found nothing"});
  }
  EXPECT_THROW(parse_model_config(ConfigFile::parse("[1]", "c")), CorruptData);
  EXPECT_THROW(ConfigFile::parse(R"({"a":1e999})", "c"), CorruptData);
  EXPECT_THROW(ConfigFile::parse(R"({"a":NaN})", "c"), CorruptData);
  EXPECT_THROW(ConfigFile::parse(R"({"a":1,"a":2})", "c"), CorruptData);
}

TEST(ModelConfig, Quantization) {
  Json json = base("llama");
  json["quantization_config"] = {{"quant_method", "lacuna-int8"}, {"bits", 8}, {"granularity", "per_row"}};
  EXPECT_EQ(parse(json).stored, StoredWeights::kInt8PerRow);
  json["quantization_config"]["bits"] = 4;
  expect_says(refusal<Unsupported>(json), {"'quantization_config.bits'", "4"});
  json["quantization_config"] = {{"quant_method", "gptq"}};
  expect_says(refusal<Unsupported>(json), {"gptq", "lacuna-int8"});
}

TEST(Rope, BothSpellings) {
  const auto rope = [](Json fields) {
    Json json = base("llama");
    json.update(fields);
    return parse(json).rope;
  };
  EXPECT_EQ(rope({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}}}).theta, 1e6);
  const RopeConfig linear = rope({{"rope_scaling", {{"type", "linear"}, {"factor", 4}}}});
  EXPECT_EQ(linear.type, RopeType::kLinear);
  EXPECT_EQ(linear.factor, 4);
  EXPECT_EQ(linear.theta, 5000.0) << "from beside it";
  EXPECT_EQ(rope({{"rope_scaling", nullptr}}).type, RopeType::kDefault);
  const RopeConfig yarn = rope({{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"beta_fast", 16}, {"truncate", false}}}});
  EXPECT_EQ(yarn.original_max_position, 4096) << "max_position_embeddings unless it is given";
  EXPECT_EQ(yarn.beta_fast, 16);
  EXPECT_FALSE(yarn.truncate);
  const Json one = {{"rope_type", "default"}, {"rope_theta", 1e4}}, other = {{"rope_type", "default"}, {"rope_theta", 1e5}};
  EXPECT_EQ(rope({{"rope_parameters", {{"full_attention", one}, {"sliding_attention", one}}}}).theta, 1e4);
  Json json = base("qwen2");
  json["rope_parameters"] = {{"full_attention", one}, {"sliding_attention", other}};
  expect_says(refusal<Unsupported>(json), {"rope_parameters", "sliding_attention", "layer types"});
}

TEST(Rope, Faults) {
  const auto with = [](Json parameters) {
    Json json = base("llama");
    json["rope_parameters"] = std::move(parameters);
    return json;
  };
  expect_says(refusal<Unsupported>(with({{"rope_type", "longrope"}})), {"rope_parameters.rope_type", "longrope", "yarn"});
  expect_says(refusal(with({{"rope_type", "linear"}})), {"rope_parameters.factor", "nothing"});
  expect_says(refusal(with({{"rope_type", "linear"}, {"factor", 0}})), {"rope_parameters.factor"});
  expect_says(refusal(with({{"rope_type", "default"}, {"rope_theta", -1}})), {"rope_parameters.rope_theta", "-1"});
  expect_says(refusal(with({{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}})), {"high_freq_factor"});
  expect_says(refusal<Unsupported>(with({{"rope_type", "default"}, {"partial_rotary_factor", 0.5}})), {"partial_rotary_factor"});
}

// inv_freq and attention factor of transformers 5.23 on the CPU (torch 2.11), for every kind.
TEST(Rope, FrequenciesAsTransformers) {
  const auto file = ConfigFile::load(fs::path(LACUNA_SOURCE_DIR) / "tests" / "data" / "rope.json");
  const auto cases = file.objects("cases");
  ASSERT_EQ(cases.size(), 13u);
  for (const ConfigFile& c : cases) {
    SCOPED_TRACE(c.text("name"));
    const auto d = static_cast<int>(c.integer("head_dim", 2, 1024));
    const int64_t max_position = c.integer("max_position_embeddings", 1, 1 << 30);
    const auto got = rope_frequencies(parse_rope_config(c, max_position), d, max_position, c.integer("sequence_length", 0, 1 << 30));
    EXPECT_FLOAT_EQ(got.attention_factor, static_cast<float>(c.number("attention_factor", 0, 10)));
    const Json& expected = *c.raw("inv_freq");
    ASSERT_EQ(got.inv_freq.size(), expected.size());
    // Up to 4 units in the last place: torch's vectorised pow is not correctly rounded.
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_FLOAT_EQ(got.inv_freq[i], expected[i].get<float>()) << i;
  }
}

TEST(GenerationConfig, Fields) {
  const auto g = parse_generation_config(ConfigFile::parse(
      R"({"eos_token_id":[5,6],"do_sample":true,"temperature":0.7,"top_k":20,"top_p":0.8,"repetition_penalty":1.1})", "g"));
  EXPECT_EQ(g.eos_ids, (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(g.do_sample, true);
  EXPECT_FLOAT_EQ(*g.temperature, 0.7f);
  EXPECT_EQ(g.top_k, 20);
  EXPECT_FALSE(g.min_p || g.bos_id);
  EXPECT_THROW(parse_generation_config(ConfigFile::parse(R"({"top_p":1.5})", "g")), CorruptData);
}

TEST(GenerationConfig, EndIdsFallBackToTheModel) {
  const auto dir = fs::path(LACUNA_SOURCE_DIR) / "tests" / "data" / "tokenizers" / "gpt2";
  EXPECT_TRUE(load_generation_config(dir).eos_ids.empty()) << "neither file is there";
}

}  // namespace
}  // namespace lacuna

#include "formats/spikingbrain_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "refusals.h"

namespace lacuna {
namespace {

using refusals::expect_says;

using Json = nlohmann::json;

// The published config.json of SpikingBrain-7B, in its own numbers.
Json published() {
  return {{"model_type", "gla_swa"},
          {"architectures", {"GLAswaForCausalLM"}},
          {"vocab_size", 152064},
          {"hidden_size", 3584},
          {"num_hidden_layers", 28},
          {"intermediate_size", 18944},
          {"num_attention_heads", 28},
          {"num_key_value_heads", 4},
          {"hidden_act", "swish"},
          {"norm_eps", 1e-6},
          {"rope_theta", 1000000.0},
          {"sliding_window", 4096},
          {"max_position_embeddings", 131072},
          {"attn_mode", "chunk"},
          {"use_short_conv", false},
          {"conv_size", 4},
          {"tie_word_embeddings", false},
          {"elementwise_affine", true},
          {"attn_layers", {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27}},
          {"bos_token_id", 151643},
          {"eos_token_id", 151643},
          {"pad_token_id", nullptr},
          {"torch_dtype", "bfloat16"}};
}

SpikingBrainConfig parse(const Json& json) {
  return parse_spikingbrain_config(ConfigFile::parse(json.dump(), "dir/config.json"));
}

template <typename E = CorruptData>
std::string refusal(const Json& json) {
  return refusals::refusal<E>([&] { parse(json); });
}

Json with(const char* field, Json value) {
  Json json = published();
  json[field] = std::move(value);
  return json;
}

TEST(SpikingBrainConfig, Published) {
  const SpikingBrainConfig m = parse(published());
  EXPECT_EQ(m.vocab, 152064);
  EXPECT_EQ(m.hidden, 3584);
  EXPECT_EQ(m.layers, 28);
  EXPECT_EQ(m.heads, 28);
  EXPECT_EQ(m.kv_heads, 4);
  EXPECT_EQ(m.head_dim, 128);
  EXPECT_EQ(m.sliding_window, 4096);
  EXPECT_EQ(m.max_positions, 131072);
  EXPECT_EQ(m.window, SpikingBrainConfig::Window::kOfficial);
  EXPECT_FLOAT_EQ(m.norm_eps, 1e-6f);
  EXPECT_EQ(m.gate_logit_normalizer, 16);
  EXPECT_EQ(m.gate_low_rank_dim, 16);
  EXPECT_EQ(m.rope.theta, 1e6);
  EXPECT_EQ(m.eos_ids, std::vector<int32_t>{151643});
  EXPECT_EQ(m.full_attention, std::vector<bool>(28, false));
  EXPECT_FALSE(m.tie_word_embeddings);
  EXPECT_TRUE(m.is_linear(0) && !m.is_linear(1) && m.is_linear(26) && !m.is_linear(27));
}

// The published code computes the softmax layers itself: 1, 3, 5, …
TEST(SpikingBrainConfig, TheListOfSoftmaxLayersIsNotRead) {
  EXPECT_TRUE(parse(with("attn_layers", {0, 2})).is_linear(0));
  EXPECT_EQ(parse(with("attn_layers", "anything")).layers, 28);
  EXPECT_EQ(parse(with("spike_coding", {{"k", 3}})).layers, 28);
}

TEST(SpikingBrainConfig, OurOwnFields) {
  EXPECT_EQ(parse(with("window_rule", "exact")).window, SpikingBrainConfig::Window::kExact);
  EXPECT_EQ(parse(with("window_rule", "plus_one")).window, SpikingBrainConfig::Window::kPlusOne);
  expect_says(refusal(with("window_rule", "both")), {"dir/config.json", "window_rule", "\"both\"", "plus_one"});
  const SpikingBrainConfig m = parse(with("full_attention_layers", {13, 27}));
  for (size_t i = 0; i < 28; ++i) EXPECT_EQ(m.full_attention[i], i == 13 || i == 27) << i;
  expect_says(refusal(with("full_attention_layers", {12})), {"full_attention_layers", "[12]", "odd layers", "12 is gated"});
  expect_says(refusal(with("full_attention_layers", {3, 3})), {"full_attention_layers", "at most once"});
  expect_says(refusal(with("full_attention_layers", {29})), {"full_attention_layers", "27"});
  EXPECT_TRUE(parse(with("tie_word_embeddings", true)).tie_word_embeddings);
  EXPECT_EQ(parse(with("head_dim", 64)).head_dim, 64);
  EXPECT_EQ(parse(with("quantization_config", {{"quant_method", "lacuna-int8"}, {"bits", 8}, {"granularity", "per_row"}})).stored,
            StoredWeights::kInt8PerRow);
}

TEST(SpikingBrainConfig, WrongFieldsNameFoundAndExpected) {
  for (const char* field : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                            "num_key_value_heads", "sliding_window", "max_position_embeddings", "gate_low_rank_dim",
                            "gate_logit_normalizer", "norm_eps"}) {
    for (const Json& bad : {Json(0), Json(-5), Json("x"), Json(1e300)})
      expect_says(refusal(with(field, bad)), {"dir/config.json", field, "found", "expected"});
  }
  expect_says(refusal(with("num_key_value_heads", 3)), {"num_key_value_heads", "found 3", "divisor", "28"});
  expect_says(refusal(with("num_attention_heads", 24)), {"hidden_size", "3584", "multiple", "24"});
  expect_says(refusal(with("hidden_size", 28 * 127)), {"hidden_size", "even", "127"});
  expect_says(refusal(with("head_dim", 31)), {"head_dim", "even", "31"});
  expect_says(refusal(with("hidden_act", 3)), {"hidden_act"});
  for (const char* field : {"vocab_size", "hidden_size", "sliding_window", "max_position_embeddings"}) {
    Json json = published();
    json.erase(field);
    expect_says(refusal(json), {field, "found nothing"});
  }
}

TEST(SpikingBrainConfig, VariantsThatAreNotRun) {
  expect_says(refusal<Unsupported>(with("use_short_conv", true)), {"use_short_conv", "found true"});
  expect_says(refusal<Unsupported>(with("hidden_act", "gelu")), {"hidden_act", "gelu"});
  expect_says(refusal<Unsupported>(with("elementwise_affine", false)), {"elementwise_affine"});
  expect_says(refusal<Unsupported>(with("model_type", "llama")), {"model_type", "gla_swa"});
  expect_says(refusal<Unsupported>(with("quantization_config", {{"quant_method", "gptq"}})), {"quant_method"});
}

}  // namespace
}  // namespace lacuna

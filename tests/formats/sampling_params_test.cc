#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "formats/sampling_params.h"

namespace lacuna {
namespace {

SamplingParams parse(std::string_view json) { return parse_sampling_params(json, "request"); }

std::string refusal(std::string_view json) {
  try {
    parse(json);
  } catch (const BadInput& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

TEST(SamplingParams, Parses) {
  const SamplingParams p = parse(R"({"temperature":0.5,"top_k":40,"top_p":0.9,"min_p":0.1,"repetition_penalty":1.2,
    "seed":18446744073709551615,"max_new_tokens":7,"stop":["a","b"],"ignore_eos":true})");
  EXPECT_FLOAT_EQ(p.temperature, 0.5f);
  EXPECT_EQ(p.top_k, 40);
  EXPECT_FLOAT_EQ(p.top_p, 0.9f);
  EXPECT_FLOAT_EQ(p.min_p, 0.1f);
  EXPECT_FLOAT_EQ(p.repetition_penalty, 1.2f);
  EXPECT_EQ(p.seed, 18446744073709551615u);
  EXPECT_EQ(p.max_new_tokens, 7);
  EXPECT_EQ(p.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(p.ignore_eos);
  EXPECT_EQ(parse(R"({"stop":"x"})").stop, std::vector<std::string>{"x"});
}

TEST(SamplingParams, LeftOutFieldsKeepTheirDefaults) {
  SamplingParams defaults;
  defaults.temperature = 0.3f;
  defaults.seed = 9;
  const SamplingParams p = parse_sampling_params(R"({"seed":4})", "request", defaults);
  EXPECT_FLOAT_EQ(p.temperature, 0.3f);
  EXPECT_EQ(p.seed, 4u);
  EXPECT_EQ(parse("{}").max_new_tokens, 256);
}

TEST(SamplingParams, FaultsAreBadInputThatNamesThem) {
  for (const auto& [json, part] : {std::pair(R"({"temperature":-1})", "temperature"), {R"({"temperature":"hot"})", "hot"},
                                   {R"({"top_k":-1})", "top_k"}, {R"({"top_k":1.5})", "top_k"}, {R"({"top_p":0})", "top_p"},
                                   {R"({"top_p":1.1})", "top_p"}, {R"({"min_p":2})", "min_p"},
                                   {R"({"repetition_penalty":0})", "repetition_penalty"}, {R"({"seed":-1})", "seed"},
                                   {R"({"max_new_tokens":0})", "max_new_tokens"}, {R"({"stop":[""]})", "stop"},
                                   {R"({"stop":[1]})", "stop"}, {R"({"temprature":1})", "temprature"}, {"[]", "object"},
                                   {"{", "JSON"}, {R"({"ignore_eos":1})", "ignore_eos"}}) {
    const std::string message = refusal(json);
    EXPECT_NE(message.find("request"), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.find("another error"), std::string::npos) << message;
  }
}

TEST(SamplingParams, ValidateRefusesNaN) {
  SamplingParams p;
  EXPECT_NO_THROW(validate(p));
  p.temperature = std::nanf("");
  EXPECT_THROW(validate(p), BadInput);
  p = {};
  p.top_p = std::nanf("");
  EXPECT_THROW(validate(p), BadInput);
}

}  // namespace
}  // namespace lacuna

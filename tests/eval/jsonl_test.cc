#include "eval/jsonl.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"

namespace lacuna {
namespace {

TEST(Jsonl, ReadsRulerLines) {
  const auto lines = parse_jsonl(
      "{\"index\": 7, \"input\": \"Q?\", \"outputs\": [\"a\", \"b\"], \"length\": 4096}\r\n\n"
      "{\"input\": \"R?\", \"outputs\": \"c\", \"answer_prefix\": \" A:\", \"other\": {\"x\": 1}}",
      "f");
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].index, 7);
  EXPECT_EQ(lines[0].length, 4096);
  EXPECT_EQ(lines[0].outputs, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(lines[1].index, 2);  // line number from 0
  EXPECT_EQ(lines[1].outputs, std::vector<std::string>{"c"});
  EXPECT_EQ(lines[1].answer_prefix, " A:");
}

TEST(Jsonl, HostileLinesAreNamed) {
  const std::string good = "{\"input\": \"Q\", \"outputs\": [\"a\"]}\n";
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  const std::pair<std::string, const char*> cases[] = {
      {"{", "f:2"},
      {"[1]", "expected an object"},
      {"{\"outputs\": [\"a\"]}", "\"input\" is missing"},
      {"{\"input\": \"Q\"}", "\"outputs\" is missing"},
      {"{\"input\": 3, \"outputs\": [\"a\"]}", "\"input\" is number"},
      {"{\"input\": \"\", \"outputs\": [\"a\"]}", "\"input\" is empty"},
      {"{\"input\": \"Q\", \"outputs\": []}", "\"outputs\" is empty"},
      {"{\"input\": \"Q\", \"outputs\": [\"\"]}", "is empty"},
      {"{\"input\": \"Q\", \"outputs\": [1]}", "expected a string"},
      {"{\"input\": \"Q\", \"outputs\": [\"a\"], \"index\": -1}", "expected a whole number"},
      {"{\"input\": \"Q\", \"outputs\": [\"a\"], \"index\": 1e300}", "expected a whole number"},
      {"{\"input\": \"Q\", \"outputs\": [\"a\"], \"index\": 18446744073709551615}", "expected a whole number"},
      {"{\"input\": \"\xff\", \"outputs\": [\"a\"]}", "f:2"},
      {"{\"input\": " + deep + ", \"outputs\": [\"a\"]}", "f:2"},
      {std::string("{\"input\": \"Q\0\", ", 16), "f:2"},
  };
  for (const auto& [bad, message] : cases) {
    try {
      parse_jsonl(good + bad, "f");
      ADD_FAILURE() << "accepted: " << bad.substr(0, 60);
    } catch (const CorruptData& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("f:2"), std::string::npos) << e.what();
    }
  }
  EXPECT_THROW(parse_jsonl("", "f"), CorruptData);
  EXPECT_THROW(parse_jsonl("\n \n", "f"), CorruptData);
}

TEST(Jsonl, MissingFileIsNamed) {
  EXPECT_THROW(read_jsonl("no/such/file.jsonl"), IoError);
  EXPECT_THROW(read_jsonl("."), IoError);
}

}  // namespace
}  // namespace lacuna

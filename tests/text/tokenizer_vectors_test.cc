// llama.cpp's test vectors (tests/data/tokenizers; GPT-2's vocabulary is MIT, Qwen2.5's Apache-2.0).
#include <gtest/gtest.h>

#include "text/tokenizer.h"
#include "text/vectors.h"

namespace lacuna {
namespace {

class Vectors : public testing::TestWithParam<const char*> {};

TEST_P(Vectors, EncodeAsLlamaCpp) {
  const auto dir = test_data() / "tokenizers" / GetParam();
  const auto tokenizer = load_tokenizer(dir);
  const auto vectors = read_vectors(dir / "vectors.inp", dir / "vectors.out");
  ASSERT_GT(vectors.size(), 40u);
  for (const auto& [text, ids] : vectors) {
    EXPECT_EQ(tokenizer->encode(text, false), ids) << testing::PrintToString(text);
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text, false)), text);
  }
}

INSTANTIATE_TEST_SUITE_P(Shipped, Vectors, testing::Values("gpt2", "qwen2.5"));

}  // namespace
}  // namespace lacuna

// Whole tokenizers against other people's ids: llama.cpp's vectors, and Hugging Face's tokenizers 0.23
// on pieces of the evaluation books and random text (tests/data/tokenizers; GPT-2's vocabulary is MIT,
// Qwen2.5's Apache-2.0). Files that may not be shipped are looked for in the folder LACUNA_SHARED.
#include <gtest/gtest.h>

#include <cstdlib>

#include <nlohmann/json.hpp>

#include "text/tokenizer.h"
#include "text/vectors.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

void expect_llama_cpp(const Tokenizer& tokenizer, const fs::path& inp, const fs::path& out) {
  const auto vectors = read_vectors(inp, out);
  ASSERT_GT(vectors.size(), 40u);
  for (const auto& [text, ids] : vectors) {
    EXPECT_EQ(tokenizer.encode(text, false), ids) << testing::PrintToString(text);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false)), text);
  }
}

void expect_books(const Tokenizer& tokenizer, const char* name) {
  const auto golden = nlohmann::json::parse(read_text_file(tokenizer_data("books.json"), 10 << 20));
  ASSERT_GT(golden["cases"].size(), 40u);
  for (const auto& c : golden["cases"])
    EXPECT_EQ(tokenizer.encode(c["text"].get<std::string>(), false), c[name].get<std::vector<int32_t>>()) << c["text"];
}

TEST(TokenizerVectors, Gpt2) {
  const fs::path dir = tokenizer_data("gpt2");
  const auto tokenizer = load_tokenizer(dir);
  EXPECT_EQ(tokenizer->vocab_size(), 50257);
  EXPECT_EQ(tokenizer->eos_id(), 50256);
  EXPECT_TRUE(tokenizer->is_special(50256));
  EXPECT_EQ(tokenizer->encode("a<|endoftext|>", false), (std::vector<int32_t>{64, 50256}));
  expect_llama_cpp(*tokenizer, dir / "vectors.inp", dir / "vectors.out");
}

TEST(TokenizerVectors, Qwen25) {
  const fs::path dir = tokenizer_data("qwen2.5");
  const auto tokenizer = load_tokenizer(dir);
  EXPECT_EQ(tokenizer->vocab_size(), 151665);
  EXPECT_EQ(tokenizer->eos_id(), 151643);
  EXPECT_EQ(tokenizer->id("<|im_end|>"), 151645);
  EXPECT_TRUE(tokenizer->is_special(151645));
  EXPECT_FALSE(tokenizer->is_special(151657)) << "<tool_call> is added, not special";
  expect_llama_cpp(*tokenizer, dir / "vectors.inp", dir / "vectors.out");
  expect_books(*tokenizer, "qwen2.5");
}

class Local : public testing::Test {
 protected:
  void SetUp() override {
    const char* shared = std::getenv("LACUNA_SHARED");
    ASSERT_NE(shared, nullptr) << "LACUNA_SHARED must name the folder with the files that may not be shipped";
    dir_ = fs::path(shared) / "data" / "tokenizers";
  }
  fs::path dir_;
};

TEST_F(Local, Llama2SentencePiece) {
  const fs::path dir = dir_ / "llama2-spm";
  const auto tokenizer = load_tokenizer(dir);
  EXPECT_EQ(tokenizer->vocab_size(), 32000);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->encode("a", true).front(), 1);
  expect_llama_cpp(*tokenizer, dir / "ggml-vocab-llama-spm.gguf.inp", dir / "ggml-vocab-llama-spm.gguf.out");
}

TEST_F(Local, Olmo2) { expect_books(*load_tokenizer(dir_ / "olmo2"), "olmo2"); }

}  // namespace
}  // namespace lacuna

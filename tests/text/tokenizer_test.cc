#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "text/bpe_tokenizer.h"
#include "text/sentencepiece_tokenizer.h"
#include "text/utf8.h"
#include "text/vectors.h"

namespace lacuna {
namespace {

const Tokenizer& gpt2() {
  static const auto tokenizer = load_tokenizer(tokenizer_data("gpt2"));
  return *tokenizer;
}

std::unique_ptr<BpeTokenizer> from_json(const std::string& json) {
  const auto file = ConfigFile::parse(json, "tokenizer.json");
  return std::make_unique<BpeTokenizer>(file, parse_bpe_parts(file));
}

template <typename E = CorruptData>
std::string refusal(const std::string& json) {
  try {
    from_json(json);
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

std::string random_text() {
  std::string text;
  for (int n = *rc::gen::inRange(0, 60); n > 0; --n) {
    const int kind = *rc::gen::inRange(0, 4);
    char32_t point = static_cast<char32_t>(kind == 0   ? *rc::gen::inRange(0x20, 0x7F)
                                           : kind == 1 ? *rc::gen::element(' ', '\n', '\t', '\'', 's', 'A', '9')
                                           : kind == 2 ? *rc::gen::inRange(0x80, 0x3000)
                                                       : *rc::gen::inRange(0x3000, 0x110000));
    if (point >= 0xD800 && point < 0xE000) point = 0xFFFD;
    utf8_append(text, point);
  }
  return text;
}

RC_GTEST_PROP(Tokenizer, DecodeOfEncodeIsTheText, ()) {
  const std::string text = random_text();
  RC_ASSERT(gpt2().decode(gpt2().encode(text, false), false) == text);
}

// Any ids, also ones that cut characters apart: pieces are valid UTF-8 and add up to decode().
RC_GTEST_PROP(StreamDecoder, PiecesAreWholeCharactersAndAddUp, ()) {
  const auto ids = *rc::gen::container<std::vector<int32_t>>(rc::gen::inRange<int32_t>(-1, 50258));
  StreamDecoder decoder(gpt2());
  std::string text;
  for (int32_t id : ids) {
    const std::string piece = decoder.push(id);
    RC_ASSERT(utf8_valid(piece));
    text += piece;
  }
  text += decoder.finish();
  RC_ASSERT(utf8_valid(text));
  RC_ASSERT(text == gpt2().decode(ids));
}

TEST(StreamDecoder, HoldsCharactersBack) {
  // GPT-2 spells the llama (4 bytes) with several byte tokens.
  const auto ids = gpt2().encode("\xF0\x9F\xA6\x99!", false);
  ASSERT_GT(ids.size(), 3u);
  StreamDecoder decoder(gpt2());
  EXPECT_EQ(decoder.push(ids[0]), "");
  std::string rest;
  for (size_t i = 1; i < ids.size(); ++i) rest += decoder.push(ids[i]);
  EXPECT_EQ(rest + decoder.finish(), "\xF0\x9F\xA6\x99!");
  StreamDecoder cut(gpt2());
  EXPECT_EQ(cut.push(ids[0]), "");
  EXPECT_EQ(cut.finish(), "\xEF\xBF\xBD") << "an unfinished character becomes U+FFFD at the end";
  EXPECT_EQ(cut.finish(), "");
}

TEST(Tokenizer, InvalidUtf8IsReadAsReplacementCharacters) {
  EXPECT_EQ(gpt2().encode("a\xFFz\xE2\x82", false), gpt2().encode("a\xEF\xBF\xBDz\xEF\xBF\xBD", false));
}

TEST(Tokenizer, SpecialTokensAreLeftOutOfTextUnlessAskedFor) {
  const std::vector<int32_t> ids = {64, 50256, 65};
  EXPECT_EQ(gpt2().decode(ids), "ab");
  EXPECT_EQ(gpt2().decode(ids, false), "a<|endoftext|>b");
}

TEST(Tokenizer, SharedBetweenThreads) {
  const std::string text = "It was the best of times, it was the worst of times, 1859. ";
  const auto expected = gpt2().encode(text, false);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) wrong += gpt2().encode(text, false) != expected;
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// No input may take quadratic time: a megabyte of each took minutes if it did.
TEST(Tokenizer, LongWordsTakeLinearithmicTime) {
  const auto tokenizer = load_tokenizer(tokenizer_data("qwen2.5"));
  std::string marks;  // combining marks in the order that needs most exchanges
  for (int i = 0; i < 250'000; ++i) marks += i % 2 ? "\xCC\x81" : "\xCC\xA3";
  std::string letters;
  for (int i = 0; i < 1'000'000; ++i) letters += static_cast<char>('a' + i % 97 * 79 % 26);
  for (const std::string& text : {std::string(1'000'000, 'a'), letters, std::string(1'000'000, ' '),
                                  std::string(500'000, ' ') + "x", std::string(1'000'000, '\n'), marks}) {
    const auto start = std::chrono::steady_clock::now();
    const auto ids = tokenizer->encode(text, false);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    EXPECT_LT(seconds, 60) << testing::PrintToString(text.substr(0, 8));
    if (text != marks) {
      EXPECT_EQ(tokenizer->decode(ids), text);
    }
  }
}

TEST(Tokenizer, EndlessPatternsAreStopped) {
  const auto tokenizer = from_json(R"({"model":{"vocab":{"a":0},"merges":[]},
    "pre_tokenizer":{"type":"Split","pattern":{"Regex":"(a|aa)+(a|aaa)+(a?a)+$"},"behavior":"Isolated"}})");
  EXPECT_THROW(tokenizer->encode(std::string(200, 'a') + "c", false), BadInput);
}

TEST(TokenizerJson, FaultsNameFileAndField) {
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
  };
  says(refusal("{}"), {"tokenizer.json", "'model'"});
  says(refusal<Unsupported>(R"({"model":{"type":"WordPiece","vocab":{}}})"), {"model.type", "WordPiece", "BPE"});
  says(refusal(R"({"model":{"vocab":[],"merges":[]}})"), {"model.vocab"});
  says(refusal(R"({"model":{"vocab":{"a":"x"},"merges":[]}})"), {"'a'", "\"x\""});
  says(refusal(R"({"model":{"vocab":{"a":-1},"merges":[]}})"), {"'a'", "-1"});
  says(refusal(R"({"model":{"vocab":{"a":2000000000},"merges":[]}})"), {"'a'", "2000000000"});
  says(refusal(R"({"model":{"vocab":{"a":0,"b":0},"merges":[]}})"), {"'a'", "'b'", "same id 0"});
  says(refusal(R"({"model":{"vocab":{"a":0,"b":1},"merges":["a b"]}})"), {"merge 0", "'ab'"});
  says(refusal(R"({"model":{"vocab":{"a":0,"b":1},"merges":["a"]}})"), {"merges[0]", "two tokens"});
  says(refusal(R"({"model":{"vocab":{"a":0},"merges":[],"unk_token":"u"}})"), {"model.unk_token", "\"u\""});
  says(refusal<Unsupported>(R"({"model":{"vocab":{"a":0},"merges":[]},"normalizer":{"type":"Nmt"}})"), {"normalizer.type", "Nmt"});
  says(refusal<Unsupported>(R"({"model":{"vocab":{"a":0},"merges":[]},"pre_tokenizer":{"type":"BertPreTokenizer"}})"), {"pre_tokenizer.type"});
  says(refusal(R"({"model":{"vocab":{"a":0},"merges":[]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated"}})"), {"pattern", "compile"});
  says(refusal(R"({"model":{"vocab":{"a":0},"merges":[]},"post_processor":{"type":"RobertaProcessing","cls":["a",9],"sep":["a",0]}})"), {"post_processor.cls", "9"});
  says(refusal(R"({"model":{"vocab":{"a":0},"merges":[]},"added_tokens":[{"id":0,"content":"b"}]})"), {"'a'", "'b'", "same id"});
}

TEST(TokenizerJson, ReplacementsCannotGrowWithoutBound) {
  std::string steps;
  for (int i = 0; i < 60; ++i) steps += std::string(i ? "," : "") + R"({"type":"Replace","pattern":{"String":"a"},"content":"aa"})";
  const auto tokenizer = from_json(R"({"model":{"vocab":{"a":0},"merges":[]},"normalizer":{"type":"Sequence","normalizers":[)" + steps + "]}}");
  EXPECT_THROW(tokenizer->encode("aaaa", false), CorruptData);
}

TEST(LoadTokenizer, MissingOrDamagedFiles) {
  EXPECT_THROW(load_tokenizer("/nonexistent/model"), IoError);
  EXPECT_THROW(load_tokenizer(test_data()), BadInput) << "a folder without a tokenizer";
}

// Found by fuzzing: the library follows the offset of the trie's root whatever its leaf mark says.
TEST(SentencePiece, RootOfTheNormalisersTrieIsChecked) {
  std::ifstream in(std::filesystem::path(LACUNA_SOURCE_DIR) / "tests/fuzz/corpus/sentencepiece/leaf_as_root", std::ios::binary);
  const std::string model((std::istreambuf_iterator<char>(in)), {});
  ASSERT_FALSE(model.empty());
  try {
    make_sentencepiece_tokenizer(model, "damaged", std::nullopt);
    ADD_FAILURE() << "was accepted";
  } catch (const CorruptData& e) {
    EXPECT_NE(std::string(e.what()).find("damaged: unit 0 of the normaliser's trie"), std::string::npos) << e.what();
  }
}

TEST(Utf8, Steps) {
  EXPECT_EQ(utf8_lossy("a\xC0\x80z"), "a\xEF\xBF\xBD\xEF\xBF\xBDz") << "overlong";
  EXPECT_EQ(utf8_lossy("\xED\xA0\x80"), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD") << "surrogate";
  EXPECT_EQ(utf8_lossy("\xF0\x9F\xA6"), "\xEF\xBF\xBD") << "one character cut short is one replacement";
  EXPECT_EQ(utf8_lossy("\xF4\x90\x80\x80"), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD") << "above U+10FFFF";
  EXPECT_FALSE(utf8_valid("\xE2\x82"));
  EXPECT_TRUE(utf8_valid("\xE2\x82\xAC"));
}

}  // namespace
}  // namespace lacuna

#include "generate/autoregressive.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

namespace lacuna {
namespace {

namespace fs = std::filesystem;
const fs::path kStories = fs::path(LACUNA_SOURCE_DIR) / "tests/data/stories260K";

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// The 260K-parameter story model of llama2.c (MIT), converted by train/convert_llama2c.py.
class Stories : public testing::Test {
 protected:
  Stories() : ctx(memory, 2) {
    ctx.activations = ActivationType::kF32;
    model = load_model(ctx, kStories);
    tokenizer = load_tokenizer(kStories);
  }
  AutoregressiveGenerator generator() { return {ctx, *model, *tokenizer, {1, 2}, {}, {}}; }
  GenerateRequest request(const std::string& prompt, int64_t tokens) {
    GenerateRequest r;
    r.prompt = tokenizer->encode(prompt, true);
    r.sampling.max_new_tokens = tokens;
    return r;
  }

  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;
  std::unique_ptr<Tokenizer> tokenizer;
};

TEST_F(Stories, GreedyTextIsTheKnownOne) {
  GenerateRequest r;
  r.prompt = {1};
  r.sampling.max_new_tokens = 257;
  std::string streamed;
  GenerateCallbacks callbacks;
  callbacks.on_text = [&](size_t, std::string_view text) { streamed += text; };
  auto g = generator();
  const auto results = g.generate({&r, 1}, callbacks);
  std::string expected = read(kStories / "greedy.txt");
  while (!expected.empty() && expected.back() == '\n') expected.pop_back();
  EXPECT_EQ(results[0].text.substr(0, expected.size()), expected);
  EXPECT_EQ(streamed, results[0].text);
}

TEST_F(Stories, BatchEqualsEachAlone) {
  std::vector<GenerateRequest> requests = {request("Once upon a time", 40), request("Tom had a red", 25), request("The", 60)};
  auto g = generator();
  const auto together = g.generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    auto alone = generator();
    EXPECT_EQ(alone.generate({&requests[i], 1})[0].ids, together[i].ids) << i;
    EXPECT_EQ(together[i].ids.size(), static_cast<size_t>(requests[i].sampling.max_new_tokens));
    EXPECT_EQ(together[i].finish, FinishReason::kLength);
  }
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

TEST_F(Stories, StopStringEndsAndIsCutEvenAcrossTokens) {
  auto plain = request("Once upon a time", 80);
  auto g = generator();
  const std::string full = g.generate({&plain, 1})[0].text;
  const std::string stop = full.substr(20, 9);  // whatever pieces it is made of
  auto stopped = plain;
  stopped.sampling.stop = {stop};
  std::string streamed;
  GenerateCallbacks callbacks;
  callbacks.on_text = [&](size_t, std::string_view text) { streamed += text; };
  const auto result = g.generate({&stopped, 1}, callbacks)[0];
  EXPECT_EQ(result.finish, FinishReason::kStopString);
  EXPECT_EQ(result.text, full.substr(0, full.find(stop)));
  EXPECT_EQ(streamed, result.text);
}

TEST_F(Stories, SeedDecidesSampledText) {
  auto r = request("Once upon a time", 50);
  r.sampling.temperature = 1.0f;
  r.sampling.top_p = 0.9f;
  r.sampling.seed = 7;
  auto g = generator();
  const auto a = g.generate({&r, 1})[0].ids, b = g.generate({&r, 1})[0].ids;
  r.sampling.seed = 8;
  const auto c = g.generate({&r, 1})[0].ids;
  EXPECT_EQ(a, b);
  EXPECT_NE(a, c);
}

std::string long_prompt() {
  std::string text;
  for (int i = 0; i < 12; ++i) text += "Lily and Tom went to the park to play with the big dog. ";
  return text;
}

TEST_F(Stories, WholeBudgetChangesNothing) {
  auto dense = request(long_prompt(), 30), whole = dense;
  whole.eviction = EvictionRequest{"laprox", "100%", false, {}};
  auto g = generator();
  EXPECT_EQ(g.generate({&dense, 1})[0].ids, g.generate({&whole, 1})[0].ids);
}

TEST_F(Stories, EvictionShrinksTheCacheAndSaysSo) {
  auto r = request(long_prompt(), 10);
  r.eviction = EvictionRequest{"laprox", "64", false, {}};
  auto g = generator();
  const auto result = g.generate({&r, 1})[0];
  ASSERT_TRUE(result.eviction);
  const int64_t heads = int64_t{model->info().layers} * 4;
  EXPECT_EQ(result.eviction->entries_kept, heads * 64);
  EXPECT_EQ(result.kv_slots, heads * (64 + 9));  // the last generated token is not read back
  EXPECT_LT(g.stats().kv_peak_bytes, static_cast<size_t>(heads) * r.prompt.size() * 2 * 8 * 4);
}

TEST_F(Stories, QuestionAfterCompression) {
  auto r = request(long_prompt(), 10);
  r.eviction = EvictionRequest{"laprox", "100%", false, tokenizer->encode("Then Tom", false)};
  GenerateRequest joined = r;
  joined.eviction.reset();
  joined.prompt.insert(joined.prompt.end(), r.eviction->question.begin(), r.eviction->question.end());
  auto g = generator();
  EXPECT_EQ(g.generate({&r, 1})[0].ids, g.generate({&joined, 1})[0].ids);
  r.eviction->budget = "50%";
  const auto result = g.generate({&r, 1})[0];
  EXPECT_EQ(result.prompt_tokens, static_cast<int64_t>(joined.prompt.size()));
  EXPECT_EQ(result.ids.size(), 10u);
}

TEST_F(Stories, ByteBudgetHoldsAtEveryMoment) {
  auto r = request(long_prompt(), 120);
  r.eviction = EvictionRequest{"laprox", "300KiB", true, {}};
  r.sampling.ignore_eos = true;
  auto g = generator();
  const auto result = g.generate({&r, 1})[0];
  EXPECT_EQ(result.ids.size(), 120u);
  EXPECT_LE(g.stats().kv_peak_bytes, size_t{300} << 10);
}

TEST_F(Stories, ByteBudgetHoldsWithAQuestionAskedLater) {
  auto r = request(long_prompt(), 120);
  r.eviction = EvictionRequest{"laprox", "300KiB", true, tokenizer->encode("Then Tom and Lily saw a big red ball in the park", false)};
  r.sampling.ignore_eos = true;
  auto g = generator();
  EXPECT_EQ(g.generate({&r, 1})[0].ids.size(), 120u);
  EXPECT_LE(g.stats().kv_peak_bytes, size_t{300} << 10);
}

TEST_F(Stories, RefusesWhatCannotBe) {
  auto g = generator();
  auto r = request(long_prompt() + long_prompt() + long_prompt(), 10);
  EXPECT_THROW(g.generate({&r, 1}), BadInput);  // beyond 512 positions
  r = request(long_prompt(), 10);
  r.eviction = EvictionRequest{"laprox", "8", false, {}};
  EXPECT_THROW(g.generate({&r, 1}), BadInput);  // below the window
  r.eviction = EvictionRequest{"no_such", "50%", false, {}};
  EXPECT_THROW(g.generate({&r, 1}), BadInput);
  r.eviction.reset();
  r.sampling.top_p = 0;
  EXPECT_THROW(g.generate({&r, 1}), BadInput);
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

TEST_F(Stories, CancelsBetweenTokens) {
  auto r = request("Once", 100);
  int polls = 0;
  GenerateCallbacks callbacks;
  callbacks.cancelled = [&] { return ++polls > 30; };
  auto g = generator();
  EXPECT_THROW(g.generate({&r, 1}, callbacks), Cancelled);
  EXPECT_EQ(ctx.trace, nullptr);
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

}  // namespace
}  // namespace lacuna

#include "eval/samples.h"

#include <gtest/gtest.h>

#include <cmath>

#include "eval/reconstruct.h"
#include "generate/open.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
const fs::path kStories = fs::path(LACUNA_SOURCE_DIR) / "tests/data/stories260K";

TEST(TextMeasures, CountWhatTheyName) {
  // 1-grams: a b a b a b | x y z; 4-grams of the first text: abab, baba, abab.
  const std::vector<std::string> texts = {"a b a\nb a b", "x  y z", ""}, references = {"a a b c", "x y", "q"};
  const TextMeasures m = measure_texts(texts, references);
  EXPECT_DOUBLE_EQ(m.distinct[0], 5.0 / 9);
  EXPECT_DOUBLE_EQ(m.distinct[1], 4.0 / 7);
  EXPECT_DOUBLE_EQ(m.distinct[2], 3.0 / 5);
  EXPECT_DOUBLE_EQ(m.repeated, 1.0 / 3);  // one of three; the other texts have no 4-gram
  // Clipped: a twice, b once of six; x and y of three. 2-grams: "a b" once of five, "x y" of two.
  EXPECT_DOUBLE_EQ(m.overlap[0], (3.0 / 6 + 2.0 / 3) / 2);
  EXPECT_DOUBLE_EQ(m.overlap[1], (1.0 / 5 + 1.0 / 2) / 2);
  EXPECT_DOUBLE_EQ(m.empty, 1.0 / 3);
  EXPECT_EQ(measure_texts({}, {}).repeated, 0);
}

class Samples : public testing::Test {
 protected:
  Samples() : ctx(memory, 2) {
    ctx.activations = ActivationType::kF32;
    model = load_any_model(ctx, kStories);
    text = open_text(kStories);
    codec.encode = [this](std::string_view t) { return text.tokenizer->encode(t, false); };
    codec.decode = [this](std::span<const int32_t> ids) { return text.tokenizer->decode(ids); };
    codec.before = {1};
  }
  MemoryAccount memory;
  Context ctx;
  AnyModel model;
  ModelText text;
  TextCodec codec;
};

const std::vector<std::string> kTexts = {
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog. One day, Lily saw a big red ball. "
    "She wanted to play with it, but her mom said no. Lily was sad. Then her dog found a stick, and they played all day long together."};

TEST_F(Samples, JudgePaysWhatItsLogitsSay) {
  Judge judge(ctx, *model.autoregressive, codec, {}, {});
  const std::string prompt = "Once upon a time", after = ", there was a little girl";
  const double bits = judge.bits(prompt, after);
  // All in one call, token by token.
  std::vector<int32_t> ids = codec.before;
  for (int32_t id : codec.encode(prompt)) ids.push_back(id);
  const size_t from = ids.size();
  for (int32_t id : codec.encode(after)) ids.push_back(id);
  const int64_t vocab = model.vocab();
  std::vector<float> logits(ids.size() * static_cast<size_t>(vocab));
  SequenceState state = model.autoregressive->new_state(memory, {});
  prefill(ctx, *model.autoregressive, state, ids, nullptr, {}, nullptr, logits.data());
  double expected = 0;
  for (size_t i = from; i < ids.size(); ++i)
    expected += negative_log_likelihood(logits.data() + static_cast<int64_t>(i - 1) * vocab, vocab, ids[i]) / std::log(2.0);
  EXPECT_NEAR(bits, expected, 1e-3);
  EXPECT_EQ(judge.bits(prompt, ""), 0);
  EXPECT_GT(judge.bits(prompt, " zq xj kk vv"), bits);
  EXPECT_THROW(judge.bits(prompt, std::string(20000, 'q')), BadInput);
}

TEST_F(Samples, EveryPromptIsContinuedWhateverTheBatch) {
  const auto prompts = cut_prompts(codec, kTexts, 4, 12, 10);
  ASSERT_GE(prompts.size(), 2u);
  for (const SamplePrompt& p : prompts) {
    EXPECT_EQ(p.ids.size(), 12u);
    EXPECT_EQ(p.ids[0], 1);
    EXPECT_NE(kTexts[0].find(p.reference), std::string::npos);
  }
  Judge judge(ctx, *model.autoregressive, codec, {}, {});
  const auto generator = make_generator(ctx, model, text, {}, {});
  SamplingParams sampling;
  sampling.max_new_tokens = 10;
  sampling.temperature = 1;
  const SampleResult one = measure_samples(*generator, prompts, sampling, 1, &judge), all = measure_samples(*generator, prompts, sampling, 8, &judge);
  EXPECT_EQ(one.outputs, all.outputs);
  EXPECT_EQ(one.prompts, static_cast<int64_t>(prompts.size()));
  EXPECT_TRUE(one.judged);
  EXPECT_GT(all.tokens_per_pass, one.tokens_per_pass);
  // A greedy text of the judge itself is likelier than the true one.
  sampling.temperature = 0;
  EXPECT_LT(measure_samples(*generator, prompts, sampling, 8, &judge).all_bits_per_byte, measure_references(prompts, &judge).all_bits_per_byte);

  const std::vector<SampleResult> rows = {measure_references(prompts, nullptr), one};
  EXPECT_FALSE(rows[0].judged);
  EXPECT_EQ(json_report(rows)["rows"].size(), 2u);
  const std::string page = html_report(rows, prompts, "<t>");
  EXPECT_NE(page.find("&lt;t&gt;"), std::string::npos);
  EXPECT_EQ(page.find("<t>"), std::string::npos);
  EXPECT_THROW(cut_prompts(codec, kTexts, 4, 1, 10), BadInput);
  EXPECT_THROW(cut_prompts(codec, kTexts, 4, 5000, 10), BadInput);
}

TEST_F(Samples, TasksRunThroughAnyGenerator) {
  TaskPrompt prompt;
  prompt.task = "t";
  prompt.ids = {1};
  for (int32_t id : codec.encode("Once upon a time")) prompt.ids.push_back(id);
  prompt.new_tokens = 8;
  const auto generator = make_generator(ctx, model, text, {}, {});
  const PromptResult plain = run_generated(*generator, prompt);
  prompt.references = {plain.variants[0].answer.substr(0, 6), "never"};
  const PromptResult scored = run_generated(*generator, prompt);
  EXPECT_DOUBLE_EQ(scored.variants[0].score, 0.5);
  EXPECT_EQ(scored.prompt_tokens, static_cast<int64_t>(prompt.ids.size()));
  EXPECT_GT(scored.variants[0].kv_bytes, 0u);
}

// A checkpoint with random weights gives back nothing; what is exact is the counting.
TEST(Reconstruct, CountsEveryTokenOfEveryWindow) {
  MemoryAccount memory;
  Context ctx(memory, 2);
  ctx.activations = ActivationType::kF32;
  const auto model = ColaModel::load(ctx, fs::path(LACUNA_SOURCE_DIR) / "tests/goldens/cola/e2e");
  TextCodec codec;
  codec.encode = [](std::string_view t) {
    std::vector<int32_t> ids;
    for (char c : t) ids.push_back(c % 61);
    return ids;
  };
  const std::vector<std::string> texts = {std::string("the quick brown fox jumps over the lazy dog, and on")};
  const ReconstructResult r = measure_reconstruction(ctx, *model, codec, texts, 20, 10, {0, 500}, 3);
  EXPECT_EQ(r.windows, 2);
  EXPECT_EQ(r.tokens, 40);
  ASSERT_EQ(r.points.size(), 3u);
  for (const ReconstructPoint& p : r.points) {
    EXPECT_EQ(p.tokens, 40);
    EXPECT_DOUBLE_EQ(p.accuracy.value, static_cast<double>(p.correct) / 40);
  }
  EXPECT_TRUE(r.points[2].posterior);

  // t = 0 is the decoder on the encoder's means.
  int64_t correct = 0;
  double variance = 0;
  for (int w = 0; w < 2; ++w) {
    const std::vector<int32_t> all = codec.encode(texts[0]), ids(all.begin() + 20 * w, all.begin() + 20 * (w + 1));
    std::vector<float> z(80), logvar(80), logits(20 * 61);
    const int64_t lengths[] = {20};
    model->encode(ctx, ids, lengths, z.data(), logvar.data());
    for (float l : logvar) variance += std::exp(static_cast<double>(l)) / 160;
    ColaState state = model->new_state(memory);
    const LatentRows rows[] = {{&state, 20}};
    model->decode(ctx, z.data(), rows, logits.data());
    for (size_t i = 0; i < 20; ++i) correct += most_likely(logits.data() + static_cast<int64_t>(i) * 61, 61) == ids[i];
  }
  EXPECT_EQ(r.points[0].correct, correct);
  EXPECT_NEAR(r.posterior_sigma, std::sqrt(variance), 1e-5);
  EXPECT_EQ(json_report(r)["points"].size(), 3u);
  EXPECT_THROW(measure_reconstruction(ctx, *model, codec, texts, 20, 10, {1001}, 3), BadInput);
  EXPECT_THROW(measure_reconstruction(ctx, *model, codec, texts, 2000, 10, {0}, 3), BadInput);
}

}  // namespace
}  // namespace lacuna

// End to end on a tiny random model in the Hugging Face layout: what it says is noise, but every cache
// must be cut, counted, decoded and reported as promised.
#include "eval/runner.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "eval/fidelity.h"
#include "eval/report.h"

namespace lacuna {
namespace {

class TinyModel : public ::testing::Test {
 protected:
  TinyModel() : ctx(memory, 2), model(load_model(ctx, std::filesystem::path(LACUNA_SOURCE_DIR) / "tests/goldens/transformer/qwen2")) {
    ctx.activations = ActivationType::kF32;
    const int64_t vocab = model->info().vocab;
    codec.encode = [vocab](std::string_view text) {
      std::vector<int32_t> ids;
      for (unsigned char c : text) ids.push_back(static_cast<int32_t>((c * 7 + ids.size() % 3) % vocab));
      return ids;
    };
    codec.decode = [](std::span<const int32_t> ids) {
      std::string text;
      for (int32_t id : ids) text += static_cast<char>('a' + id % 26);
      return text;
    };
    options.prefill.chunk = 64;
  }

  TaskPrompt prompt(int64_t tokens, int64_t question = 24) {
    TaskPrompt p;
    p.task = "t";
    p.length = tokens;
    EvalRandom random(9);
    for (int64_t i = 0; i < tokens; ++i) p.ids.push_back(static_cast<int32_t>(random.below(model->info().vocab)));
    p.question_at = tokens - question;
    p.references = {"zzzz"};
    p.new_tokens = 10;
    p.one_line = false;
    return p;
  }

  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;
  TextCodec codec;
  RunnerOptions options;
};

TEST_F(TinyModel, OneBatchAnswersAsEveryCacheWouldAlone) {
  const TaskPrompt p = prompt(200);
  for (const bool agnostic : {false, true})
    for (const FirstToken first : {FirstToken::kDense, FirstToken::kRerun}) {
      options.query_agnostic = agnostic;
      options.first_token = first;
      const auto variants = list_variants({"laprox", "snapkv", "streaming_llm"}, {"30%", "64"}, {"full+int8", "laprox@50%+int4"});
      PromptRunner all(ctx, *model, codec, variants, options);
      const PromptResult together = all.run(p);
      ASSERT_EQ(together.variants.size(), variants.size());
      for (size_t v = 0; v < variants.size(); ++v) {
        PromptRunner one(ctx, *model, codec, {variants[v]}, options);
        const PromptResult alone = one.run(p);
        EXPECT_EQ(alone.variants[0].answer, together.variants[v].answer) << variants[v].label();
        EXPECT_EQ(alone.variants[0].kv_bytes, together.variants[v].kv_bytes);
      }
    }
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

TEST_F(TinyModel, BudgetsAreKeptAndCounted) {
  const TaskPrompt p = prompt(400);
  int64_t heads = 0;
  for (int l = 0; l < model->info().layers; ++l) heads += model->attention(l)->kv_heads;
  PromptRunner runner(ctx, *model, codec, list_variants({"laprox", "snapkv"}, {"64", "25%"}, {"full+int4", "full+int8"}), options);
  const PromptResult r = runner.run(p);
  const auto& variants = runner.variants();
  for (size_t v = 0; v < variants.size(); ++v) {
    const std::string label = variants[v].label();
    if (label == "full") {
      EXPECT_EQ(r.variants[v].kv_bytes, r.full_bytes);
    }
    if (label == "laprox@64" || label == "snapkv@64") {
      EXPECT_EQ(r.variants[v].kv_slots, 64 * heads);
    }
    if (label == "laprox@25%") {
      EXPECT_EQ(r.variants[v].kv_slots, 100 * heads);
    }
    if (variants[v].full()) {
      EXPECT_EQ(r.variants[v].kv_slots, 400 * heads);
    }
    if (label == "full+int4") {
      EXPECT_LT(r.variants[v].kv_bytes, r.full_bytes / 3);
    }
  }
}

TEST_F(TinyModel, ABudgetOfEverythingChangesNothing) {
  const TaskPrompt p = prompt(150);
  PromptRunner runner(ctx, *model, codec, list_variants({"laprox"}, {"100%"}, {}), options);
  const PromptResult r = runner.run(p);
  EXPECT_EQ(r.variants[0].answer, r.variants[1].answer);
  EXPECT_EQ(r.variants[0].answer.size(), 10u);
}

TEST_F(TinyModel, AnswersEndWhereTheyShould) {
  TaskPrompt p = prompt(100);
  PromptRunner runner(ctx, *model, codec, {parse_variant("full")}, options);
  const std::string free = runner.run(p).variants[0].answer;
  ASSERT_EQ(free.size(), 10u);
  p.references = {free.substr(0, 3)};
  EXPECT_EQ(runner.run(p).variants[0].score, 1.0);

  // The third token read as a newline: the answer stops before it.
  TextCodec lines = codec;
  lines.decode = [&](std::span<const int32_t> ids) {
    std::string text = codec.decode(ids);
    for (char& c : text)
      if (c == free[2]) c = '\n';
    return text;
  };
  p.one_line = true;
  PromptRunner by_line(ctx, *model, lines, {parse_variant("full")}, options);
  EXPECT_EQ(by_line.run(p).variants[0].answer, free.substr(0, free.find(free[2])));

  p.one_line = false;
  TextCodec ending = codec;
  for (int32_t id = free[1] - 'a'; id < model->info().vocab; id += 26) ending.end.push_back(id);
  PromptRunner by_end(ctx, *model, ending, {parse_variant("full")}, options);
  EXPECT_EQ(by_end.run(p).variants[0].answer, free.substr(0, free.find(free[1])));
}

TEST_F(TinyModel, AgnosticUseNeedsToKnowTheQuestion) {
  TaskPrompt p = prompt(100);
  p.question_at = 100;
  options.query_agnostic = true;
  PromptRunner runner(ctx, *model, codec, {parse_variant("full")}, options);
  EXPECT_THROW(runner.run(p), BadInput);
}

TEST_F(TinyModel, FidelityOfWholeAndCutCaches) {
  std::string text;
  EvalRandom random(4);
  for (int i = 0; i < 2000; ++i) text += static_cast<char>('a' + random.below(26));
  TextOptions o;
  o.context = 256;
  o.continuation = 32;
  o.windows = 3;
  o.prefill.chunk = 64;
  const auto variants = list_variants({"laprox", "streaming_llm"}, {"100%", "20%"}, {"full+int8", "full+int2"});
  const FidelityResult r = measure_fidelity(ctx, *model, codec, {text}, variants, o);
  ASSERT_EQ(r.windows.size(), 3u);
  EXPECT_EQ(r.tokens, 3 * 31);
  const auto at = [&](const std::string& label) {
    size_t v = 0;
    while (variants[v].label() != label) ++v;
    return r.windows[0][v];
  };
  EXPECT_EQ(at("laprox@100%").kl, 0);
  EXPECT_EQ(at("laprox@100%").layer_error, 0);
  EXPECT_EQ(at("laprox@100%").nats, at("full").nats);
  EXPECT_GT(at("laprox@20%").kl, 0);
  EXPECT_GT(at("laprox@20%").layer_error, 0);
  EXPECT_LT(at("full+int8").kl, at("full+int2").kl);
  EXPECT_LT(at("full+int8").layer_error, 0.05);
  EXPECT_NEAR(r.bytes_per_token, 1.0, 1e-9);
  EXPECT_THROW(measure_fidelity(ctx, *model, codec, {"short"}, variants, o), BadInput);

  // The same likelihoods by another road.
  const PerplexityResult whole = measure_perplexity(ctx, *model, codec, {text}, 288, 0, o.kv, o.prefill);
  EXPECT_EQ(whole.windows, 6);
  EXPECT_EQ(whole.tokens, 6 * 287);
  EXPECT_NEAR(whole.bits_per_byte.value, whole.nats.value / std::log(2.0), 1e-9);
}

TEST_F(TinyModel, PerplexityIsThatOfTheLogits) {
  const std::string text(100, 'q');
  const PerplexityResult r = measure_perplexity(ctx, *model, codec, {text}, 100, 1, options.kv, options.prefill);
  const std::vector<int32_t> ids = codec.encode(text);
  const int64_t vocab = model->info().vocab;
  std::vector<float> logits(ids.size() * static_cast<size_t>(vocab));
  SequenceState state = model->new_state(memory, options.kv);
  prefill(ctx, *model, state, ids, nullptr, options.prefill, nullptr, logits.data());
  double nats = 0;
  for (size_t i = 0; i + 1 < ids.size(); ++i) nats += negative_log_likelihood(logits.data() + static_cast<int64_t>(i) * vocab, vocab, ids[i + 1]);
  EXPECT_NEAR(r.nats.value, nats / 99, 1e-5);
}

TEST_F(TinyModel, SimulatedInt8IsTheEnginesOwn) {
  const auto ids = prompt(70).ids;
  SequenceState wide = model->new_state(memory, options.kv), small = model->new_state(memory, {DType::kI8, 32});
  prefill(ctx, *model, wide, ids, nullptr, options.prefill, nullptr);
  round_to_format(wide.kv, KvFormat::kInt8);
  prefill(ctx, *model, small, ids, nullptr, options.prefill, nullptr);
  const int d = wide.kv.layout(0).head_dim;
  std::vector<float> a(70 * static_cast<size_t>(d)), b(a.size()), va(a.size()), vb(a.size());
  // Layer 0: later ones already differ in what they attend to.
  for (int h = 0; h < wide.kv.kv_heads(0); ++h) {
    kv_read(ctx, wide.kv.layout(0), wide.kv.view(0, h), 0, 70, a.data(), va.data());
    kv_read(ctx, small.kv.layout(0), small.kv.view(0, h), 0, 70, b.data(), vb.data());
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_NEAR(a[i], b[i], 1e-6 * std::fabs(b[i]) + 1e-9);
      ASSERT_NEAR(va[i], vb[i], 1e-6 * std::fabs(vb[i]) + 1e-9);
    }
  }
  EXPECT_EQ(format_bytes(wide.kv, KvFormat::kInt8), small.kv.used_bytes());
}

TEST_F(TinyModel, FewerBitsAreFewerBytesAndMoreError) {
  const auto ids = prompt(90).ids;
  double last_error = 0;
  size_t last_bytes = ~size_t{0};
  for (KvFormat format : {KvFormat::kNative, KvFormat::kInt8, KvFormat::kInt4, KvFormat::kInt3, KvFormat::kInt2}) {
    SequenceState state = model->new_state(memory, options.kv);
    prefill(ctx, *model, state, ids, nullptr, options.prefill, nullptr);
    const KvCache before = state.kv.copy(ctx);
    round_to_format(state.kv, format);
    const size_t n = 90 * static_cast<size_t>(before.layout(0).head_dim);
    std::vector<float> a(n), b(n);
    kv_read(ctx, before.layout(0), before.view(0, 0), 0, 90, a.data(), nullptr);
    kv_read(ctx, before.layout(0), state.kv.view(0, 0), 0, 90, b.data(), nullptr);
    double error = 0;
    for (size_t i = 0; i < n; ++i) error += (a[i] - b[i]) * (a[i] - b[i]);
    if (format == KvFormat::kNative) {
      EXPECT_EQ(error, 0);
    } else {
      EXPECT_GT(error, last_error) << kv_format_name(format);
    }
    EXPECT_LT(format_bytes(state.kv, format), last_bytes);
    last_error = error;
    last_bytes = format_bytes(state.kv, format);
  }
}

TEST(Variants, ListsOfPoliciesWithSwitches) {
  using Names = std::vector<std::string>;
  EXPECT_EQ(split_policies({"laprox:gqa=exact,window=64,snapkv", "criticalkv:adakv:snapkv:window=64,,h2o"}),
            (Names{"laprox:gqa=exact,window=64", "snapkv", "criticalkv:adakv:snapkv:window=64", "h2o"}));
  EXPECT_EQ(split_policies({}), Names{});
}

TEST(Variants, NamesAndRepeats) {
  EXPECT_EQ(parse_variant("laprox@5%+int4").label(), "laprox@5%+int4");
  EXPECT_EQ(parse_variant("full").label(), "full");
  EXPECT_EQ(list_variants({"full", "laprox"}, {"5%", "64"}, {"laprox@5%", "full+int8"}).size(), 4u);
  for (const char* bad : {"laprox", "full@5%", "laprox@x", "nothing@5%", "full+int5", "", "@", "laprox@5%+", "laprox@-5%"})
    EXPECT_THROW(parse_variant(bad), BadInput) << bad;
}

}  // namespace
}  // namespace lacuna

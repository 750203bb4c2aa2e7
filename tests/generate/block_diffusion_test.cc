#include "generate/block_diffusion.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "cola_fixture.h"
#include "generate/sampler.h"

namespace lacuna {
namespace {

using testing_cola::Cola;

TEST(Noise, IsStandardNormalAndAFunctionOfItsNumber) {
  constexpr size_t kCount = 1 << 16;
  std::vector<float> x(kCount), part(7), other(kCount);
  fill_noise(5, 3, x);
  fill_noise(5, 3, part);
  fill_noise(5, 4, other);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), x.begin()));
  double mean = 0, square = 0, fourth = 0, product = 0;
  for (size_t i = 0; i < kCount; ++i) {
    mean += x[i];
    square += x[i] * x[i];
    fourth += std::pow(x[i], 4);
    product += static_cast<double>(x[i]) * other[i];
  }
  EXPECT_NEAR(mean / kCount, 0, 0.02);
  EXPECT_NEAR(square / kCount, 1, 0.03);
  EXPECT_NEAR(fourth / kCount, 3, 0.15);
  EXPECT_NEAR(product / kCount, 0, 0.02);
}

TEST(Grid, GoesFromNoiseToClean) {
  for (int steps : {1, 3, 7, 16, 1000}) {
    const std::vector<float> t = diffusion_grid(steps);
    ASSERT_EQ(t.size(), static_cast<size_t>(steps) + 1);
    EXPECT_EQ(t.front(), 1000);
    EXPECT_EQ(t.back(), 0);
    for (int k = 0; k <= steps; ++k) EXPECT_NEAR(t[static_cast<size_t>(k)], 1000.0 * (1 - k / static_cast<double>(steps)), 1e-3);
  }
}

TEST_F(Cola, TextDoesNotDependOnTheBatch) {
  std::vector<GenerateRequest> requests;
  for (int64_t length : {0, 1, 3, 4, 7, 8, 21}) requests.push_back(request(length, 5 + length));
  requests[2].sampling.temperature = 1;
  auto g = generator();
  const auto together = g.generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto alone = generator().generate({&requests[i], 1})[0];
    EXPECT_EQ(alone.ids, together[i].ids) << i;
    EXPECT_EQ(alone.text, together[i].text) << i;
    EXPECT_EQ(together[i].ids.size(), static_cast<size_t>(requests[i].sampling.max_new_tokens)) << i;
    EXPECT_EQ(together[i].finish, FinishReason::kLength);
    EXPECT_EQ(together[i].prompt_tokens, static_cast<int64_t>(requests[i].prompt.size()));
  }
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

// More rows than one pass over the weights takes.
TEST_F(Cola, BatchOfMoreThanOnePassGivesTheSameTexts) {
  const std::vector<GenerateRequest> requests(90, request(9, 6));
  auto g = generator();
  const auto results = g.generate(requests);
  EXPECT_EQ(g.stats().diffusion->sweeps, 2 * (2 * params.steps + 1) - 1);  // 90 * 8 rows a step, 90 * 12 in the one that commits
  const auto alone = generator().generate({&requests[0], 1})[0];
  for (const auto& r : results) EXPECT_EQ(r.ids, alone.ids);
}

TEST_F(Cola, OneThreadOrManyGiveTheSameText) {
  const GenerateRequest r = request(9, 23);
  const auto two = generator().generate({&r, 1})[0];
  Context single(memory, 1);
  single.activations = ActivationType::kF32;
  EXPECT_EQ(BlockDiffusionGenerator(single, *model, &tokenizer, {}, {}, params).generate({&r, 1})[0].ids, two.ids);
}

TEST_F(Cola, SeedDecidesTheText) {
  GenerateRequest a = request(5, 20), b = a, c = a;
  c.sampling.seed = 1;
  const auto results = generator().generate(std::vector<GenerateRequest>{a, b, c});
  EXPECT_EQ(results[0].ids, results[1].ids);
  EXPECT_NE(results[0].ids, results[2].ids);
}

// Whatever the remainders of prompt and length by the block.
TEST_F(Cola, LengthCountsNewTokensExactly) {
  for (int64_t prompt = 0; prompt <= 9; ++prompt)
    for (int64_t tokens : {1, 2, 3, 4, 5, 9}) {
      const GenerateRequest r = request(prompt, tokens);
      auto g = generator();
      const auto result = g.generate({&r, 1})[0];
      EXPECT_EQ(result.ids.size(), static_cast<size_t>(tokens));
      EXPECT_EQ(g.stats().diffusion->blocks, (prompt % 4 + tokens + 3) / 4);
      // What comes after the last token cannot change those before it.
      const GenerateRequest longer = request(prompt, tokens + 6);
      const auto more = generator().generate({&longer, 1})[0];
      EXPECT_TRUE(std::equal(result.ids.begin(), result.ids.end(), more.ids.begin()));
    }
}

TEST_F(Cola, StreamedTextIsTheResultInWholeCharacters) {
  std::vector<GenerateRequest> requests = {request(3, 30), request(6, 41)};
  requests[1].sampling.temperature = 1.5f;
  std::map<size_t, std::string> streamed;
  GenerateCallbacks callbacks;
  callbacks.on_text = [&](size_t i, std::string_view text) {
    EXPECT_FALSE(text.empty());
    // A piece that begins inside a character would begin with a continuation byte.
    EXPECT_NE(static_cast<unsigned char>(text[0]) & 0xC0, 0x80);
    streamed[i] += text;
  };
  const auto results = generator().generate(requests, callbacks);
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_EQ(streamed[i], results[i].text);
    EXPECT_EQ(results[i].text, tokenizer.decode(results[i].ids));
    EXPECT_FALSE(results[i].text.empty());
  }
}

TEST_F(Cola, EndIdAndStopStringEndASequenceAndCutIt) {
  GenerateRequest plain = request(6, 40);
  const auto full = generator().generate({&plain, 1})[0];
  // An id that comes first somewhere inside.
  size_t at = 0;
  for (size_t i = 5; i < full.ids.size() && at == 0; ++i)
    if (std::find(full.ids.begin(), full.ids.begin() + static_cast<int64_t>(i), full.ids[i]) == full.ids.begin() + static_cast<int64_t>(i)) at = i;
  ASSERT_GT(at, 0u);
  const auto ended = generator({full.ids[at]}).generate({&plain, 1})[0];
  EXPECT_EQ(ended.finish, FinishReason::kEndOfText);
  EXPECT_EQ(ended.ids, std::vector<int32_t>(full.ids.begin(), full.ids.begin() + static_cast<int64_t>(at)));

  plain.sampling.ignore_eos = true;
  EXPECT_EQ(generator({full.ids[at]}).generate({&plain, 1})[0].ids, full.ids);

  plain.sampling.ignore_eos = false;
  plain.sampling.stop = {full.text.substr(full.text.size() / 2, 4)};
  std::string streamed;
  GenerateCallbacks callbacks;
  callbacks.on_text = [&](size_t, std::string_view text) { streamed += text; };
  const auto stopped = generator().generate({&plain, 1}, callbacks)[0];
  EXPECT_EQ(stopped.finish, FinishReason::kStopString);
  EXPECT_EQ(stopped.text, full.text.substr(0, full.text.find(plain.sampling.stop[0])));
  EXPECT_EQ(streamed, stopped.text);
}

TEST_F(Cola, SequencesLeaveTheBatchOnTheirOwn) {
  const std::vector<GenerateRequest> requests = {request(4, 4), request(4, 4), request(4, 40)};
  params.guidance = 1;  // conditional rows alone
  auto g = generator();
  g.generate(requests);
  // One block of three sequences, then nine of one; each but the last of a sequence is committed by the next.
  EXPECT_EQ(g.stats().diffusion->blocks, 12);
  EXPECT_EQ(g.stats().diffusion->sweeps, 10 * params.steps);
  EXPECT_EQ(g.stats().diffusion->rows, 4 * (12 * params.steps + 9));
  EXPECT_EQ(g.stats().decode_tokens, 48);
}

TEST_F(Cola, GuidanceDoublesRowsButNotSweeps) {
  const GenerateRequest r = request(4, 8), empty = request(0, 4);
  auto g = generator();
  g.generate({&r, 1});
  EXPECT_EQ(g.stats().diffusion->sweeps, 2 * params.steps);
  EXPECT_EQ(g.stats().diffusion->rows, 4 * (2 * 2 * params.steps + 1));
  g.generate({&empty, 1});  // there is no history to be guided by
  EXPECT_EQ(g.stats().diffusion->rows, 4 * params.steps);
}

// The ledger's bytes, not a formula, say what a pass costs.
TEST_F(Cola, OnePassReadsTheWeightsOnceForAll) {
  auto bytes = [&](size_t batch) {
    const std::vector<GenerateRequest> requests(batch, request(8, 8));
    auto g = generator();
    g.generate(requests);
    const DiffusionStats& d = *g.stats().diffusion;
    const OpTotals::Sum all = g.stats().decode_ops.total(), dit = d.denoise_ops.total(), vae = d.vae_ops.total();
    EXPECT_GT(vae.weight_bytes, 0);
    EXPECT_EQ(all.weight_bytes, dit.weight_bytes + vae.weight_bytes);
    EXPECT_EQ(all.macs, dit.macs + vae.macs);
    EXPECT_EQ(all.calls, dit.calls + vae.calls);
    return dit.weight_bytes;
  };
  EXPECT_EQ(bytes(1), bytes(6));
}

TEST_F(Cola, OfficialKeepsWholeBlocksAndSpecialTokens) {
  params.official = true;
  GenerateRequest r = request(6, 5);
  const auto result = generator().generate({&r, 1})[0];
  EXPECT_EQ(result.ids.size(), 6u);  // two blocks of 4, of which 2 tokens are the prompt's
  EXPECT_EQ(result.text, tokenizer.decode(result.ids, false));
  r.prompt.clear();
  EXPECT_THROW(generator().generate({&r, 1}), BadInput);
}

// One short request ends the published loop for the whole batch.
TEST_F(Cola, OfficialBatchStopsAsOne) {
  params.official = true;
  std::vector<GenerateRequest> requests = {request(5, 2), request(8, 2)};
  for (const auto& r : generator().generate(requests)) EXPECT_LE(r.ids.size(), 4u);
  requests = {request(5, 12), request(8, 12)};
  const auto results = generator().generate(requests);
  EXPECT_EQ(results[0].ids.size(), 11u);
  EXPECT_EQ(results[1].ids.size(), 12u);
}

class Steps : public DiffusionObserver {
 public:
  void on_prompt(size_t, std::span<const float> latents) override { z.assign(latents.begin(), latents.end()); }
  void on_step(const DenoiseStep& s) override {
    xs.emplace_back(s.x.begin(), s.x.end());
    nexts.emplace_back(s.next.begin(), s.next.end());
    blocks.push_back(s.block);
  }
  std::vector<float> z;
  std::vector<std::vector<float>> xs, nexts;
  std::vector<int64_t> blocks;
};

TEST_F(Cola, InfillHoldsWhatIsGivenAndWritesTheRest) {
  GenerateRequest r = request(6, 1);
  //            block 0's rest | block 1        | block 2, all given | block 3
  r.infill = {-1, 7,              9, -1, -1, 12,   3, 4, 5, 6,          -1, 8};
  Steps steps;
  auto g = generator({7, 8, 9});  // end-of-text ids among the given ones end nothing
  g.observe(&steps);
  std::string streamed;
  GenerateCallbacks callbacks;
  callbacks.on_text = [&](size_t, std::string_view text) { streamed += text; };
  const auto result = g.generate({&r, 1}, callbacks)[0];
  ASSERT_EQ(result.ids.size(), r.infill.size());
  for (size_t i = 0; i < r.infill.size(); ++i) {
    if (r.infill[i] >= 0) {
      EXPECT_EQ(result.ids[i], r.infill[i]) << i;
    }
  }
  EXPECT_EQ(streamed, result.text);
  EXPECT_EQ(g.stats().diffusion->blocks, 3);  // the third has nothing to denoise
  ASSERT_EQ(steps.xs.size(), 3u * static_cast<size_t>(params.steps));

  const int64_t d = model->config().latent_dim();
  for (size_t k = 0; k < steps.xs.size(); ++k)
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t position = 4 + steps.blocks[k] * 4 + i, at = position - 6;
      if (at >= static_cast<int64_t>(r.infill.size()) || (at >= 0 && r.infill[static_cast<size_t>(at)] < 0)) continue;
      for (int64_t c = 0; c < d; ++c) {
        EXPECT_EQ(steps.xs[k][static_cast<size_t>(i * d + c)], steps.z[static_cast<size_t>(position * d + c)]);
        EXPECT_EQ(steps.nexts[k][static_cast<size_t>(i * d + c)], steps.z[static_cast<size_t>(position * d + c)]);
      }
    }

  // A block does not see what is given in later ones.
  GenerateRequest other = r;
  other.infill[11] = 20;
  const auto changed = generator().generate({&other, 1})[0];
  EXPECT_TRUE(std::equal(result.ids.begin(), result.ids.begin() + 10, changed.ids.begin()));

  params.official = true;
  EXPECT_THROW(generator().generate({&r, 1}), BadInput);
}

class Logits : public DiffusionObserver {
 public:
  void on_block(size_t, int64_t, std::span<const float>, std::span<const float> rows) override { logits.insert(logits.end(), rows.begin(), rows.end()); }
  std::vector<float> logits;
};

// One sampler over the rows from left to right, prompt and all tokens before as its history.
TEST_F(Cola, SamplesAsAnAutoregressiveModelWould) {
  GenerateRequest r = request(6, 9);
  r.sampling.temperature = 0.8f;
  r.sampling.top_k = 20;
  r.sampling.top_p = 0.9f;
  r.sampling.repetition_penalty = 1.7f;
  r.sampling.seed = 5;
  Logits seen;
  auto g = generator();
  g.observe(&seen);
  const auto result = g.generate({&r, 1})[0];
  Sampler sampler(r.sampling);
  std::vector<int32_t> history = r.prompt;
  for (size_t row = 2; row < 11; ++row) history.push_back(sampler.sample(std::span(seen.logits).subspan(row * 61, 61), history));
  EXPECT_EQ(std::vector<int32_t>(history.begin() + 6, history.end()), result.ids);
}

// All ids of the blocks before, pinned places' included, are the history of every place of a block; the prompt is not.
TEST_F(Cola, OfficialPenaltyIsOverTheBlocksBefore) {
  params.official = true;
  GenerateRequest r = request(6, 16);
  r.sampling.repetition_penalty = 20;
  Logits seen;
  auto g = generator();
  g.observe(&seen);
  const auto result = g.generate({&r, 1})[0];
  Sampler sampler(r.sampling);
  std::vector<int32_t> history;
  for (size_t block = 0; block < 4; ++block) {
    const std::vector<int32_t> before = history;
    for (size_t row = 4 * block; row < 4 * block + 4; ++row)
      history.push_back(sampler.sample(std::span(seen.logits).subspan(row * 61, 61), before));
  }
  EXPECT_EQ(std::vector<int32_t>(history.begin() + 2, history.end()), result.ids);
}

TEST_F(Cola, ShowsTheTextOfEveryStep) {
  const GenerateRequest r = request(6, 6);
  std::vector<std::string> shown;
  std::vector<std::pair<int64_t, int>> at;
  GenerateCallbacks callbacks;
  callbacks.on_denoise = [&](size_t, int64_t block, int step, std::string_view text) {
    at.emplace_back(block, step);
    shown.emplace_back(text);
  };
  const auto result = generator().generate({&r, 1}, callbacks)[0];
  EXPECT_EQ(result.ids, generator().generate({&r, 1})[0].ids);  // looking changes nothing
  ASSERT_EQ(shown.size(), 2u * static_cast<size_t>(params.steps));
  EXPECT_EQ(at.back(), (std::pair<int64_t, int>{1, params.steps - 1}));
  // Where the last step points at is where it goes: the block's text.
  const auto last = static_cast<size_t>(params.steps) - 1;
  EXPECT_EQ(shown[last] + shown[2 * last + 1], result.text);
}

TEST_F(Cola, CancelStopsAndFreesEverything) {
  const GenerateRequest r = request(6, 400);
  int polls = 0;
  GenerateCallbacks callbacks;
  callbacks.cancelled = [&] { return ++polls > 20; };
  EXPECT_THROW(generator().generate({&r, 1}, callbacks), Cancelled);
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
}

TEST_F(Cola, MemoryLimitIsRefusedAndLeavesNothingBehind) {
  const GenerateRequest r = request(6, 2000);
  memory.set_limit(MemoryTag::kKv, 200000);
  EXPECT_THROW(generator().generate({&r, 1}), OutOfMemory);
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
  memory.set_limit(MemoryTag::kKv, 0);
  const GenerateRequest small = request(6, 8);
  EXPECT_EQ(generator().generate({&small, 1})[0].ids.size(), 8u);
}

TEST_F(Cola, WhatHasNoMeaningIsRefused) {
  GenerateRequest r = request(6, 8);
  r.eviction = EvictionRequest{"laprox", "5%", false, {}};
  EXPECT_THROW(generator().generate({&r, 1}), BadInput);
  r.eviction.reset();
  GenerateCallbacks callbacks;
  callbacks.on_read = [](size_t, const SequenceState&, std::span<const int32_t>) {};
  EXPECT_THROW(generator().generate({&r, 1}, callbacks), BadInput);
  r.prompt[0] = static_cast<int32_t>(model->config().vae.vocab);
  EXPECT_THROW(generator().generate({&r, 1}), BadInput);
  r.prompt[0] = 0;
  r.infill = {-2};
  EXPECT_THROW(generator().generate({&r, 1}), BadInput);
  r.infill.clear();
  r.sampling.stop = {"x"};
  EXPECT_THROW(BlockDiffusionGenerator(ctx, *model, nullptr, {}, {}, params).generate({&r, 1}), BadInput);
  for (auto set : {+[](DiffusionParams& p) { p.steps = 0; }, +[](DiffusionParams& p) { p.steps = 1001; },
                   +[](DiffusionParams& p) { p.guidance = NAN; }, +[](DiffusionParams& p) { p.guidance = -1; }}) {
    DiffusionParams p;
    set(p);
    EXPECT_THROW(BlockDiffusionGenerator(ctx, *model, &tokenizer, {}, {}, p), BadInput);
  }
}

TEST_F(Cola, NoiseFileMustFit) {
  const GenerateRequest r = request(6, 40);  // more blocks than the file has
  params.noise = std::make_shared<NoiseFile>(dir / "io.safetensors");
  EXPECT_THROW(generator().generate({&r, 1}), BadInput);
  EXPECT_THROW(params.noise->get(3, 0, 4, 4), BadInput);
  EXPECT_THROW(params.noise->get(0, 0, 8, 4), BadInput);
  EXPECT_THROW(NoiseFile(dir / "cola_dlm/cola_vae/model.safetensors"), CorruptData);
}

}  // namespace
}  // namespace lacuna

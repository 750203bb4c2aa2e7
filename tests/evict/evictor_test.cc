// Properties of eviction in a running model (laprox.md section 8), for every policy where they apply.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "evict/evictor.h"
#include "evict/score_board.h"
#include "fake_model.h"
#include "formats/json.h"

namespace lacuna {
namespace {

const std::vector<std::string> kSpecs = {"laprox:window=8", "laprox:window=8,gqa=exact,pool_at=none", "laprox:window=4,sinks=2,normalise=output",
                                         "laprox:window=8,budget_counts_window=false", "laprox:window=8,guarantee=0.2",
                                         "snapkv:window=8", "pyramidkv:window=8", "adakv:snapkv:window=8",
                                         "criticalkv:snapkv:window=8", "criticalkv:adakv:snapkv:window=8", "criticalkv:laprox:window=8",
                                         "layer_defensive:window=8", "lava:window=8", "lava:window=8,guarantee=0.2", "cake:window=8",
                                         "expected_attention", "kvzip", "lagkv:lag=8", "h2o", "tova", "keydiff", "knorm", "streaming_llm", "random"};

struct Bench {
  explicit Bench(const FakeShape& shape, uint32_t seed, int threads = 1) : ctx(memory, threads), model(shape, seed), vocab(shape.vocab) {
    ctx.activations = ActivationType::kF32;
  }
  std::vector<float> decode(SequenceState& state, const std::vector<int32_t>& ids, LayerObserver* observer = nullptr) {
    std::vector<float> all, logits(static_cast<size_t>(vocab));
    SequenceState* states[] = {&state};
    LayerObserver* observers[] = {observer};
    for (int32_t id : ids) {
      decode_step(ctx, model, states, {&id, 1}, logits.data(), observers);
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  }
  MemoryAccount memory;
  Context ctx;
  FakeModel model;
  int64_t vocab;
};

// Bit for bit; a function, so that a failure does not print thousands of logits.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<std::vector<std::vector<int32_t>>> positions(const SequenceState& state) {
  EvictionReport report;
  describe_cache(state.kv, report);
  return report.positions;
}

FakeShape random_shape() {
  FakeShape shape;
  shape.layers = *rc::gen::inRange(1, 5);
  shape.kv_heads = *rc::gen::inRange(1, 4);
  shape.query_heads = shape.kv_heads * *rc::gen::inRange(1, 3);
  return shape;
}

RC_GTEST_PROP(Evictor, BudgetOverThePromptIsBitIdenticalToDense, ()) {
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  const int64_t n = *rc::gen::inRange(1, 60);
  Bench b(random_shape(), seed);
  const auto prompt = random_prompt(n, b.vocab, seed);
  const auto policy = make_policy(*rc::gen::elementOf(kSpecs));
  Evictor evictor(b.ctx, b.model, policy, parse_budget(*rc::gen::element<std::string>("60", "100%", "1GiB", "4000")));
  std::vector<float> a(static_cast<size_t>(b.vocab)), c(a);
  SequenceState with = b.model.new_state(b.memory, {}), without = b.model.new_state(b.memory, {});
  prefill(b.ctx, b.model, with, prompt, &evictor, {.chunk = 16}, a.data());
  evictor.finish(with, prompt);
  prefill(b.ctx, b.model, without, prompt, nullptr, {.chunk = 16}, c.data());
  RC_ASSERT(same(a, c));
  RC_ASSERT(!evictor.report(with).evicted);
  const auto answer = random_prompt(5, b.vocab, seed + 1);
  RC_ASSERT(same(b.decode(with, answer), b.decode(without, answer)));
}

// Streaming while the prompt is read, against one shot after a dense prefill; the count; the bytes; the copy.
RC_GTEST_PROP(Evictor, StreamingIsTheOneShotSetAndTheBytesAreTrue, ()) {
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  const std::string spec = *rc::gen::elementOf(kSpecs);
  const int64_t n = *rc::gen::inRange(20, 90), k = *rc::gen::inRange<int64_t>(8, n);
  const int page_slots = *rc::gen::element(4, 16, 32);
  const DType dtype = *rc::gen::element(DType::kF32, DType::kBF16, DType::kI8);
  Bench b(random_shape(), seed, *rc::gen::inRange(1, 4));
  const auto prompt = random_prompt(n, b.vocab, seed);
  const auto policy = make_policy(spec);
  const Budget budget = parse_budget(std::to_string(k));
  const int chunk = *rc::gen::inRange(1, 100);

  Evictor evictor(b.ctx, b.model, policy, budget);
  SequenceState streamed = b.model.new_state(b.memory, {.dtype = dtype, .page_slots = page_slots});
  prefill(b.ctx, b.model, streamed, prompt, &evictor, {.chunk = chunk}, nullptr);
  evictor.finish(streamed, prompt, {.chunk = chunk});

  // The dense run's bytes live in an account of their own, so that the evicted ones can be counted.
  MemoryAccount other;
  ScoreBoard board(b.ctx, b.model, {make_policy("snapkv"), policy});
  SequenceState dense = b.model.new_state(other, {.dtype = dtype, .page_slots = page_slots});
  prefill(b.ctx, b.model, dense, prompt, &board, {.chunk = chunk}, nullptr);
  board.finish(dense, prompt, {}, {.chunk = chunk});
  EvictionReport report;
  const auto keep = board.select(1, budget, dense.kv, &report);
  RC_ASSERT(positions(streamed) == keep);
  SequenceState copy{dense.kv.copy(b.ctx, keep), {}, dense.next_position};
  RC_ASSERT(same(b.decode(copy, prompt), b.decode(streamed, prompt)));

  const SelectionRule rule = policy->rule();
  const int64_t heads = static_cast<int64_t>(b.model.info().layers) * b.model.attention(0)->kv_heads;
  const int64_t each = std::min(n, k + (rule.counts_window ? 0 : rule.window));
  RC_ASSERT(report.entries_kept == heads * each);

  SequenceState again = b.model.new_state(b.memory, {.dtype = dtype, .page_slots = page_slots});
  Evictor second(b.ctx, b.model, policy, budget);
  const size_t held = b.memory.now(MemoryTag::kKv);
  prefill(b.ctx, b.model, again, prompt, &second, {.chunk = chunk}, nullptr);
  second.finish(again, prompt, {.chunk = chunk});
  const EvictionReport r = second.report(again);
  RC_ASSERT(r.allocated_bytes == b.memory.now(MemoryTag::kKv) - held);
  RC_ASSERT(r.used_bytes == static_cast<size_t>(r.entries_kept) * again.kv.layout(0).slot_bytes());
  RC_ASSERT(r.slack_bytes == r.allocated_bytes - r.used_bytes);
  RC_ASSERT(r.allocated_bytes <= bytes_bound(again.kv.shape(), r.entries_kept));
  RC_ASSERT(r.allocated_bytes == report.allocated_bytes);
}

// The cache never holds more than the kept entries and one full layer while the prompt is read.
TEST(Evictor, StreamingPeakIsTheBudgetAndOneLayer) {
  FakeShape shape;
  shape.layers = 8;
  Bench b(shape, 3);
  const auto prompt = random_prompt(600, b.vocab, 1);
  Evictor evictor(b.ctx, b.model, make_policy("laprox"), parse_budget("48"));
  SequenceState state = b.model.new_state(b.memory, {.page_slots = 8});
  b.memory.reset_peak(MemoryTag::kKv);
  prefill(b.ctx, b.model, state, prompt, &evictor, {.chunk = 64}, nullptr);
  CacheSizes layer;
  layer.length = {{600, 600}, {}, {}, {}, {}, {}, {}, {}};
  EXPECT_LE(b.memory.peak(MemoryTag::kKv), bytes_bound(state.kv.shape(), 16 * 48) + bytes_of(state.kv.shape(), layer));
  EXPECT_EQ(state.kv.total_slots(), 16 * 48);
}

RC_GTEST_PROP(Evictor, HardLimitIsNeverPassed, ()) {
  const auto seed = *rc::gen::arbitrary<uint32_t>();
  Bench b(random_shape(), seed);
  const int64_t n = *rc::gen::inRange(10, 120);
  const auto prompt = random_prompt(n, b.vocab, seed);
  const size_t limit = static_cast<size_t>(*rc::gen::inRange(1, 200)) * 1024;
  const bool during_decode = *rc::gen::arbitrary<bool>();
  const auto question = random_prompt(*rc::gen::inRange(0, 30), b.vocab, seed + 2);
  const bool watched = *rc::gen::arbitrary<bool>();  // whether the evictor sees the question
  const std::string spec = *rc::gen::element<std::string>("laprox:window=8", "snapkv:window=8", "cake:window=8", "lava:window=8,guarantee=0.2",
                                                          "layer_defensive:window=8", "h2o");
  b.memory.set_limit(MemoryTag::kKv, limit);
  Evictor evictor(b.ctx, b.model, make_policy(spec), parse_budget(std::to_string(limit) + "B"),
                  {.during_decode = during_decode,
                   .decode_block = *rc::gen::inRange(1, 40),
                   .question_tokens = static_cast<int64_t>(question.size()),
                   .kv_limit = limit});
  SequenceState state = b.model.new_state(b.memory, {.page_slots = 8});
  const auto answer = random_prompt(90, b.vocab, seed + 1);
  try {
    evictor.plan(state, n, static_cast<int64_t>(answer.size()));
  } catch (const OutOfMemory& e) {
    RC_ASSERT(b.memory.now(MemoryTag::kKv) == 0u);
    return;
  } catch (const BadInput& e) {
    return;
  }
  // What was promised holds to the last token; the account would throw otherwise.
  prefill(b.ctx, b.model, state, prompt, &evictor, {.chunk = 16}, nullptr);
  if (!question.empty()) prefill(b.ctx, b.model, state, question, watched ? &evictor : nullptr, {.chunk = 16}, nullptr);
  b.decode(state, answer, &evictor);
  RC_ASSERT(b.memory.peak(MemoryTag::kKv) <= limit);
  RC_ASSERT(state.next_position == n + 90 + static_cast<int64_t>(question.size()));
}

TEST(Evictor, DecodingEvictsAgainInBlocks) {
  FakeShape shape;
  Bench b(shape, 5);
  for (const std::string& spec : kSpecs) {
    if (spec == "kvzip") continue;
    const auto prompt = random_prompt(64, b.vocab, 1);
    Evictor evictor(b.ctx, b.model, make_policy(spec), parse_budget("40"), {.during_decode = true, .decode_block = 10});
    SequenceState state = b.model.new_state(b.memory, {});
    prefill(b.ctx, b.model, state, prompt, &evictor, {}, nullptr);
    const int64_t kept = state.kv.total_slots();
    int64_t most = 0;
    for (int t = 0; t < 35; ++t) {
      b.decode(state, {t % 7}, &evictor);
      most = std::max(most, state.kv.total_slots());
      if (make_policy(spec)->rule().window == 0) continue;  // only a window keeps the newest token in any case
      for (int l = 0; l < shape.layers; ++l)
        for (int h = 0; h < shape.kv_heads; ++h) EXPECT_EQ(state.kv.positions(l, h).back(), 64 + t) << spec;
    }
    EXPECT_LE(most, kept + 10 * 4) << spec;
    EXPECT_EQ(evictor.report(state).rounds, 4) << spec;  // the prompt, and after 10, 20 and 30 tokens
    EXPECT_EQ(state.kv.total_slots(), kept + 5 * 4) << spec;
  }
}

// RoPE is relative: once a prefix is evicted whole, what follows runs as if it had never been there.
TEST(Evictor, KeepingOnlyTheSuffixIsARunOverTheSuffix) {
  FakeShape shape;
  shape.layers = 3;
  Bench b(shape, 9);
  const auto prefix = random_prompt(40, b.vocab, 1), suffix = random_prompt(30, b.vocab, 2);
  SequenceState all = b.model.new_state(b.memory, {});
  prefill(b.ctx, b.model, all, prefix, nullptr, {}, nullptr);
  SequenceState emptied{all.kv.copy(b.ctx, std::vector<std::vector<std::vector<int32_t>>>(3, std::vector<std::vector<int32_t>>(2))), {}, 40};
  SequenceState fresh = b.model.new_state(b.memory, {});
  std::vector<float> a(static_cast<size_t>(30 * b.vocab)), c(a);
  prefill(b.ctx, b.model, emptied, suffix, nullptr, {}, nullptr, a.data());
  prefill(b.ctx, b.model, fresh, suffix, nullptr, {}, nullptr, c.data());
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], c[i], 2e-4) << i;

  // With one layer the same holds for evicting after prefix and suffix were read together.
  FakeShape shallow;
  shallow.layers = 1;
  Bench s(shallow, 9);
  std::vector<int32_t> both = prefix;
  both.insert(both.end(), suffix.begin(), suffix.end());
  Evictor evictor(s.ctx, s.model, make_policy("streaming_llm:sinks=0"), parse_budget("30"));
  SequenceState evicted = s.model.new_state(s.memory, {}), dense = s.model.new_state(s.memory, {});
  prefill(s.ctx, s.model, evicted, both, &evictor, {}, nullptr);
  prefill(s.ctx, s.model, dense, suffix, nullptr, {}, nullptr);
  const auto x = s.decode(evicted, {1, 2, 3}), y = s.decode(dense, {1, 2, 3});
  for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 2e-4) << i;
}

TEST(Evictor, ThreadsAndChunksDoNotMatter) {
  FakeShape shape;
  shape.layers = 3;
  const auto prompt = random_prompt(1500, shape.vocab, 4);
  for (const std::string& spec : kSpecs) {
    std::vector<std::vector<std::vector<std::vector<int32_t>>>> found;
    std::vector<std::vector<float>> logits;
    for (const int threads : {1, 2, 5}) {
      Bench b(shape, 21, threads);
      Evictor evictor(b.ctx, b.model, make_policy(spec), parse_budget("5%"));
      SequenceState state = b.model.new_state(b.memory, {});
      prefill(b.ctx, b.model, state, prompt, &evictor, {.chunk = 256}, nullptr);
      evictor.finish(state, prompt, {.chunk = 256});
      found.push_back(positions(state));
      logits.push_back(b.decode(state, {1, 2, 3}));
    }
    EXPECT_EQ(found[0], found[1]) << spec;
    EXPECT_EQ(found[0], found[2]) << spec;
    EXPECT_TRUE(same(logits[0], logits[1]) && same(logits[0], logits[2])) << spec;
  }
}

// A context compressed without its question: the question is read afterwards, at its true positions.
TEST(Evictor, QuestionAgnostic) {
  FakeShape shape;
  Bench b(shape, 13);
  const auto context = random_prompt(200, b.vocab, 1), question = random_prompt(20, b.vocab, 2);
  Evictor evictor(b.ctx, b.model, make_policy("laprox:window=8"), parse_budget("20%"));
  SequenceState state = b.model.new_state(b.memory, {});
  prefill(b.ctx, b.model, state, context, &evictor, {}, nullptr);
  EXPECT_EQ(state.kv.total_slots(), 4 * 40);
  std::vector<float> logits(static_cast<size_t>(b.vocab));
  prefill(b.ctx, b.model, state, question, nullptr, {}, logits.data());
  EXPECT_EQ(state.kv.total_slots(), 4 * 60);
  EXPECT_EQ(state.kv.positions(0, 0).back(), 219);
  EXPECT_EQ(state.next_position, 220);
  for (float x : logits) EXPECT_TRUE(std::isfinite(x));
}

// A cache that was evicted before is a prompt's past: its slots are candidates like any other.
TEST(Evictor, EvictsWhatAnEarlierCallLeft) {
  FakeShape shape;
  Bench b(shape, 17);
  SequenceState state = b.model.new_state(b.memory, {});
  for (int round = 0; round < 3; ++round) {
    Evictor evictor(b.ctx, b.model, make_policy("laprox:window=8"), parse_budget("30"));
    prefill(b.ctx, b.model, state, random_prompt(50, b.vocab, static_cast<uint32_t>(round)), &evictor, {.chunk = 20}, nullptr);
    EXPECT_EQ(state.kv.total_slots(), 4 * 30);
    EXPECT_TRUE(evictor.report(state).evicted);
  }
  EXPECT_EQ(state.kv.positions(1, 1).back(), 149);
}

// Queries that nobody watched are missing from the window, so those remembered before them are no window.
TEST(Evictor, WindowEndsAtTokensThatWereNotWatched) {
  FakeShape shape;
  shape.layers = 1;
  Bench b(shape, 31);
  PolicyNeeds needs;
  needs.window_rows = 8;
  struct Watch : LayerObserver {
    Watch(Bench& b, const PolicyNeeds& needs) : b(b), needs(needs) {}
    void on_chunk(const LayerTap& tap, SequenceState& state) override {
      witness.observe(b.ctx, tap, *b.model.attention(0), state.kv, needs);
    }
    Bench& b;
    const PolicyNeeds& needs;
    LayerWitness witness;
  } watch(b, needs);
  EvidenceReader reader(b.model, nullptr);
  SequenceState state = b.model.new_state(b.memory, {});
  const auto rows = [&] { return reader.read(b.ctx, state.kv, 0, 0, watch.witness, needs, state.next_position).rows; };
  const auto read = [&](int64_t tokens, LayerObserver* observer) {
    prefill(b.ctx, b.model, state, random_prompt(tokens, b.vocab, 1), observer, {.chunk = 3}, nullptr);
  };
  read(5, &watch);
  EXPECT_EQ(rows(), 5);
  read(6, &watch);
  EXPECT_EQ(rows(), 8);
  read(4, nullptr);
  read(3, &watch);
  EXPECT_EQ(rows(), 3);
}

TEST(Evictor, SlidingWindowsAndLayersWithoutAttention) {
  FakeShape shape;
  shape.layers = 4;
  shape.windows = {0, 24, 0, 24};
  shape.attention = {true, true, false, true};
  for (const std::string& spec : kSpecs) {
    Bench b(shape, 19);
    const auto prompt = random_prompt(100, b.vocab, 1);
    Evictor evictor(b.ctx, b.model, make_policy(spec), parse_budget("50%"));
    SequenceState state = b.model.new_state(b.memory, {.page_slots = 4});
    prefill(b.ctx, b.model, state, prompt, &evictor, {.chunk = 30}, nullptr);
    if (spec == "kvzip") {
      EXPECT_THROW(evictor.finish(state, prompt), Unsupported);
      continue;
    }
    const EvictionReport report = evictor.report(state);
    EXPECT_TRUE(report.evicted) << spec;
    // 2 heads of 100 and 4 of the 23 that a next token can see; policies that do not count their window add it.
    const int64_t extra = make_policy(spec)->rule().counts_window ? 0 : 6 * 8;
    EXPECT_EQ(state.kv.total_slots(), (200 + 4 * 23) / 2 + extra) << spec;
    for (const int l : {1, 3})
      for (int h = 0; h < 2; ++h)
        for (int32_t p : state.kv.positions(l, h)) EXPECT_GT(p, 100 - 24) << spec;
    for (float x : b.decode(state, {1, 2, 3})) ASSERT_TRUE(std::isfinite(x)) << spec;
  }
}

TEST(Evictor, RefusesBeforeTheCacheIsTouched) {
  FakeShape shape;
  Bench b(shape, 23);
  SequenceState state = b.model.new_state(b.memory, {});
  const auto plan = [&](const char* spec, const char* budget, EvictorOptions options, int64_t n) {
    Evictor evictor(b.ctx, b.model, make_policy(spec), parse_budget(budget), options);
    return evictor.plan(state, n, 10);
  };
  EXPECT_THROW(plan("laprox", "16", {}, 100), BadInput);
  EXPECT_THROW(plan("laprox", "1KiB", {}, 100), BadInput);
  EXPECT_THROW(plan("knorm", "mass:0.9", {}, 100), BadInput);
  EXPECT_THROW(plan("laprox", "64", {.kv_limit = 20000}, 500), OutOfMemory);
  EXPECT_THROW(plan("laprox", "mass:0.9", {.during_decode = true, .kv_limit = 1 << 30}, 500), BadInput);
  EXPECT_THROW(Evictor(b.ctx, b.model, make_policy("kvzip"), parse_budget("64"), {.during_decode = true}), BadInput);
  EXPECT_NO_THROW(plan("laprox", "64", {.kv_limit = 1 << 30}, 500));
  EXPECT_EQ(b.memory.now(MemoryTag::kKv), 0u);
}

TEST(Evictor, ReportIsWrittenAsJsonAndPicture) {
  FakeShape shape;
  Bench b(shape, 29);
  const auto prompt = random_prompt(300, b.vocab, 1);
  Evictor evictor(b.ctx, b.model, make_policy("laprox:window=8"), parse_budget("10%"), {.measure_error = true});
  SequenceState state = b.model.new_state(b.memory, {});
  prefill(b.ctx, b.model, state, prompt, &evictor, {}, nullptr);
  const EvictionReport report = evictor.report(state);
  const auto dir = std::filesystem::temp_directory_path() / "lacuna_evict_report";
  std::filesystem::create_directories(dir);
  write_kept_json(report, dir / "kept.json");
  write_kept_svg(report, dir / "kept.svg");
  const auto read = [](const std::filesystem::path& path) {
    std::ifstream in(path);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  const Json json = parse_json(read(dir / "kept.json"), "kept.json");
  EXPECT_EQ(json["policy"], "laprox:window=8");
  EXPECT_EQ(json["entries_kept"], 4 * 30);
  EXPECT_EQ(json["entries_before"], 4 * 300);
  EXPECT_EQ(json["layers"].size(), 2u);
  EXPECT_EQ(json["layers"][1]["heads"][1]["positions"].get<std::vector<int32_t>>(), state.kv.positions(1, 1));
  EXPECT_GT(json["layers"][0]["error"].get<double>(), 0);
  EXPECT_GT(json["layers"][0]["kept_share"].get<double>(), 0);
  const std::string svg = read(dir / "kept.svg");
  EXPECT_TRUE(svg.starts_with("<svg"));
  EXPECT_NE(svg.find("layer 1, KV head 1"), std::string::npos);
  EXPECT_TRUE(svg.ends_with("</svg>\n"));
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace lacuna

// Eviction in the parallel hybrid: its full-attention layers and windows are layers like any other, and its
// sinks are no candidates.
#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "evict/evictor.h"
#include "evict/score_board.h"
#include "models/hybrid_fixture.h"

namespace lacuna {
namespace {

using testing::HybridCheckpoint;
using testing::HybridSpec;

constexpr int64_t kPrompt = 120;
// All but kvzip, which says itself that it needs layers without windows.
const std::vector<std::string> kSpecs = {"laprox:window=8",
                                         "laprox:window=8,gqa=exact,pool_at=none",
                                         "snapkv:window=8",
                                         "pyramidkv:window=8",
                                         "adakv:snapkv:window=8",
                                         "criticalkv:laprox:window=8",
                                         "layer_defensive:window=8",
                                         "lava:window=8",
                                         "cake:window=8",
                                         "expected_attention",
                                         "lagkv:lag=8",
                                         "h2o",
                                         "tova",
                                         "keydiff",
                                         "knorm",
                                         "streaming_llm",
                                         "random"};

struct Bench {
  explicit Bench(const HybridSpec& spec, int threads = 2) : checkpoint(spec), ctx(memory, threads) {
    ctx.activations = ActivationType::kF32;
    model = load_model(ctx, checkpoint.write());
  }
  std::vector<float> decode(SequenceState& state, const std::vector<int32_t>& ids, LayerObserver* observer = nullptr) {
    std::vector<float> all, logits(static_cast<size_t>(model->info().vocab));
    SequenceState* states[] = {&state};
    LayerObserver* observers[] = {observer};
    for (int32_t id : ids) {
      decode_step(ctx, *model, states, {&id, 1}, logits.data(), observers);
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  }
  HybridCheckpoint checkpoint;
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<int32_t> prompt(int64_t n) {
  std::mt19937 rng(4);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % 50);
  return ids;
}

HybridSpec full_and_window() {
  HybridSpec s;
  s.full = {1, 3};
  s.window = 24;
  return s;
}

TEST(HybridEviction, BudgetOverThePromptIsBitIdenticalToDense) {
  Bench b(full_and_window());
  const auto ids = prompt(kPrompt), answer = prompt(6);
  SequenceState dense = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, dense, ids, nullptr, {.chunk = 32}, nullptr);
  const auto wanted = b.decode(dense, answer);
  for (const std::string& spec : kSpecs)
    for (const char* budget : {"120", "100%", "1GiB"}) {
      Evictor evictor(b.ctx, *b.model, make_policy(spec), parse_budget(budget));
      SequenceState state = b.model->new_state(b.memory, {});
      prefill(b.ctx, *b.model, state, ids, &evictor, {.chunk = 32}, nullptr);
      evictor.finish(state, ids);
      EXPECT_FALSE(evictor.report(state).evicted) << spec;
      EXPECT_TRUE(same(b.decode(state, answer), wanted)) << spec << " " << budget;
    }
}

TEST(HybridEviction, TotalsAreExactAndStreamingIsOneShot) {
  Bench b(full_and_window());
  const auto ids = prompt(kPrompt);
  for (const std::string& spec : kSpecs) {
    const auto policy = make_policy(spec);
    const Budget budget = parse_budget("16");
    Evictor evictor(b.ctx, *b.model, policy, budget);
    SequenceState streamed = b.model->new_state(b.memory, {.page_slots = 4});
    const size_t held = b.memory.now(MemoryTag::kKv);
    prefill(b.ctx, *b.model, streamed, ids, &evictor, {.chunk = 32}, nullptr);
    evictor.finish(streamed, ids);
    const EvictionReport r = evictor.report(streamed);
    EXPECT_TRUE(r.evicted) << spec;
    EXPECT_EQ(r.entries_kept, streamed.kv.total_slots()) << spec;
    EXPECT_EQ(r.used_bytes, streamed.kv.used_bytes()) << spec;
    EXPECT_EQ(r.allocated_bytes, b.memory.now(MemoryTag::kKv) - held) << spec;

    ScoreBoard board(b.ctx, *b.model, {policy});
    SequenceState dense = b.model->new_state(b.memory, {.page_slots = 4});
    prefill(b.ctx, *b.model, dense, ids, &board, {.chunk = 32}, nullptr);
    board.finish(dense, ids, {}, {});
    EvictionReport one_shot;
    const auto keep = board.select(0, budget, dense.kv, &one_shot);
    EXPECT_EQ(one_shot.entries_kept, r.entries_kept) << spec;
    SequenceState copy{dense.kv.copy(b.ctx, keep), dense.recurrent.copy(b.memory), dense.next_position};
    const auto answer = prompt(5);
    EXPECT_TRUE(same(b.decode(copy, answer), b.decode(streamed, answer))) << spec;
  }
}

// The whole budget: as many entries as were asked for, over all layers and heads, whatever each got.
TEST(HybridEviction, LaproxKeepsTheBudgetOverTheModel) {
  HybridSpec s;
  s.full = {0, 1, 2, 3};
  Bench b(s);
  Evictor evictor(b.ctx, *b.model, make_policy("laprox:window=8"), parse_budget("30"));
  SequenceState state = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, state, prompt(kPrompt), &evictor, {.chunk = 32}, nullptr);
  EXPECT_EQ(state.kv.total_slots(), 4 * 2 * 30);
}

// With every entry of the cache gone but the newest, a query still sees all sinks: the result is that of a
// model whose cache never held more.
TEST(HybridEviction, SinksAreNeverCandidates) {
  HybridSpec s;
  s.layers = 1;
  s.full = {0};
  s.dense = {};
  s.linear_weight = 0;  // the recurrent state remembers what eviction drops; this is about the cache alone
  Bench b(s);
  const auto ids = prompt(60);
  Evictor evictor(b.ctx, *b.model, make_policy("streaming_llm:sinks=0"), parse_budget("10"));
  SequenceState evicted = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, evicted, ids, &evictor, {}, nullptr);
  HybridSpec narrow = s;
  narrow.full = {};
  narrow.window = 11;
  Bench w(narrow);
  SequenceState windowed = w.model->new_state(w.memory, {});
  prefill(w.ctx, *w.model, windowed, ids, nullptr, {}, nullptr);
  const auto got = b.decode(evicted, {7}), wanted = w.decode(windowed, {7});
  for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], wanted[i], 2e-5) << i;
  HybridSpec bare = narrow;
  bare.sinks = 0;
  Bench without(bare);
  SequenceState plain = without.model->new_state(without.memory, {});
  prefill(without.ctx, *without.model, plain, ids, nullptr, {}, nullptr);
  const auto other = without.decode(plain, {7});
  double difference = 0;
  for (size_t i = 0; i < got.size(); ++i) difference = std::max(difference, std::fabs(double{other[i]} - got[i]));
  EXPECT_GT(difference, 1e-3);  // sinks do matter here
}

// The second pass of kvzip goes through the recurrent states too; the answer must not hear of it.
TEST(HybridEviction, ReplayLeavesTheStatesAsTheyWere) {
  HybridSpec s;
  s.full = {0, 1, 2, 3};
  Bench b(s);
  const auto ids = prompt(50), answer = prompt(6);
  SequenceState dense = b.model->new_state(b.memory, {}), state = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, dense, ids, nullptr, {}, nullptr);
  Evictor evictor(b.ctx, *b.model, make_policy("kvzip"), parse_budget("49"));
  prefill(b.ctx, *b.model, state, ids, &evictor, {}, nullptr);
  evictor.finish(state, ids);
  EXPECT_TRUE(evictor.report(state).evicted);
  for (int layer = 0; layer < 4; ++layer)
    EXPECT_EQ(std::memcmp(state.recurrent.at(layer), dense.recurrent.at(layer),
                          static_cast<size_t>(dense.recurrent.elements(layer)) * sizeof(float)),
              0)
        << layer;
}

// What a layer mixed for the last token, and the evidence about it.
class Tap : public LayerObserver {
 public:
  Tap(Context& ctx, const Model& model, PolicyNeeds needs) : ctx_(ctx), model_(model), needs_(needs) {}
  void on_chunk(const LayerTap& tap, SequenceState& state) override {
    const AttentionLayer& a = *model_.attention(tap.layer);
    ASSERT_NE(tap.cache_share, nullptr);
    witness.observe(ctx_, tap, a, state.kv, needs_);
    share.insert(share.end(), tap.cache_share, tap.cache_share + tap.tokens * a.query_heads);
    const float* end = tap.mixed + tap.tokens * a.query_heads * a.head_dim;
    mixed.assign(end - a.query_heads * a.head_dim, end);
  }
  LayerWitness witness;
  std::vector<float> share, mixed;

 private:
  Context& ctx_;
  const Model& model_;
  PolicyNeeds needs_;
};

// Policies see rows of the one softmax over cache and sinks, of which the cache has a share; and the measured
// error is what really happens when entries go while the sinks stay.
TEST(HybridEviction, EvidenceAndErrorsKnowOfTheSinks) {
  HybridSpec s;
  s.layers = 1;
  s.full = {0};
  s.linear_weight = 0;
  Bench b(s);
  const auto ids = prompt(50);
  PolicyNeeds needs;
  needs.window_rows = 6;
  needs.output_norm = needs.column_sums = true;
  EvidenceReader reader(*b.model, nullptr);
  Tap dense(b.ctx, *b.model, needs);
  SequenceState state = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, state, ids, &dense, {.chunk = 16}, nullptr);
  double least = 1;
  for (int g = 0; g < 2; ++g) {
    const HeadEvidence e = reader.read(b.ctx, state.kv, 0, g, dense.witness, needs, 50);
    ASSERT_EQ(e.rows, 6);
    double columns = 0, shares = 0;
    for (int h = 0; h < 2; ++h) {
      for (int t = 0; t < 6; ++t) {
        double sum = 0;
        for (int64_t i = 0; i < e.slots; ++i) sum += e.probs[(h * 6 + t) * e.slots + i];
        const double share = dense.share[static_cast<size_t>((44 + t) * 4 + g * 2 + h)];
        EXPECT_NEAR(sum, share, 1e-5);
        least = std::min(least, share);
      }
      for (int64_t i = 0; i < e.slots; ++i) columns += e.column_sums[h * e.slots + i];
      for (int t = 0; t < 50; ++t) shares += dense.share[static_cast<size_t>(t * 4 + g * 2 + h)];
    }
    EXPECT_NEAR(columns, shares, 1e-3);
  }
  EXPECT_LT(least, 0.95);  // the sinks do get something

  std::vector<int32_t> all(50), kept;
  for (int32_t i = 0; i < 50; ++i) {
    all[static_cast<size_t>(i)] = i;
    if (i % 3 == 0 || i == 49) kept.push_back(i);
  }
  const auto none = reader.error(b.ctx, state.kv, 0, dense.witness, 1, {all, all});
  EXPECT_LT(none.renormalised, 1e-4 * none.output_norm);
  EXPECT_LT(none.plain, 1e-4 * none.output_norm);
  const auto some = reader.error(b.ctx, state.kv, 0, dense.witness, 1, {kept, kept});

  // The same by doing it: all but the last token, entries gone, then the last token.
  Tap evicted(b.ctx, *b.model, needs);
  SequenceState cut = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, cut, std::span(ids).first(49), nullptr, {}, nullptr);
  kept.pop_back();
  for (int g = 0; g < 2; ++g) cut.kv.keep(b.ctx, 0, g, kept);
  b.decode(cut, {ids.back()}, &evicted);
  const LinearWeight& o = b.model->attention(0)->output;
  double norm = 0, error = 0;
  for (int64_t row = 0; row < o.out(); ++row) {
    double y = 0, e = 0;
    for (int64_t i = 0; i < o.in(); ++i) {
      const double w = o.weight.as<float>()[row * o.in() + i];
      y += w * dense.mixed[static_cast<size_t>(i)];
      e += w * (dense.mixed[static_cast<size_t>(i)] - evicted.mixed[static_cast<size_t>(i)]);
    }
    norm += y * y;
    error += e * e;
  }
  EXPECT_NEAR(some.output_norm, std::sqrt(norm), 1e-4 * std::sqrt(norm));
  EXPECT_NEAR(some.renormalised, std::sqrt(error), 1e-3 * std::sqrt(norm));
  EXPECT_GT(std::sqrt(error), 1e-2 * std::sqrt(norm));
}

TEST(HybridEviction, DecodingEvictsAgain) {
  Bench b(full_and_window());
  Evictor evictor(b.ctx, *b.model, make_policy("laprox:window=8"), parse_budget("20"),
                  {.during_decode = true, .decode_block = 10});
  SequenceState state = b.model->new_state(b.memory, {});
  prefill(b.ctx, *b.model, state, prompt(64), &evictor, {}, nullptr);
  const int64_t kept = state.kv.total_slots();
  b.decode(state, prompt(60), &evictor);
  EXPECT_GT(evictor.report(state).rounds, 3);
  EXPECT_LE(state.kv.total_slots(), kept + 10 * 8);
}

}  // namespace
}  // namespace lacuna

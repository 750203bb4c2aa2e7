#include <gtest/gtest.h>

#include <cstring>

#include "models/forward.h"
#include "models/hybrid_fixture.h"

namespace lacuna {
namespace {

using testing::HybridCheckpoint;
using testing::HybridSpec;
using testing::HybridWalk;
using testing::Rows;

std::vector<int32_t> ids_of(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % 50);
  return ids;
}

struct Engine {
  explicit Engine(const HybridCheckpoint& c, int threads = 2, const LoadOptions& options = {}) : ctx(memory, threads) {
    ctx.activations = ActivationType::kF32;
    model = load_model(ctx, c.write(), options);
  }
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;

  size_t vocab() const { return static_cast<size_t>(model->info().vocab); }
  std::vector<float> all_logits(const std::vector<int32_t>& ids, int64_t chunk, const KvOptions& kv = {}) {
    SequenceState state = model->new_state(memory, kv);
    std::vector<float> logits(ids.size() * vocab());
    PrefillOptions options;
    options.chunk = chunk;
    prefill(ctx, *model, state, ids, nullptr, options, nullptr, logits.data());
    return logits;
  }
  std::vector<float> decode(SequenceState& state, const std::vector<int32_t>& ids) {
    std::vector<float> all, logits(vocab());
    SequenceState* states[] = {&state};
    for (int32_t id : ids) {
      decode_step(ctx, *model, states, {&id, 1}, logits.data());
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  }
};

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

double largest_difference(const std::vector<float>& a, const Rows& b) {
  double worst = 0;
  size_t at = 0;
  for (const auto& row : b)
    for (const double x : row) {
      const double e = std::fabs(a[at++] - x);
      if (!(e <= worst)) worst = e;  // NaN too
    }
  EXPECT_EQ(at, a.size());
  return worst;
}

// One for each switch, and a few together.
std::vector<HybridSpec> specs() {
  std::vector<HybridSpec> all(13);
  all[1].sinks = 0;
  all[2].sigmoid = true;
  all[2].top_k = 2;
  all[3].before = true;
  all[4].learned = true;
  all[5].sink_rope = false;
  all[6].linear_sees_sinks = false;
  all[7].softmax_rope = false;
  all[7].head_dim = 7;
  all[8].experts = 0;
  all[8].tied = true;
  all[9].shared = 0;
  all[9].top_k = 4;
  all[9].bias = false;
  all[10].linear_weight = 0.7;
  all[10].softmax_weight = -0.2;
  all[10].shared = 2;
  all[11].window = 1;
  all[11].full = {};
  all[11].sinks = 40;
  all[12].full = {0, 1, 2, 3};
  all[12].before = all[12].learned = all[12].sigmoid = true;
  all[12].dense = {};
  all[12].kv_heads = 1;
  for (size_t i = 0; i < all.size(); ++i) all[i].seed = static_cast<uint32_t>(i + 1);
  return all;
}

class Hybrid : public ::testing::TestWithParam<size_t> {
 protected:
  HybridCheckpoint checkpoint{specs()[GetParam()]};
};

TEST_P(Hybrid, MatchesTheFormulasInDouble) {
  HybridWalk walk(checkpoint);
  const auto ids = ids_of(60, 3);
  const Rows wanted = walk.logits(ids);
  Engine e(checkpoint);
  OpTotals totals;
  e.ctx.trace = &totals;
  EXPECT_LT(largest_difference(e.all_logits(ids, 1000), wanted), 1e-4);
  // Every token's experts are in the ledger, layer by layer.
  auto counts = totals.expert_tokens();
  counts.resize(static_cast<size_t>(checkpoint.spec.layers));
  EXPECT_EQ(counts, walk.tokens_of_expert);
}

TEST_P(Hybrid, PrefillIsTokenByToken) {
  Engine e(checkpoint);
  const auto ids = ids_of(90, 5);
  const auto whole = e.all_logits(ids, 1000);
  for (int64_t chunk : {1, 7, 32, 89}) EXPECT_LT(largest_difference(e.all_logits(ids, chunk), whole), 1e-4f) << chunk;
  SequenceState state = e.model->new_state(e.memory, {});
  EXPECT_LT(largest_difference(e.decode(state, ids), whole), 1e-4f);
}

TEST_P(Hybrid, ThreadsDoNotMatterBitForBit) {
  const auto ids = ids_of(75, 7);
  EXPECT_EQ(Engine(checkpoint, 1).all_logits(ids, 32), Engine(checkpoint, 3).all_logits(ids, 32));
}

TEST_P(Hybrid, BatchOfRaggedSequencesEqualsEachAlone) {
  Engine e(checkpoint);
  const size_t vocab = e.vocab();
  std::vector<SequenceState> together;
  std::vector<std::vector<float>> alone;
  const std::vector<int32_t> next = {5, 11, 40};
  for (int64_t n : {1, 70, 33}) {
    SequenceState s = e.model->new_state(e.memory, {});
    prefill(e.ctx, *e.model, s, ids_of(n, 7), nullptr, {}, nullptr);
    together.push_back(s.copy(e.ctx));  // a snapshot holds both kinds of state
    alone.push_back(e.decode(s, next));
  }
  std::vector<SequenceState*> states;
  for (auto& s : together) states.push_back(&s);
  for (size_t step = 0; step < next.size(); ++step) {
    std::vector<float> logits(3 * vocab);
    decode_step(e.ctx, *e.model, states, std::vector<int32_t>(3, next[step]), logits.data());
    for (size_t i = 0; i < 3; ++i)
      for (size_t v = 0; v < vocab; ++v) ASSERT_NEAR(logits[i * vocab + v], alone[i][step * vocab + v], 1e-4f) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Switches, Hybrid, ::testing::Range(size_t{0}, specs().size()));

TEST(HybridModel, SinksAndStatesOfTheSameModelAreShared) {
  HybridCheckpoint checkpoint{HybridSpec{}};
  Engine e(checkpoint);
  const auto& info = e.model->info();
  EXPECT_EQ(e.memory.now(MemoryTag::kWeights), info.weight_bytes);
  EXPECT_EQ(e.memory.now(MemoryTag::kKv), 0u);  // sinks are no one's cache
  EXPECT_EQ(e.memory.now(MemoryTag::kState), 0u);
  SequenceState state = e.model->new_state(e.memory, {});
  EXPECT_EQ(e.memory.now(MemoryTag::kKv), 0u);
  EXPECT_EQ(state.recurrent.bytes(), 4u * 2 * 8 * 8 * 4);
  prefill(e.ctx, *e.model, state, ids_of(300, 1), nullptr, {.chunk = 64}, nullptr);
  for (int layer = 0; layer < 4; ++layer) EXPECT_LE(state.kv.length(layer, 0), layer == 2 ? 300 : 8 + 32 + 64);
  EXPECT_EQ(state.kv.length(2, 1), 300);
  int64_t parameters = 0;
  for (const auto& [name, t] : checkpoint.tensors) parameters += static_cast<int64_t>(t.values.size());
  EXPECT_EQ(info.parameters, parameters);
  // A token reads one of four experts in three layers, and no row of the embedding but its own.
  const size_t expert = 3 * 24 * 32 * 4, sinks = info.weight_bytes - static_cast<size_t>(parameters) * 4;
  const size_t states = state.recurrent.bytes();
  EXPECT_EQ(info.token_weight_bytes, info.weight_bytes - states - 3 * 3 * expert - 50 * 32 * 4);
  EXPECT_GT(sinks, states);
  for (int layer = 0; layer < 4; ++layer) {
    ASSERT_NE(e.model->attention(layer), nullptr);
    EXPECT_EQ(e.model->attention(layer)->window, layer == 2 ? 0 : 8);
  }
}

TEST(HybridModel, ReleasesEveryByte) {
  HybridCheckpoint checkpoint{HybridSpec{}};
  MemoryAccount memory;
  Context ctx(memory, 1);
  { auto model = load_model(ctx, checkpoint.write()); }
  EXPECT_EQ(memory.now(MemoryTag::kWeights), 0u);
  EXPECT_EQ(memory.now(MemoryTag::kKv), 0u);
  EXPECT_EQ(ctx.activations, ActivationType::kBF16);  // as it was, though sinks ran in f32
}

TEST(HybridModel, CompactTypesStayClose) {
  HybridCheckpoint checkpoint{HybridSpec{}};
  Engine exact(checkpoint);
  const auto ids = ids_of(60, 9);
  const auto reference = exact.all_logits(ids, 60);
  double power = 0;
  for (float x : reference) power += double{x} * x;
  const auto relative = [&](const std::vector<float>& other) {
    double error = 0;
    for (size_t i = 0; i < other.size(); ++i) error += std::pow(double{other[i]} - reference[i], 2);
    return std::sqrt(error / power);
  };
  KvOptions bf16, int8;
  bf16.dtype = DType::kBF16;
  int8.dtype = DType::kI8;
  EXPECT_LT(relative(exact.all_logits(ids, 60, bf16)), 0.05);
  EXPECT_LT(relative(exact.all_logits(ids, 60, int8)), 0.1);
  LoadOptions quantised;
  quantised.weights = WeightMode::kInt8;
  // An expert chosen by a narrow margin may change: the bound is on the whole.
  EXPECT_LT(relative(Engine(checkpoint, 2, quantised).all_logits(ids, 60)), 0.3);
}

// Every linear layer but router and head reads spike counts: those of both branches and of all experts.
TEST(HybridModel, SpikesMatchTheFormulas) {
  for (const bool before : {false, true})
    for (const SpikeMode mode : {SpikeMode::kReference, SpikeMode::kPaper}) {
      HybridSpec spec;
      spec.before = before;
      spec.top_k = 2;
      HybridCheckpoint checkpoint{spec};
      HybridWalk walk(checkpoint);
      walk.spike_k = 3;
      walk.spike_down = mode == SpikeMode::kPaper;
      const auto ids = ids_of(12, 3);
      const Rows wanted = walk.logits(ids);
      LoadOptions options;
      options.spikes.use = SpikeUse::kFake;
      options.spikes.mode = mode;
      Engine e(checkpoint, 2, options);
      EXPECT_LT(largest_difference(e.all_logits(ids, 1000), wanted), 5e-4) << before;
      walk.spike_k = 0;
      EXPECT_GT(largest_difference(e.all_logits(ids, 1000), walk.logits(ids)), 0.01);  // and coding shows
    }
}

TEST(HybridModel, IntegerAndEventSpikesAgree) {
  HybridCheckpoint checkpoint{HybridSpec{}};
  const auto ids = ids_of(20, 4);
  LoadOptions options;
  options.weights = WeightMode::kInt8;
  options.spikes.mode = SpikeMode::kPaper;
  std::vector<std::vector<float>> logits;
  for (const SpikeUse use : {SpikeUse::kFake, SpikeUse::kInteger, SpikeUse::kEvent}) {
    options.spikes.use = use;
    Engine e(checkpoint, 2, options);
    OpTotals totals;
    e.ctx.trace = &totals;
    logits.push_back(e.all_logits(ids, 1000));
    EXPECT_GT(totals.total().spikes, 0);
    EXPECT_GT(totals.of(OpKind::kExpert).experts, 0);
  }
  EXPECT_LT(largest_difference(logits[1], logits[0]), 1e-3f);
  EXPECT_LT(largest_difference(logits[2], logits[1]), 1e-3f);
}

std::string load_error(const HybridCheckpoint& c) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  try {
    load_model(ctx, c.write());
  } catch (const Error& e) {
    EXPECT_NE(e.kind(), ErrorKind::kInternal) << e.what();
    EXPECT_EQ(memory.now(MemoryTag::kWeights), 0u);
    return e.what();
  }
  return "";
}

TEST(HybridModel, WrongCheckpointsAreSentences) {
  const auto says = [](HybridCheckpoint& c, std::initializer_list<const char*> parts) {
    const std::string what = load_error(c);
    for (const char* part : parts) EXPECT_NE(what.find(part), std::string::npos) << what << "\nlacks: " << part;
  };
  for (const char* name : {"model.layers.1.mlp.router.weight", "model.layers.3.mlp.experts.3.down_proj.weight",
                           "model.layers.2.mlp.shared_experts.0.up_proj.weight", "model.layers.0.mlp.gate_proj.weight",
                           "model.layers.0.attn.linear.k_proj.bias", "model.sink_embeddings"}) {
    HybridCheckpoint c{HybridSpec{}};
    c.tensors.erase(name);
    says(c, {name});
  }
  HybridCheckpoint shape{HybridSpec{}};
  shape.config["num_sink_tokens"] = 6;
  says(shape, {"model.sink_embeddings", "[5, 32]", "[6, 32]"});
  HybridCheckpoint experts{HybridSpec{}};
  experts.config["num_experts"] = 3;
  says(experts, {"mlp.router.weight", "[4, 32]", "[3, 32]"});
  HybridCheckpoint top{HybridSpec{}};
  top.config["num_experts_per_tok"] = 5;
  says(top, {"config.json", "num_experts_per_tok", "from 1 to 4"});
  HybridCheckpoint nan{HybridSpec{}};
  nan.tensors["model.layers.1.mlp.router.weight"].values[7] = std::nanf("");
  says(nan, {"mlp.router.weight", "not finite", "7"});
}

}  // namespace
}  // namespace lacuna

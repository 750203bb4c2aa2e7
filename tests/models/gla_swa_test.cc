#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "formats/safetensors.h"
#include "formats/safetensors_writer.h"
#include "models/forward.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

// 4 layers, window 8, groups of 2 heads of 16.
fs::path golden() { return fs::path(LACUNA_SOURCE_DIR) / "tests/goldens/spikingbrain/base_T24"; }
constexpr int64_t kWindow = 8;
constexpr int32_t kVocab = 71;

std::vector<int32_t> ids_of(int64_t n, uint32_t seed) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<int32_t>((seed * 2654435761u + i * i * 40503u + i * 97u) % static_cast<uint32_t>(kVocab));
  return ids;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  float worst = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

struct Engine {
  explicit Engine(WindowRule window = WindowRule::kConfig, const fs::path& dir = golden(), LoadOptions options = {},
                  int threads = 2)
      : ctx(memory, threads) {
    ctx.activations = ActivationType::kF32;
    options.window = window;
    model = load_model(ctx, dir, options);
  }
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;

  SequenceState new_state(const KvOptions& kv = {}) { return model->new_state(memory, kv); }
  // Reads ids in calls of the given lengths (the last serves what is left; 0 = one token by decode_step), and
  // returns all logits.
  std::vector<float> read(SequenceState& state, std::span<const int32_t> ids, std::vector<int64_t> calls = {1 << 20},
                          int64_t chunk = 512, LayerObserver* observer = nullptr) {
    std::vector<float> logits(ids.size() * static_cast<size_t>(kVocab));
    size_t at = 0;
    for (size_t i = 0; at < ids.size(); ++i) {
      const int64_t wish = calls[std::min(i, calls.size() - 1)];
      const size_t n = std::min(ids.size() - at, static_cast<size_t>(std::max<int64_t>(1, wish)));
      float* to = logits.data() + at * static_cast<size_t>(kVocab);
      if (wish == 0) {
        SequenceState* states[] = {&state};
        decode_step(ctx, *model, states, ids.subspan(at, 1), to);
      } else {
        prefill(ctx, *model, state, ids.subspan(at, n), observer, {.chunk = chunk}, nullptr, to);
      }
      at += n;
    }
    return logits;
  }
};

// The window's size is the rule, not the cutting, so that any call pattern must give the same logits where the rule
// does not depend on calls. Jumps past the window and chunks longer than it among them: the published code is
// wrong there.
TEST(GlaSwa, AnyCallPatternIsRight) {
  const auto ids = ids_of(90, 3);
  for (const WindowRule rule : {WindowRule::kExact, WindowRule::kPlusOne}) {
    Engine e(rule);
    SequenceState whole = e.new_state();
    const auto expected = e.read(whole, ids);
    const std::vector<std::vector<int64_t>> patterns = {{0}, {1}, {3}, {8, 0}, {9, 4}, {8, 40, 0, 0, 5}, {20, 0, 30, 1}, {2, 88}};
    for (const auto& calls : patterns)
      for (const int64_t chunk : {512, 5}) {
        SequenceState state = e.new_state();
        EXPECT_LT(largest_difference(e.read(state, ids, calls, chunk), expected), 2e-4f) << calls[0] << " chunk " << chunk;
        EXPECT_EQ(state.next_position, 90);
      }
  }
}

// Official: one key more in the first call, whatever its chunks; afterwards none, whatever the calls.
TEST(GlaSwa, OfficialRuleDependsOnTheFirstCallOnly) {
  const auto ids = ids_of(60, 5);
  Engine official(WindowRule::kOfficial), plus(WindowRule::kPlusOne), exact(WindowRule::kExact);
  SequenceState a = official.new_state(), b = plus.new_state(), c = exact.new_state();
  const auto first = official.read(a, std::span(ids).first(40), {40}, 6);
  EXPECT_EQ(first, plus.read(b, std::span(ids).first(40), {40}, 6));
  EXPECT_GT(largest_difference(first, exact.read(c, std::span(ids).first(40))), 1e-2f);

  SequenceState d = official.new_state();
  official.read(d, std::span(ids).first(40), {40}, 40);
  const auto rest = std::span(ids).subspan(40);
  const auto one_by_one = official.read(a, rest, {0});
  EXPECT_LT(largest_difference(one_by_one, official.read(d, rest, {3, 11, 0})), 2e-4f);
  EXPECT_GT(largest_difference(one_by_one, plus.read(b, rest, {0})), 1e-2f);
}

TEST(GlaSwa, CacheStaysBoundedForEveryCallPattern) {
  for (const std::vector<int64_t>& calls : std::vector<std::vector<int64_t>>{{0}, {1}, {3}, {8, 100}, {300, 0}, {9, 0, 57}}) {
    Engine e;
    SequenceState state = e.new_state({DType::kF32, 4});
    const auto ids = ids_of(400, 7);
    size_t at = 0;
    for (size_t i = 0; at < ids.size(); ++i) {
      const int64_t wish = calls[std::min(i, calls.size() - 1)];
      const size_t n = std::min(ids.size() - at, static_cast<size_t>(std::max<int64_t>(1, wish)));
      e.read(state, std::span(ids).subspan(at, n), {wish}, 16);
      at += n;
      for (const int layer : {1, 3})
        // One slot more after the call that starts, and what whole pages hold besides.
        ASSERT_LE(state.kv.length(layer, 0), kWindow + 1 + 4) << at;
      EXPECT_EQ(state.kv.kv_heads(0), 0);
    }
    EXPECT_EQ(state.recurrent.bytes(), 2u * 2 * 16 * 16 * 4);
    EXPECT_EQ(e.memory.now(MemoryTag::kState), state.recurrent.bytes());
  }
}

TEST(GlaSwa, BatchOfRaggedSequencesEqualsEachAlone) {
  Engine e;
  const int64_t lengths[] = {1, 40, 7};
  std::vector<SequenceState> together;
  std::vector<std::vector<float>> alone, batched(3);
  for (const int64_t n : lengths) {
    SequenceState s = e.new_state(), t = e.new_state();
    e.read(s, ids_of(n, 7));
    e.read(t, ids_of(n, 7));
    alone.push_back(e.read(s, std::vector<int32_t>{5, 11, 60}, {0}));
    together.push_back(std::move(t));
  }
  for (const int32_t id : {5, 11, 60}) {
    std::vector<SequenceState*> states;
    for (auto& s : together) states.push_back(&s);
    std::vector<float> logits(3 * static_cast<size_t>(kVocab));
    decode_step(e.ctx, *e.model, states, std::vector<int32_t>(3, id), logits.data());
    for (size_t i = 0; i < 3; ++i)
      batched[i].insert(batched[i].end(), logits.begin() + static_cast<std::ptrdiff_t>(i * kVocab),
                        logits.begin() + static_cast<std::ptrdiff_t>((i + 1) * kVocab));
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_LT(largest_difference(batched[i], alone[i]), 2e-4f) << i;
}

// A layer over rows of several sequences at once, some of which start with it and some of which go on.
TEST(GlaSwa, RowsOfOneCallMayStartOrGoOn) {
  Engine e(WindowRule::kOfficial);
  const auto ids = ids_of(64, 9);
  SequenceState fresh = e.new_state(), old = e.new_state();
  e.read(old, std::span(ids).first(30));
  SequenceState fresh_alone = e.new_state(), old_alone = old.copy(e.ctx);
  const int64_t d = e.model->info().hidden, n = 17;
  std::vector<float> both(static_cast<size_t>(2 * n * d)), one(static_cast<size_t>(n * d)), two(one);
  e.model->embed(e.ctx, std::span(ids).first(static_cast<size_t>(n)), one.data());
  e.model->embed(e.ctx, std::span(ids).subspan(30, static_cast<size_t>(n)), two.data());
  std::copy(one.begin(), one.end(), both.begin());
  std::copy(two.begin(), two.end(), both.begin() + n * d);
  LayerObserver* none[] = {nullptr, nullptr};
  for (int layer = 0; layer < 4; ++layer) {
    const BatchRows rows[] = {{&fresh, 0, n, 0, n}, {&old, n, n, 30, 30 + n}};
    e.model->forward_layer(e.ctx, layer, both.data(), 2 * n, rows, none, 0, n);
    const BatchRows first{&fresh_alone, 0, n, 0, n}, second{&old_alone, 0, n, 30, 30 + n};
    e.model->forward_layer(e.ctx, layer, one.data(), n, {&first, 1}, {none, 1}, 0, n);
    e.model->forward_layer(e.ctx, layer, two.data(), n, {&second, 1}, {none, 1}, 0, n);
  }
  one.insert(one.end(), two.begin(), two.end());
  EXPECT_LT(largest_difference(both, one), 2e-4f);
}

// A prefix read once, continued twice: as if each had been read whole.
TEST(GlaSwa, SnapshotContinuedTwiceEqualsFreshRuns) {
  Engine e(WindowRule::kExact);
  const auto prefix = ids_of(50, 1);
  SequenceState base = e.new_state();
  e.read(base, prefix);
  for (const uint32_t seed : {2u, 3u}) {
    const auto rest = ids_of(20, seed);
    SequenceState snapshot = base.copy(e.ctx);
    const auto continued = e.read(snapshot, rest, {6, 0});
    auto all = prefix;
    all.insert(all.end(), rest.begin(), rest.end());
    SequenceState fresh = e.new_state();
    const auto expected = e.read(fresh, all);
    EXPECT_LT(largest_difference(continued, {expected.end() - static_cast<std::ptrdiff_t>(continued.size()), expected.end()}), 2e-4f);
    // The same calls from the same snapshot: the same bits.
    SequenceState again = base.copy(e.ctx);
    EXPECT_EQ(continued, e.read(again, rest, {6, 0}));
    EXPECT_EQ(base.next_position, 50);
  }
}

TEST(GlaSwa, CompactTypesStayClose) {
  Engine exact;
  const auto ids = ids_of(64, 9);
  SequenceState state = exact.new_state();
  const auto reference = exact.read(state, ids);
  double power = 0;
  for (float x : reference) power += double{x} * x;
  const auto relative = [&](const std::vector<float>& other) {
    double error = 0;
    for (size_t i = 0; i < other.size(); ++i) error += std::pow(double{other[i]} - reference[i], 2);
    return std::sqrt(error / power);
  };
  SequenceState bf16 = exact.new_state({DType::kBF16, 32}), int8 = exact.new_state({DType::kI8, 32});
  EXPECT_LT(relative(exact.read(bf16, ids)), 0.05);
  EXPECT_LT(relative(exact.read(int8, ids)), 0.08);
  LoadOptions quantised;
  quantised.weights = WeightMode::kInt8;
  Engine small(WindowRule::kConfig, golden(), quantised);
  SequenceState other = small.new_state();
  EXPECT_LT(relative(small.read(other, ids)), 0.15);
}

TEST(GlaSwa, OutlineIsWhatLoads) {
  Engine e;
  const ModelOutline o = outline_model(golden());
  EXPECT_EQ(o.architecture, e.model->info().architecture);
  EXPECT_EQ(o.layers, e.model->info().layers);
  EXPECT_EQ(o.hidden, e.model->info().hidden);
  EXPECT_EQ(o.vocab, e.model->info().vocab);
  SequenceState state = e.new_state();
  EXPECT_EQ(static_cast<size_t>(o.state_bytes), state.recurrent.bytes());
  int attention = 0, windows = 0;
  for (int l = 0; l < o.layers; ++l) {
    attention += e.model->attention(l) != nullptr;
    windows += e.model->attention(l) && e.model->attention(l)->window > 0;
  }
  EXPECT_EQ(o.attention_layers, attention);
  EXPECT_EQ(o.window_layers, windows);
  EXPECT_EQ(o.recurrent_layers, 2);
  EXPECT_EQ(o.window, kWindow);
}

// A copy of the golden checkpoint that may be changed.
class ChangedCheckpoint : public testing::Test {
 protected:
  using Json = nlohmann::json;
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("lacuna_gla_swa_" + std::to_string(getpid()));
    fs::remove_all(dir_);
    fs::create_directory(dir_);
    std::ifstream in(golden() / "config.json");
    config_ = Json::parse(in);
    const SafetensorsFile file(golden() / "model.safetensors");
    for (const auto& [name, entry] : file.entries()) {
      const Tensor t = file.get(name);
      tensors_[name] = {std::vector<int64_t>(t.shape.begin(), t.shape.begin() + t.rank),
                        std::vector<float>(t.as<float>(), t.as<float>() + t.elements())};
    }
  }
  void TearDown() override { fs::remove_all(dir_); }

  void write() {
    std::ofstream(dir_ / "config.json") << config_;
    std::vector<SafetensorsWriter::Spec> specs;
    for (const auto& [name, t] : tensors_) specs.push_back({name, DType::kF32, t.shape});
    SafetensorsWriter writer(dir_ / "model.safetensors", specs);
    for (const auto& [name, t] : tensors_) writer.write(name, t.data.data(), t.data.size() * sizeof(float));
    writer.commit();
  }
  std::vector<float> logits(int64_t n = 40, WindowRule rule = WindowRule::kConfig) {
    write();
    Engine e(rule, dir_);
    SequenceState state = e.new_state();
    return e.read(state, ids_of(n, 13));
  }
  std::string error_of(const std::function<void()>& act) {
    try {
      act();
    } catch (const CorruptData& e) {
      return e.what();
    } catch (const std::exception& e) {
      return std::string("another error: ") + e.what();
    }
    return "no error";
  }

  struct Data {
    std::vector<int64_t> shape;
    std::vector<float> data;
  };
  fs::path dir_;
  Json config_;
  std::map<std::string, Data> tensors_;
};

// W8ASpike's layout: the gate's two matrices multiplied out.
TEST_F(ChangedCheckpoint, OneGateMatrixEqualsTwo) {
  const auto expected = logits();
  for (const int layer : {0, 2}) {
    const std::string at = "model.layers." + std::to_string(layer) + ".attn.gk_proj.";
    const Data a = tensors_[at + "0.weight"], b = tensors_[at + "1.weight"];
    const int64_t out = b.shape[0], rank = b.shape[1], in = a.shape[1];
    Data full{{out, in}, std::vector<float>(static_cast<size_t>(out * in))};
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r)
          sum += double{b.data[static_cast<size_t>(o * rank + r)]} * a.data[static_cast<size_t>(r * in + i)];
        full.data[static_cast<size_t>(o * in + i)] = static_cast<float>(sum);
      }
    tensors_[at + "weight"] = full;
    tensors_[at + "bias"] = tensors_[at + "1.bias"];
    tensors_.erase(at + "0.weight");
    tensors_.erase(at + "1.weight");
    tensors_.erase(at + "1.bias");
  }
  EXPECT_LT(largest_difference(logits(), expected), 1e-3f);
}

TEST_F(ChangedCheckpoint, TwoKindsOfGateAreOneTooMany) {
  tensors_["model.layers.0.attn.gk_proj.weight"] = {{32, 64}, std::vector<float>(32 * 64)};
  const std::string what = error_of([&] { logits(); });
  EXPECT_NE(what.find("gk_proj.0.weight"), std::string::npos) << what;
}

TEST_F(ChangedCheckpoint, TiedEmbeddings) {
  config_["tie_word_embeddings"] = true;
  const auto tied = logits();
  config_["tie_word_embeddings"] = false;
  tensors_["lm_head.weight"] = tensors_["model.embeddings.weight"];
  EXPECT_EQ(tied, logits());
}

// A layer without a window sees all: as a window of all tokens.
TEST_F(ChangedCheckpoint, LayersOfFullAttention) {
  config_["full_attention_layers"] = {1, 3};
  const auto full = logits();
  config_["full_attention_layers"] = {3};
  const auto half = logits();
  config_.erase("full_attention_layers");
  const auto windowed = logits();
  config_["sliding_window"] = 40;
  EXPECT_EQ(full, logits());
  EXPECT_GT(largest_difference(full, windowed), 1e-2f);
  EXPECT_GT(largest_difference(half, full), 1e-3f);
  EXPECT_GT(largest_difference(half, windowed), 1e-3f);
}

TEST_F(ChangedCheckpoint, TheOptionGoesBeforeTheConfiguration) {
  const auto official = logits();
  const auto exact = logits(40, WindowRule::kExact);
  config_["window_rule"] = "exact";
  EXPECT_EQ(exact, logits());
  EXPECT_EQ(official, logits(40, WindowRule::kPlusOne));
  EXPECT_GT(largest_difference(official, exact), 1e-2f);
}

TEST_F(ChangedCheckpoint, MissingAndMisshapenTensorsAreNamed) {
  tensors_.erase("model.layers.2.attn.g_norm.weight");
  std::string what = error_of([&] { logits(); });
  EXPECT_NE(what.find("model.layers.2.attn.g_norm.weight"), std::string::npos) << what;
  config_["gate_low_rank_dim"] = 8;
  what = error_of([&] { logits(); });
  for (const char* part : {"gk_proj.0.weight", "[16, 64]", "[8, 64]"}) EXPECT_NE(what.find(part), std::string::npos) << what;
}

TEST_F(ChangedCheckpoint, NanIsFoundAtLoad) {
  tensors_["model.layers.2.attn.gk_proj.1.bias"].data[3] = NAN;
  const std::string what = error_of([&] { logits(); });
  EXPECT_NE(what.find("model.layers.2.attn.gk_proj.1.bias"), std::string::npos) << what;
}

// Weights that are numbers, activations that are not: a sentence, not NaN logits.
TEST_F(ChangedCheckpoint, OverflowInTheGateIsAnError) {
  for (float& x : tensors_["model.layers.0.mlp.down_proj.weight"].data) x = 3e38f;
  const std::string what = error_of([&] { logits(); });
  for (const char* part : {"layer 2", "not finite", "log decay"}) EXPECT_NE(what.find(part), std::string::npos) << what;
}

}  // namespace
}  // namespace lacuna

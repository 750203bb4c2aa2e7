// Spike coding of whole models beyond the official goldens: int8 checkpoints, decoders, refusals.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "models/forward.h"
#include "models/weights.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

fs::path golden(const char* name) { return fs::path(LACUNA_SOURCE_DIR) / "tests/goldens" / name; }

struct Loaded {
  Loaded(const fs::path& dir, LoadOptions options, int threads = 2) : ctx(memory, threads) {
    ctx.activations = ActivationType::kF32;
    model = load_model(ctx, dir, options);
  }
  std::vector<float> logits(LayerObserver* observer = nullptr, int64_t chunk = 4) {
    std::vector<int32_t> ids;
    for (int i = 0; i < 11; ++i) ids.push_back((i * 7 + 3) % static_cast<int>(model->info().vocab));
    SequenceState state = model->new_state(memory, {});
    std::vector<float> out(ids.size() * static_cast<size_t>(model->info().vocab));
    prefill(ctx, *model, state, ids, observer, {.chunk = chunk}, nullptr, out.data());
    return out;
  }
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;
};

LoadOptions with(SpikeUse use, SpikeMode mode = SpikeMode::kConfig, WeightMode weights = WeightMode::kInt8,
                 std::optional<float> k = std::nullopt) {
  LoadOptions o;
  o.spikes = {use, mode, k};
  o.weights = weights;
  return o;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double d = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    d += std::pow(a[i] - b[i], 2.0);
    size += std::pow(b[i], 2.0);
  }
  return std::sqrt(d / size);
}

// A copy of a golden model with a field of config.json changed.
class ChangedModel {
 public:
  ChangedModel(const char* name, const std::function<void(nlohmann::json&)>& change)
      : dir_(fs::temp_directory_path() / fmt::format("lacuna-spike-{}-{}", ::getpid(), next_++)) {
    fs::create_directories(dir_);
    for (const auto& e : fs::directory_iterator(golden(name)))
      if (e.path().filename() != "io.safetensors") fs::copy_file(e.path(), dir_ / e.path().filename());
    std::ifstream in(dir_ / "config.json");
    nlohmann::json config = nlohmann::json::parse(in);
    in.close();
    change(config);
    fs::remove(dir_ / "config.json");
    std::ofstream(dir_ / "config.json") << config.dump();
  }
  ~ChangedModel() { fs::remove_all(dir_); }
  const fs::path& dir() const { return dir_; }

 private:
  static inline int next_ = 0;
  fs::path dir_;
};

constexpr const char* kModels[] = {"spikingbrain/base_T24", "transformer/llama", "transformer/qwen3"};

TEST(SpikeModel, ArithmeticsAgree) {
  for (const char* name : kModels) {
    for (const SpikeMode mode : {SpikeMode::kReference, SpikeMode::kPaper}) {
      const std::vector<float> integer = Loaded(golden(name), with(SpikeUse::kInteger, mode)).logits();
      EXPECT_EQ(integer, Loaded(golden(name), with(SpikeUse::kEvent, mode), 1).logits()) << name;
      EXPECT_LT(distance(Loaded(golden(name), with(SpikeUse::kFake, mode)).logits(), integer), 2e-2) << name;
    }
    EXPECT_NE(Loaded(golden(name), with(SpikeUse::kInteger, SpikeMode::kReference)).logits(),
              Loaded(golden(name), with(SpikeUse::kInteger, SpikeMode::kPaper)).logits())
        << name << ": down_proj is coded in paper mode only";
  }
}

// The finer the spikes, the nearer the dense int8 model; none of it without being asked for.
TEST(SpikeModel, FinerSpikesComeNearTheDenseModel) {
  for (const char* name : kModels) {
    LoadOptions dense;
    dense.weights = WeightMode::kInt8;
    const std::vector<float> exact = Loaded(golden(name), dense).logits();
    EXPECT_EQ(exact, Loaded(golden(name), with(SpikeUse::kOff)).logits());
    double last = 1e9;
    for (const float k : {3.0f, 30.0f, 3000.0f}) {
      const double d = distance(
          Loaded(golden(name), with(SpikeUse::kInteger, SpikeMode::kPaper, WeightMode::kInt8, k)).logits(), exact);
      EXPECT_LT(d, last) << name << " k " << k;
      last = d;
    }
    EXPECT_LT(last, 2e-3) << name;
  }
}

TEST(SpikeModel, FloatWeightsCanBeFakeQuantisedOnly) {
  for (const char* name : kModels) {
    EXPECT_THROW(Loaded(golden(name), with(SpikeUse::kInteger, SpikeMode::kConfig, WeightMode::kStored)), Unsupported)
        << name;
    EXPECT_THROW(Loaded(golden(name), with(SpikeUse::kEvent, SpikeMode::kConfig, WeightMode::kStored)), Unsupported)
        << name;
    const std::vector<float> fine =
        Loaded(golden(name), with(SpikeUse::kFake, SpikeMode::kPaper, WeightMode::kStored, 3000.0f)).logits();
    EXPECT_LT(distance(fine, Loaded(golden(name), {}).logits()), 2e-3) << name;
  }
}

class SiteRecorder : public LayerObserver {
 public:
  bool wants_spikes() const override { return true; }
  void on_spikes(const SpikeTap& tap) override {
    seen.insert({tap.layer, tap.site});
    if (tap.layer == 1 && tap.site == SpikeSite::kMlpIn) total += tap.counts.rows[0].total;
  }
  std::set<std::pair<int, SpikeSite>> seen;
  int64_t total = 0;
};

TEST(SpikeModel, ConfigSaysWhereAndHowFinely) {
  const auto coding = [](double k_mlp, double k_o) {
    return [=](nlohmann::json& c) {
      nlohmann::json rows = nlohmann::json::array();
      for (int i = 0; i < c["num_hidden_layers"].get<int>(); ++i) rows.push_back({3.0, i == 0 ? k_o : 3.0, k_mlp, 3.0});
      c["spike_coding"] = {{"mode", "paper"}, {"k", 3.0}, {"k_by_layer", rows}};
    };
  };
  const ChangedModel coarse("spikingbrain/base_T24", coding(2.0, 0)), fine("spikingbrain/base_T24", coding(8.0, 3.0));
  SiteRecorder a, b, c;
  Loaded(coarse.dir(), with(SpikeUse::kAuto)).logits(&a);
  Loaded(fine.dir(), with(SpikeUse::kAuto)).logits(&b);
  Loaded(fine.dir(), with(SpikeUse::kAuto, SpikeMode::kReference)).logits(&c);
  EXPECT_GT(b.total, 3 * a.total);
  EXPECT_FALSE(a.seen.count({0, SpikeSite::kOIn})) << "k = 0 leaves an input as it is";
  EXPECT_TRUE(b.seen.count({0, SpikeSite::kOIn}));
  EXPECT_TRUE(b.seen.count({0, SpikeSite::kDownIn}));
  EXPECT_FALSE(c.seen.count({0, SpikeSite::kDownIn})) << "the caller's mode goes before the config's";
  EXPECT_FALSE(b.seen.count({1, SpikeSite::kQuery})) << "queries are coded in W8ASpike checkpoints only";
}

TEST(SpikeModel, FaultsInTheConfig) {
  const auto expect_corrupt = [](const nlohmann::json& field) {
    const ChangedModel m("spikingbrain/base_T24", [&](nlohmann::json& c) { c["spike_coding"] = field; });
    EXPECT_THROW(Loaded(m.dir(), with(SpikeUse::kAuto)), CorruptData) << field;
  };
  expect_corrupt({{"mode", "both"}});
  expect_corrupt({{"k", -1}});
  expect_corrupt({{"k", "three"}});
  expect_corrupt(7);
  expect_corrupt({{"k_by_layer", {1, 2}}});
  expect_corrupt({{"k_by_layer", {{3, 3, 3}, {3, 3, 3}, {3, 3, 3}, {3, 3, 3}}}});
  expect_corrupt({{"k_by_layer", {{3, 3, 3, -1}, {3, 3, 3, 3}, {3, 3, 3, 3}, {3, 3, 3, 3}}}});
  EXPECT_THROW(
      Loaded(golden("spikingbrain/base_T24"), with(SpikeUse::kInteger, SpikeMode::kConfig, WeightMode::kInt8, -2.0f)),
      BadInput);
  const ChangedModel group("spikingbrain/w8aspike", [](nlohmann::json& c) { c["quant_weight_group_size"] = 64; });
  EXPECT_THROW(Loaded(group.dir(), {}), CorruptData) << "scales are for groups of 128";
}

// Weights are charged once, as they are held; the ledger has the coded layers as spikes.
TEST(SpikeModel, BytesAndLedger) {
  for (const SpikeUse use : {SpikeUse::kFake, SpikeUse::kInteger, SpikeUse::kEvent}) {
    Loaded m(golden("spikingbrain/w8aspike"), with(use, SpikeMode::kPaper, WeightMode::kStored));
    OpTotals totals;
    m.ctx.trace = &totals;
    m.logits(nullptr, 512);
    m.ctx.trace = nullptr;
    // 2 layers: q, k, v, (gk), o, gate, up, down.
    EXPECT_EQ(totals.of(OpKind::kSpike).calls, 15);
    const auto& spike = totals.of(OpKind::kSpike);
    EXPECT_EQ(spike.synaptic_ops > 0, use == SpikeUse::kEvent);
    EXPECT_GT(spike.silent_inputs, 0);
    EXPECT_GT(spike.inputs, spike.silent_inputs);
    EXPECT_GE(m.memory.now(MemoryTag::kWeights), m.model->info().weight_bytes);
  }
  MemoryAccount account;
  {
    Context ctx(account, 1);
    const auto model = load_model(ctx, golden("spikingbrain/w8aspike"),
                                  with(SpikeUse::kEvent, SpikeMode::kPaper, WeightMode::kStored));
    EXPECT_GT(account.now(MemoryTag::kWeights), 0u);
  }
  EXPECT_EQ(account.now(MemoryTag::kWeights), 0u);
}

}  // namespace
}  // namespace lacuna

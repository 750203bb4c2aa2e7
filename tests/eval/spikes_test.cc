// Spike statistics on tiny models in the published layouts: counted against counts that a test observer takes.
#include "eval/spikes.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>

namespace lacuna {
namespace {

std::filesystem::path golden(const char* name) {
  return std::filesystem::path(LACUNA_SOURCE_DIR) / "tests/goldens" / name;
}

struct Subject {
  explicit Subject(const char* name, LoadOptions options = {})
      : ctx(memory, 2), model(load_model(ctx, golden(name), options)) {
    ctx.activations = ActivationType::kF32;
    const int64_t vocab = model->info().vocab;
    codec.encode = [vocab](std::string_view text) {
      std::vector<int32_t> ids;
      for (unsigned char c : text) ids.push_back(static_cast<int32_t>(c % vocab));
      return ids;
    };
    codec.before = {1};
  }
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;
  TextCodec codec;
};

LoadOptions spiking(SpikeUse use, SpikeMode mode = SpikeMode::kConfig, WeightMode weights = WeightMode::kStored) {
  LoadOptions o;
  o.spikes = {use, mode, std::nullopt};
  o.weights = weights;
  return o;
}

const std::vector<std::string> kTexts = {
    "It was the best of times, it was the worst of times, it was the age of wisdom."};

SpikeResult measure(Subject& s) { return measure_spikes(s.ctx, *s.model, s.codec, kTexts, 16, 3, {}, {.chunk = 5}); }

// Windows one by one through an observer of our own.
class Counter : public LayerObserver {
 public:
  bool wants_spikes() const override { return true; }
  void on_spikes(const SpikeTap& tap) override {
    for (int64_t i = 0; i < tap.counts.m * tap.counts.k; ++i) {
      ++inputs[tap.site];
      zeros[tap.site] += tap.counts.counts[i] == 0;
      macs += tap.fan_out;
    }
  }
  std::map<SpikeSite, int64_t> inputs, zeros;
  int64_t macs = 0;
};

TEST(SpikeEval, CountsWhatTheLayersFire) {
  Subject s("spikingbrain/w8aspike", spiking(SpikeUse::kEvent, SpikeMode::kPaper));
  const SpikeResult r = measure(s);
  EXPECT_EQ(r.windows, 3);
  EXPECT_EQ(r.tokens, 48);
  Counter counter;
  for (const auto& ids : spread_windows(*s.model, s.codec, kTexts, 16, 3)) {
    SequenceState state = s.model->new_state(s.memory, {});
    prefill(s.ctx, *s.model, state, ids, &counter, {}, nullptr);
  }
  int64_t linear_inputs = 0;
  for (const SpikeSite site :
       {SpikeSite::kAttnIn, SpikeSite::kOIn, SpikeSite::kMlpIn, SpikeSite::kDownIn, SpikeSite::kQuery}) {
    EXPECT_EQ(r.of(site).inputs, counter.inputs[site]) << spike_site_name(site);
    EXPECT_EQ(r.of(site).zero, counter.zeros[site]) << spike_site_name(site);
    EXPECT_GT(r.of(site).inputs, 0);
    if (site != SpikeSite::kQuery) linear_inputs += counter.inputs[site];
  }
  const SpikeStats total = r.of(SpikeSite::kCount);
  EXPECT_EQ(total.inputs, linear_inputs);
  EXPECT_EQ(total.dense_macs, counter.macs);
  // Event-driven layers add once a spike and output; the statistics and the ledger agree.
  EXPECT_EQ(r.executed.synaptic_ops, total.synaptic_ops);
  EXPECT_EQ(r.executed.silent_inputs > 0, total.zero > 0);
}

TEST(SpikeEval, ReportsCarryEveryDefinition) {
  Subject s("spikingbrain/w8aspike", spiking(SpikeUse::kInteger));
  const SpikeResult r = measure(s);
  const Json json = json_report(r);
  for (const char* key :
       {"zero_count_share", "mean_count", "mean_popcount", "at_most_7_share", "above_16_share", "zero_slot_share_3",
        "zero_slot_share_max", "silent_window_share", "window_share_1", "silent_channels_per_row", "ops_per_mac"}) {
    EXPECT_TRUE(json["total"].contains(key)) << key;
    EXPECT_TRUE(json["layers"][0].contains(key)) << key;
  }
  EXPECT_FALSE(json["sites"].contains("down_in")) << "down_proj is not coded in reference mode";
  EXPECT_TRUE(json.contains("queries"));
  EXPECT_DOUBLE_EQ(json["total"]["zero_count_share"].get<double>(), r.of(SpikeSite::kCount).zero_count_share());
  EXPECT_EQ(json["executed"]["synaptic_ops"], 0);
  const std::string text = markdown_report(r);
  EXPECT_NE(text.find("silent windows"), std::string::npos);
  EXPECT_NE(text.find("| 1 query"), std::string::npos);
}

// Any decoder codes its activations once its weights are int8; integer and event count the same.
TEST(SpikeEval, DecodersCodeTheirActivationsToo) {
  Subject integer("transformer/qwen2", spiking(SpikeUse::kInteger, SpikeMode::kPaper, WeightMode::kInt8));
  Subject event("transformer/qwen2", spiking(SpikeUse::kEvent, SpikeMode::kPaper, WeightMode::kInt8));
  const SpikeStats a = measure(integer).of(SpikeSite::kCount), b = measure(event).of(SpikeSite::kCount);
  EXPECT_GT(a.inputs, 0);
  EXPECT_EQ(a.spikes, b.spikes);
  EXPECT_EQ(a.windows, b.windows);
}

TEST(SpikeEval, RefusesAModelWithoutSpikes) {
  Subject s("transformer/qwen2");
  EXPECT_THROW(measure(s), BadInput);
}

}  // namespace
}  // namespace lacuna

// Every case of spike coding below LACUNA_GOLDENS (default tests/goldens): time codes of the official
// Int2Spike (folders below `spikingbrain` that hold numbers but no model), and the encoder, neuron and
// linear layers of W8ASpike models there. A case that can't be read, or that holds a key unknown here, fails.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "base/error.h"
#include "formats/config_file.h"
#include "formats/safetensors.h"
#include "goldens.h"
#include "kernels/spike_linear.h"
#include "models/forward.h"
#include "spike/time_code.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using golden::golden_root;
using golden::split;

bool holds_folders(const fs::path& dir) {
  return std::any_of(fs::directory_iterator(dir), fs::directory_iterator(),
                     [](const auto& e) { return e.is_directory(); });
}

// Folders below one named spikingbrain: those with a model, or those without.
std::vector<std::string> find_cases(bool with_model) {
  std::vector<std::string> cases;
  const fs::path root = golden_root();
  const auto consider = [&](const fs::path& dir) {
    const fs::path whole = fs::absolute(dir).lexically_normal();
    if (std::none_of(whole.begin(), whole.end(), [](const fs::path& part) { return part == "spikingbrain"; })) return;
    if (fs::exists(dir / "config.json") != with_model) return;
    // A folder without numbers is a case that can't be read, unless it only holds others.
    if (!fs::exists(dir / "io.safetensors") && (with_model || holds_folders(dir))) return;
    cases.push_back(fs::relative(dir, root).string());
  };
  if (fs::exists(root)) consider(root);
  std::error_code error;
  for (fs::recursive_directory_iterator it(root, fs::directory_options::follow_directory_symlink, error), end;
       !error && it != end; it.increment(error))
    if (it->is_directory()) consider(it->path());
  std::sort(cases.begin(), cases.end());
  return cases;
}

// Numbers of one case, by key; every key must be read by some test.
class Numbers {
 public:
  explicit Numbers(const fs::path& path) : file_(path) {}
  const SafetensorsFile& file() const { return file_; }
  bool has(const std::string& name) const { return file_.entries().count(name) > 0; }
  std::vector<int64_t> shape(const std::string& name) const { return file_.entries().at(name).shape; }
  std::vector<int64_t> integers(const std::string& name) const {
    const Tensor t = file_.get(name);
    std::vector<int64_t> out;
    for (int64_t i = 0; i < t.elements(); ++i) switch (t.dtype) {
        case DType::kI8:
          out.push_back(t.as<int8_t>()[i]);
          break;
        case DType::kI16:
          out.push_back(t.as<int16_t>()[i]);
          break;
        case DType::kI32:
          out.push_back(t.as<int32_t>()[i]);
          break;
        case DType::kI64:
          out.push_back(t.as<int64_t>()[i]);
          break;
        default:
          throw CorruptData("{}: found dtype {}, expected integers", name, dtype_name(t.dtype));
      }
    return out;
  }
  std::vector<int32_t> counts(const std::string& name) const {
    const std::vector<int64_t> wide = integers(name);
    return {wide.begin(), wide.end()};
  }
  std::vector<float> floats(const std::string& name) const {
    const Tensor t = file_.get(name);
    if (t.dtype != DType::kF32) throw CorruptData("{}: found dtype {}, expected f32", name, dtype_name(t.dtype));
    return {t.as<float>(), t.as<float>() + t.elements()};
  }
  std::vector<std::string> keys() const {
    std::vector<std::string> out;
    for (const auto& [name, entry] : file_.entries()) out.push_back(name);
    return out;
  }

 private:
  SafetensorsFile file_;
};

std::vector<int64_t> widened(const std::vector<int8_t>& planes) { return {planes.begin(), planes.end()}; }

// ---- Int2Spike -----------------------------------------------------------------------------------

class TimeCodeGolden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { io_ = std::make_unique<Numbers>(golden_root() / GetParam() / "io.safetensors"); }
  std::unique_ptr<Numbers> io_;
};

TEST_P(TimeCodeGolden, EveryKeyIsKnown) {
  std::set<std::string> sets;
  for (const std::string& key : io_->keys())
    if (key.starts_with("x.")) sets.insert(key.substr(2));
  EXPECT_FALSE(io_->keys().empty()) << "io.safetensors holds no tensors";
  const std::set<std::string> results = {"T", "spikes", "zero", "decoded", "rate"};
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    bool known = part[0] == "x" && part.size() == 2;
    if (part[0] == "ex") known = part.size() == 3 && (parse_time_code(part[1]), true);
    if (part[0] == "mm")
      known = key == "mm.w" || (part.size() == 3 && part[2] == "y" && (parse_time_code(part[1]), true));
    if (part[0] == "wbits") known = key == "wbits.planes" || key == "wbits.zero";
    if (part.size() == 3 && results.count(part[2])) known = sets.count(part[1]) && (parse_time_code(part[0]), true);
    EXPECT_TRUE(known) << "io.safetensors holds \"" << key << "\", which no test here reads";
  }
}

TEST_P(TimeCodeGolden, TrainsWithZeroPoints) {
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    if (part.size() != 3 || part[2] != "spikes") continue;
    const TimeCode code = parse_time_code(part[0]);
    const std::string at = part[0] + "." + part[1] + ".";
    const std::vector<int32_t> x = io_->counts("x." + part[1]);
    const SpikeTrain train = encode_spikes(code, x, ZeroPoint::kCentred);
    EXPECT_EQ(train.steps, io_->integers(at + "T").at(0)) << at;
    EXPECT_EQ(train.steps, io_->shape(key).at(0)) << at;
    EXPECT_EQ(widened(train.planes), io_->integers(key)) << at;
    EXPECT_EQ(train.zero, io_->integers(at + "zero")) << at;
    EXPECT_EQ(decode_spikes(train), io_->integers(at + "decoded")) << at;
    EXPECT_NEAR(firing_rate(train), io_->floats(at + "rate").at(0), 1e-6) << at;
    EXPECT_EQ(decoded_counts(train), std::vector<int64_t>(x.begin(), x.end())) << at;
  }
}

TEST_P(TimeCodeGolden, SingleValues) {
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    if (part[0] != "ex") continue;
    const int32_t value = std::stoi(part.at(2));
    const SpikeTrain train = encode_spikes(parse_time_code(part[1]), {&value, 1});
    EXPECT_EQ(widened(train.planes), io_->integers(key)) << key;
  }
}

TEST_P(TimeCodeGolden, Products) {
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    if (part[0] != "mm" || part.size() != 3) continue;
    const TimeCode code = parse_time_code(part[1]);
    const std::string x = is_signed(code) ? "x.signed" : "x.unsigned";
    const std::vector<int64_t> w_shape = io_->shape("mm.w");
    const std::vector<int32_t> w = io_->counts("mm.w"), counts = io_->counts(x);
    const int64_t k = w_shape.at(0), m = static_cast<int64_t>(counts.size()) / k;
    EXPECT_EQ(spike_matmul(encode_spikes(code, counts), m, k, w.data(), w_shape.at(1)), io_->integers(key)) << key;
  }
}

TEST_P(TimeCodeGolden, BitSlicedWeights) {
  if (!io_->has("wbits.planes")) return;
  const std::vector<int32_t> w = io_->counts("mm.w");
  const lacuna::BitSlicedWeights sliced = slice_weights(w);
  EXPECT_EQ(sliced.bits, io_->shape("wbits.planes").at(0));
  EXPECT_EQ(widened(sliced.planes), io_->integers("wbits.planes"));
  for (int64_t zero : io_->integers("wbits.zero")) EXPECT_EQ(zero, sliced.zero);
}

INSTANTIATE_TEST_SUITE_P(Cases, TimeCodeGolden, testing::ValuesIn(find_cases(false)), golden::case_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TimeCodeGolden);

// ---- W8ASpike ------------------------------------------------------------------------------------

class W8ASpikeGolden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { io_ = std::make_unique<Numbers>(golden_root() / GetParam() / "io.safetensors"); }
  std::unique_ptr<Numbers> io_;
};

TEST_P(W8ASpikeGolden, TimeCodes) {
  const std::set<std::string> results = {"in", "spikes", "decoded", "rate"};
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    if (part[0] != "enc") continue;
    const TimeCode code = parse_time_code(part.at(1));
    const std::string at = "enc." + part[1] + ".";
    const std::vector<int32_t> in = io_->counts(at + "in");
    const bool truncated = part.at(2).starts_with("spikes_T");
    EXPECT_TRUE(truncated || results.count(part[2]))
        << "io.safetensors holds \"" << key << "\", which no test here reads";
    const std::optional<int64_t> steps =
        truncated ? std::optional<int64_t>(std::stoll(part[2].substr(8))) : std::nullopt;
    const SpikeTrain train = encode_spikes(code, in, ZeroPoint::kNone, steps);
    if (part[2].starts_with("spikes")) {
      EXPECT_EQ(train.steps, io_->shape(key).at(0)) << key;
      EXPECT_EQ(widened(train.planes), io_->integers(key)) << key;
    }
    if (part[2] == "decoded") {
      EXPECT_EQ(decode_spikes(train), io_->integers(key)) << key;
    }
    if (part[2] == "rate") {
      EXPECT_NEAR(firing_rate(train), io_->floats(key).at(0), 1e-6) << key;
    }
  }
}

// Weights of one linear layer as the official quantiser sees them.
struct QuantLinear {
  PackedSpikeWeight packed;
  std::vector<int16_t> codes;
  std::vector<float> bias;
};

QuantLinear quant_linear(Context& ctx, const Tensor& weight, const Tensor& scales, const float* bias,
                         SpikeArithmetic a) {
  QuantLinear l;
  const int64_t out = weight.shape[0], in = weight.shape[1], groups = scales.shape[1];
  if (bias) l.bias.assign(bias, bias + out);
  l.codes.resize(static_cast<size_t>(out * in));
  quantize_groups(ctx, weight, scales.as<float>(), in / groups, l.codes.data());
  l.packed = pack_spike_weight(ctx, Tensor(l.codes.data(), DType::kI16, {out, in}), scales.as<float>(), in / groups,
                               bias ? l.bias.data() : nullptr, a);
  return l;
}

constexpr SpikeArithmetic kArithmetics[] = {SpikeArithmetic::kFake, SpikeArithmetic::kInteger, SpikeArithmetic::kEvent};

struct Fired {
  std::vector<int32_t> counts;
  std::vector<SpikeRow> rows;
  std::vector<int64_t> wide() const { return {counts.begin(), counts.end()}; }
};

Fired fire(Context& ctx, const std::vector<float>& x, int64_t m, float k = 3) {
  Fired f;
  f.counts.resize(x.size());
  f.rows.resize(static_cast<size_t>(m));
  fire_neurons(ctx, x.data(), m, static_cast<int64_t>(x.size()) / m, k, f.counts.data(), f.rows.data());
  return f;
}

void expect_thresholds(const Fired& f, const std::vector<float>& expected, const std::string& what) {
  ASSERT_EQ(f.rows.size(), expected.size()) << what;
  for (size_t r = 0; r < expected.size(); ++r)
    EXPECT_NEAR(f.rows[r].threshold, expected[r], 1e-6 * expected[r]) << what << " row " << r;
}

TEST_P(W8ASpikeGolden, UnitLinear) {
  if (!io_->has("ql.x")) return;
  MemoryAccount memory;
  Context ctx(memory, 2);
  ctx.activations = ActivationType::kF32;
  const int64_t m = io_->shape("ql.x").at(0);
  const Fired f = fire(ctx, io_->floats("ql.x"), m);
  EXPECT_EQ(f.wide(), io_->integers("ql.spikes"));
  expect_thresholds(f, io_->floats("ql.vth"), "ql.vth");
  const std::vector<float> bias = io_->floats("ql.bias"), expected = io_->floats("ql.y");
  const Tensor weight = io_->file().get("ql.weight");
  const int64_t out = weight.shape[0];
  for (const SpikeArithmetic a : kArithmetics) {
    const QuantLinear l = quant_linear(ctx, weight, io_->file().get("ql.scales"), bias.data(), a);
    EXPECT_EQ(std::vector<int64_t>(l.codes.begin(), l.codes.end()), io_->integers("ql.codes"));
    std::vector<float> y(expected.size());
    spike_linear(ctx, l.packed.view, {f.counts.data(), f.rows.data(), m, weight.shape[1]}, y.data());
    for (int64_t r = 0; r < m; ++r) {
      float most = 0;
      for (int64_t o = 0; o < out; ++o) most = std::max(most, std::fabs(expected[static_cast<size_t>(r * out + o)]));
      for (int64_t o = 0; o < out; ++o)
        EXPECT_NEAR(y[static_cast<size_t>(r * out + o)], expected[static_cast<size_t>(r * out + o)], 1e-5 * most)
            << spike_arithmetic_name(a) << " ql.y row " << r << " output " << o;
    }
  }
}

TEST_P(W8ASpikeGolden, Codes) {
  const ModelFiles model = ModelFiles::open(golden_root() / GetParam());
  MemoryAccount memory;
  Context ctx(memory, 2);
  for (const std::string& key : io_->keys()) {
    if (!key.starts_with("codes.")) continue;
    const std::string name = key.substr(6);
    const QuantLinear l = quant_linear(ctx, model.get(name + ".weight"), model.get(name + ".weight_quantizer.scales"),
                                       nullptr, SpikeArithmetic::kInteger);
    EXPECT_EQ(std::vector<int64_t>(l.codes.begin(), l.codes.end()), io_->integers(key)) << key;
  }
}

// The site whose counts a linear layer takes.
std::string site_of(const std::string& linear) {
  if (linear == "o_proj") return "o_in";
  if (linear == "gate_proj" || linear == "up_proj") return "mlp_in";
  if (linear == "down_proj") return "down_in";
  return "attn_in";
}

TEST_P(W8ASpikeGolden, LayersFromTheirStoredInputs) {
  const ModelFiles model = ModelFiles::open(golden_root() / GetParam());
  MemoryAccount memory;
  Context ctx(memory, 2);
  ctx.activations = ActivationType::kF32;
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    if (part.size() == 4 && part[3] == "x") {
      const std::string at = part[0] + "." + part[1] + "." + part[2] + ".";
      const Fired f = fire(ctx, io_->floats(key), io_->shape(key).at(0));
      EXPECT_EQ(f.wide(), io_->integers(at + "spikes")) << at;
      expect_thresholds(f, io_->floats(at + "vth"), at + "vth");
    }
    if (part.size() != 4 || part[3] != "out") continue;
    const std::string input = part[0] + "." + part[1] + "." + site_of(part[2]) + ".x";
    const bool mlp = part[2] == "gate_proj" || part[2] == "up_proj" || part[2] == "down_proj";
    const std::string name = "model.layers." + part[1].substr(1) + (mlp ? ".mlp." : ".attn.") + part[2];
    const std::vector<float> x = io_->floats(input), expected = io_->floats(key);
    const int64_t m = io_->shape(input).at(0);
    const Fired f = fire(ctx, x, m);
    const float* bias = model.has(name + ".bias") ? model.get(name + ".bias").as<float>() : nullptr;
    for (const SpikeArithmetic a : kArithmetics) {
      const QuantLinear l =
          quant_linear(ctx, model.get(name + ".weight"), model.get(name + ".weight_quantizer.scales"), bias, a);
      std::vector<float> y(expected.size());
      spike_linear(ctx, l.packed.view, {f.counts.data(), f.rows.data(), m, l.packed.view.in}, y.data());
      for (size_t i = 0; i < y.size(); ++i)
        EXPECT_NEAR(y[i], expected[i], 2e-4) << spike_arithmetic_name(a) << " " << key << " at " << i;
    }
  }
}

// ---- W8ASpike, whole -----------------------------------------------------------------------------

// Counts, thresholds and tensors of every layer by the goldens' names, rows one after the other.
class Recorder : public LayerObserver {
 public:
  bool wants_tensors() const override { return true; }
  bool wants_spikes() const override { return true; }
  void on_tensor(const TensorTap& tap) override {
    auto& rows = tensors["L" + std::to_string(tap.layer) + "." + tap.name];
    rows.insert(rows.end(), tap.data, tap.data + tap.tokens * tap.width);
  }
  void on_spikes(const SpikeTap& tap) override {
    const std::string at = "L" + std::to_string(tap.layer) + "." + std::string(spike_site_name(tap.site));
    spikes[at].insert(spikes[at].end(), tap.counts.counts, tap.counts.counts + tap.counts.m * tap.counts.k);
    for (int64_t r = 0; r < tap.counts.m; ++r) thresholds[at].push_back(tap.counts.rows[r].threshold);
  }
  std::map<std::string, std::vector<float>> tensors, thresholds;
  std::map<std::string, std::vector<int64_t>> spikes;
};

struct WholeRun {
  std::vector<float> logits;
  Recorder seen;
};

class W8ASpikeWhole : public W8ASpikeGolden {
 protected:
  WholeRun run(SpikeUse use, SpikeMode mode, WindowRule window, int64_t prefilled, int64_t chunk,
               int threads = 2) const {
    MemoryAccount memory;
    Context ctx(memory, threads);
    ctx.activations = ActivationType::kF32;
    LoadOptions options;
    options.spikes = {use, mode, std::nullopt};
    options.window = window;
    const auto model = load_model(ctx, golden_root() / GetParam(), options);
    const std::vector<int32_t> ids = io_->counts("ids");
    const auto vocab = static_cast<size_t>(model->info().vocab);
    WholeRun r;
    r.logits.resize(ids.size() * vocab);
    SequenceState state = model->new_state(memory, {});
    prefill(ctx, *model, state, std::span(ids).first(static_cast<size_t>(prefilled)), &r.seen, {.chunk = chunk},
            nullptr, r.logits.data());
    SequenceState* states[] = {&state};
    LayerObserver* observers[] = {&r.seen};
    for (size_t t = static_cast<size_t>(prefilled); t < ids.size(); ++t)
      decode_step(ctx, *model, states, {&ids[t], 1}, r.logits.data() + t * vocab, observers);
    for (int l = 0; l < model->info().layers; ++l)
      if (state.recurrent.has(l))
        r.seen.tensors["L" + std::to_string(l) + ".state"].assign(state.recurrent.at(l),
                                                                  state.recurrent.at(l) + state.recurrent.elements(l));
    return r;
  }

  int64_t tokens() const { return io_->shape("ids").at(0); }

  void expect_close(const std::vector<float>& found, const std::string& name, const std::string& what) const {
    const std::vector<float> expected = io_->floats(name);
    ASSERT_EQ(found.size(), expected.size()) << what << " " << name;
    double most = 0, worst = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      most = std::max(most, std::fabs(static_cast<double>(expected[i])));
      const double d = std::fabs(static_cast<double>(found[i]) - expected[i]);
      worst = d <= worst ? worst : d;
    }
    EXPECT_LE(worst, name.ends_with(".state") ? 1e-4 * most : 2e-4) << what << " " << name;
  }

  // Everything stored of one whole run under `prefix`.
  void expect_layers(const WholeRun& r, const std::string& prefix, const std::string& what) const {
    for (const std::string& key : io_->keys()) {
      if (!key.starts_with(prefix + ".L")) continue;
      const auto part = split(key, '.');
      const std::string layer = part[1] + ".";
      if (part.size() == 3 && part[2] == "attn_o") {
        const bool linear = r.seen.tensors.count(layer + "o_norm") > 0;
        expect_close(r.seen.tensors.at(layer + (linear ? "o_norm" : "o")), key, what);
      } else if (part.size() == 3 && (part[2] == "resid_mid" || part[2] == "resid_out" || part[2] == "state")) {
        expect_close(r.seen.tensors.at(layer + part[2]), key, what);
      } else if (part.size() == 3 && part[2] == "q_spikes") {
        EXPECT_EQ(r.seen.spikes.at(layer + "query"), io_->integers(key)) << what << " " << key;
      } else if (part.size() == 3 && part[2] == "q_vth") {
        expect_thresholds_near(r.seen.thresholds.at(layer + "query"), key);
      } else if (part.size() == 3 && (part[2] == "k_codes" || part[2] == "v_codes")) {
        expect_codes(r.seen.tensors.at(layer + part[2].substr(0, 1)), prefix + "." + layer + part[2].substr(0, 1),
                     what);
      } else if (part.size() == 4 && part[3] == "spikes") {
        EXPECT_EQ(r.seen.spikes.at(layer + part[2]), io_->integers(key)) << what << " " << key;
      } else if (part.size() == 4 && part[3] == "vth") {
        expect_thresholds_near(r.seen.thresholds.at(layer + part[2]), key);
      }
    }
  }

  void expect_thresholds_near(const std::vector<float>& found, const std::string& name) const {
    const std::vector<float> expected = io_->floats(name);
    ASSERT_EQ(found.size(), expected.size()) << name;
    // The whole way down rounds a little apart.
    for (size_t i = 0; i < found.size(); ++i)
      EXPECT_NEAR(found[i], expected[i], 1e-5 * expected[i]) << name << " at " << i;
  }

  // Keys or values as attention sees them are codes times their head's scale.
  void expect_codes(const std::vector<float>& found, const std::string& at, const std::string& what) const {
    const std::vector<int64_t> codes = io_->integers(at + "_codes");
    const std::vector<float> scales = io_->floats(at + "_scale");
    ASSERT_EQ(found.size(), codes.size()) << at;
    const size_t d = codes.size() / scales.size();
    for (size_t i = 0; i < codes.size(); ++i) {
      const double code = found[i] / static_cast<double>(scales[i / d]);
      ASSERT_NEAR(code, static_cast<double>(codes[i]), 2e-3) << what << " " << at << " at " << i;
    }
  }
};

constexpr SpikeUse kUses[] = {SpikeUse::kFake, SpikeUse::kInteger, SpikeUse::kEvent};

TEST_P(W8ASpikeWhole, EveryKeyIsKnown) {
  const std::set<std::string> alone = {"ids",    "ref.logits", "paper.logits", "ref.mixed.logits", "ref.w.logits",
                                       "ql.x",   "ql.weight",  "ql.scales",    "ql.bias",          "ql.spikes",
                                       "ql.vth", "ql.codes",   "ql.y"};
  const std::set<std::string> of_layer = {"resid_mid", "resid_out", "attn_o",  "state",   "q_spikes",
                                          "q_vth",     "k_codes",   "v_codes", "k_scale", "v_scale"};
  const std::set<std::string> sites = {"attn_in", "o_in", "mlp_in", "down_in"}, of_site = {"x", "spikes", "vth"};
  const std::set<std::string> linears = {"q_proj", "k_proj",    "v_proj",  "gk_proj",
                                         "o_proj", "gate_proj", "up_proj", "down_proj"};
  for (const std::string& key : io_->keys()) {
    const auto part = split(key, '.');
    bool known = alone.count(key) > 0 || part[0] == "enc" || part[0] == "codes";
    if ((part[0] == "ref" || part[0] == "paper") && part.size() > 2 && part[1].starts_with("L"))
      known = (part.size() == 3 && of_layer.count(part[2])) ||
              (part.size() == 4 &&
               ((sites.count(part[2]) && of_site.count(part[3])) || (linears.count(part[2]) && part[3] == "out")));
    EXPECT_TRUE(known) << "io.safetensors holds \"" << key << "\", which no test here reads";
  }
}

TEST_P(W8ASpikeWhole, ReferencePrefill) {
  for (const SpikeUse use : kUses)
    for (const int64_t chunk : {int64_t{512}, int64_t{5}, int64_t{1}}) {
      const WholeRun r = run(use, SpikeMode::kReference, WindowRule::kOfficial, tokens(), chunk);
      const std::string what = "use " + std::to_string(static_cast<int>(use)) + ", chunk " + std::to_string(chunk);
      expect_close(r.logits, "ref.logits", what);
      expect_layers(r, "ref", what);
      EXPECT_EQ(r.seen.spikes.count("L0.down_in"), 0u) << "down_proj takes no spikes in reference mode";
    }
}

// Without options it is the published code's way.
TEST_P(W8ASpikeWhole, DefaultsAreTheReference) {
  const WholeRun r = run(SpikeUse::kAuto, SpikeMode::kConfig, WindowRule::kConfig, tokens(), 512);
  expect_close(r.logits, "ref.logits", "defaults");
  EXPECT_EQ(r.logits, run(SpikeUse::kInteger, SpikeMode::kReference, WindowRule::kOfficial, tokens(), 512).logits);
}

TEST_P(W8ASpikeWhole, PaperPrefill) {
  for (const SpikeUse use : kUses) {
    const WholeRun r = run(use, SpikeMode::kPaper, WindowRule::kOfficial, tokens(), 7);
    expect_close(r.logits, "paper.logits", "paper");
    expect_layers(r, "paper", "paper");
  }
}

TEST_P(W8ASpikeWhole, ExactWindow) {
  for (const SpikeUse use : kUses)
    for (const int64_t prefilled : {tokens(), int64_t{3}})
      expect_close(run(use, SpikeMode::kReference, WindowRule::kExact, prefilled, 512).logits, "ref.w.logits",
                   "exact window");
}

// The official prefill of some tokens, the rest one by one: how many is where the rows part from the whole prefill.
TEST_P(W8ASpikeWhole, PrefillThenDecode) {
  const std::vector<float> mixed = io_->floats("ref.mixed.logits"), whole = io_->floats("ref.logits");
  const size_t vocab = mixed.size() / static_cast<size_t>(tokens());
  int64_t prefilled = tokens();
  for (size_t i = mixed.size(); i-- > 0;)
    if (std::fabs(mixed[i] - whole[i]) > 2e-4) prefilled = static_cast<int64_t>(i / vocab);
  prefilled = std::max<int64_t>(1, prefilled);
  for (const SpikeUse use : kUses)
    expect_close(run(use, SpikeMode::kReference, WindowRule::kOfficial, prefilled, 512).logits, "ref.mixed.logits",
                 "prefill of " + std::to_string(prefilled));
}

TEST_P(W8ASpikeWhole, EventAndIntegerAreTheSameBits) {
  for (const SpikeMode mode : {SpikeMode::kReference, SpikeMode::kPaper}) {
    const WholeRun one = run(SpikeUse::kInteger, mode, WindowRule::kOfficial, tokens() / 2, 512, 1);
    EXPECT_EQ(one.logits, run(SpikeUse::kEvent, mode, WindowRule::kOfficial, tokens() / 2, 512, 1).logits);
    EXPECT_EQ(one.logits, run(SpikeUse::kEvent, mode, WindowRule::kOfficial, tokens() / 2, 512, 3).logits);
  }
}

// Models whose linear layers carry the official quantiser's scales.
std::vector<std::string> w8aspike_cases() {
  std::vector<std::string> cases;
  for (const std::string& name : find_cases(true)) {
    // What can't be opened stays a case, and fails as one.
    bool keep = true;
    try {
      const Numbers io(golden_root() / name / "io.safetensors");
      const auto keys = io.keys();
      keep = std::any_of(keys.begin(), keys.end(), [](const std::string& k) {
        return k.starts_with("enc.") || k.starts_with("ql.") || k.starts_with("codes.") || k.ends_with(".spikes");
      });
    } catch (const Error&) {
    }
    if (keep) cases.push_back(name);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Cases, W8ASpikeGolden, testing::ValuesIn(w8aspike_cases()), golden::case_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(W8ASpikeGolden);

INSTANTIATE_TEST_SUITE_P(Cases, W8ASpikeWhole, testing::ValuesIn(w8aspike_cases()), golden::case_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(W8ASpikeWhole);

}  // namespace
}  // namespace lacuna

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
#include "kernels/spike_linear.h"
#include "spike/time_code.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

fs::path golden_root() {
  const char* root = std::getenv("LACUNA_GOLDENS");
  return root && *root ? fs::path(root) : fs::path(LACUNA_SOURCE_DIR) / "tests" / "goldens";
}

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

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == at)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
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

INSTANTIATE_TEST_SUITE_P(Cases, TimeCodeGolden, testing::ValuesIn(find_cases(false)), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
});
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

INSTANTIATE_TEST_SUITE_P(Cases, W8ASpikeGolden, testing::ValuesIn(w8aspike_cases()), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
});
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(W8ASpikeGolden);

}  // namespace
}  // namespace lacuna

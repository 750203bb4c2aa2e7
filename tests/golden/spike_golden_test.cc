// Every case of spike coding below LACUNA_GOLDENS (default tests/goldens): time codes of the official
// Int2Spike (folders below `spikingbrain` that hold numbers but no model), and the encoder, neuron and
// linear layers of W8ASpike models there. A case that can't be read, or that holds a key unknown here, fails.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "base/error.h"
#include "formats/safetensors_file.h"
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

// Every SpikingBrain-7B case below LACUNA_GOLDENS (default tests/goldens) against what the official code
// computed. A case is a folder below one named "spikingbrain" with io.safetensors; a case that can't be read, or
// that holds a tensor unknown here, fails. Cases without config.json (time codes) and those of the spike-coded
// checkpoint (ref.logits) have tests of their own.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "base/error.h"
#include "formats/safetensors.h"
#include "formats/spikingbrain_config.h"
#include "goldens.h"
#include "models/forward.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using golden::golden_root;

bool is_spikingbrain(const fs::path& dir) {
  return std::any_of(dir.begin(), dir.end(), [](const fs::path& part) { return part == "spikingbrain"; });
}

// The cases of other tests; a file that can't be read is nobody's and stays here.
bool is_of_other_test(const fs::path& dir) {
  if (!fs::exists(dir / "config.json")) return true;
  try {
    return SafetensorsFile(dir / "io.safetensors").entries().count("ref.logits") > 0;
  } catch (const Error&) {
    return false;
  }
}

std::vector<std::string> find_cases() {
  return golden::folders_with(golden_root(), [](const fs::path& file) {
    const fs::path name = file.filename(), dir = file.parent_path();
    return (name == "io.safetensors" || name == "config.json") && is_spikingbrain(dir) && !is_of_other_test(dir);
  });
}

// Collects the tensors of every layer by the goldens' names, over all calls: rows stand one after the other.
class Recorder : public LayerObserver {
 public:
  bool wants_tensors() const override { return true; }
  void on_tensor(const TensorTap& tap) override {
    auto& rows = tensors["L" + std::to_string(tap.layer) + "." + tap.name];
    rows.insert(rows.end(), tap.data, tap.data + tap.tokens * tap.width);
  }
  std::map<std::string, std::vector<float>> tensors;
};

class SpikingBrainGolden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    dir_ = golden_root() / GetParam();
    io_ = std::make_unique<SafetensorsFile>(dir_ / "io.safetensors");
    config_ = load_spikingbrain_config(dir_);
    const Tensor ids = io_->get("ids");
    ASSERT_EQ(ids.dtype, DType::kI64);
    for (int64_t i = 0; i < ids.elements(); ++i) ids_.push_back(static_cast<int32_t>(ids.as<int64_t>()[i]));
  }

  struct Run {
    std::vector<float> logits;
    std::map<std::string, std::vector<float>> tensors;
    SequenceState state;
  };

  struct Engine {
    explicit Engine(const fs::path& dir, WindowRule window, int threads = 2) : ctx(memory, threads) {
      ctx.activations = ActivationType::kF32;
      LoadOptions options;
      options.window = window;
      model = load_model(ctx, dir, options);
    }
    MemoryAccount memory;
    Context ctx;
    std::unique_ptr<Model> model;
  };

  // The first `prefilled` tokens in one call, the rest one by one; then what is left in the caches.
  Run run(Engine& e, int64_t prefilled, int64_t chunk, const KvOptions& kv = {}) const {
    const auto n = static_cast<int64_t>(ids_.size());
    const auto vocab = static_cast<size_t>(e.model->info().vocab);
    Run r{std::vector<float>(ids_.size() * vocab), {}, e.model->new_state(e.memory, kv)};
    Recorder recorder;
    prefill(e.ctx, *e.model, r.state, std::span(ids_).first(static_cast<size_t>(prefilled)), &recorder, {.chunk = chunk},
            nullptr, r.logits.data());
    SequenceState* states[] = {&r.state};
    LayerObserver* observers[] = {&recorder};
    for (int64_t t = prefilled; t < n; ++t)
      decode_step(e.ctx, *e.model, states, {&ids_[static_cast<size_t>(t)], 1},
                  r.logits.data() + static_cast<size_t>(t) * vocab, observers);
    r.tensors = std::move(recorder.tensors);
    for (int l = 0; l < e.model->info().layers; ++l) {
      const std::string at = "L" + std::to_string(l) + ".";
      if (!r.state.recurrent.has(l)) continue;
      const float* s = r.state.recurrent.at(l);
      r.tensors[at + "state"].assign(s, s + r.state.recurrent.elements(l));
    }
    return r;
  }

  // The README's measure: max(5e-5, 1e-5 of the tensor's largest value); 1e-6 for log decays.
  void expect_close(std::span<const float> found, const std::string& name) const {
    const Tensor expected = io_->get(name);
    ASSERT_EQ(expected.dtype, DType::kF32) << name;
    ASSERT_EQ(static_cast<int64_t>(found.size()), expected.elements()) << name;
    double size = 0, worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      const double e = expected.as<float>()[i], d = std::fabs(found[i] - e);
      size = std::max(size, std::fabs(e));
      if (!(d <= worst)) {
        worst = d;
        at = i;
      }
    }
    const double allowed = name.ends_with(".g") ? 1e-6 : std::max(5e-5, 1e-5 * size);
    EXPECT_LE(worst, allowed) << name << " at index " << at << ": found " << found[at] << ", expected "
                              << expected.as<float>()[at];
  }

  // Everything that the case holds under `prefix`.
  void expect_all(const Run& r, const std::string& prefix) const {
    int compared = 0;
    for (const auto& [name, entry] : io_->entries()) {
      if (!name.starts_with(prefix + ".")) continue;
      const std::string rest = name.substr(prefix.size() + 1);
      if (rest.ends_with(".kcache") || rest.ends_with(".vcache")) continue;
      ++compared;
      if (rest == "logits") {
        expect_close(r.logits, name);
      } else if (rest != "final_norm") {
        const auto found = r.tensors.find(rest);
        ASSERT_NE(found, r.tensors.end()) << name << " is nothing that the engine computes";
        expect_close(found->second, name);
      }
    }
    EXPECT_GT(compared, 0) << "io.safetensors holds nothing under " << prefix;
  }

  // Tokens that the official code prefilled for its mixed run: up to the first row that is not as in the whole
  // prefill. If windows never show, any number is right.
  int64_t prefilled_of_mixed() const {
    const Tensor mixed = io_->get("mixed.logits"), whole = io_->get("wp1.logits");
    const int64_t vocab = mixed.shape[1];
    for (int64_t t = 0; t < mixed.shape[0]; ++t)
      for (int64_t i = t * vocab; i < (t + 1) * vocab; ++i)
        if (std::fabs(mixed.as<float>()[i] - whole.as<float>()[i]) > 5e-5) return t;
    return std::max<int64_t>(1, mixed.shape[0] / 2);
  }

  fs::path dir_;
  SpikingBrainConfig config_;
  std::unique_ptr<SafetensorsFile> io_;
  std::vector<int32_t> ids_;
};

TEST_P(SpikingBrainGolden, EveryKeyIsKnown) {
  const std::set<std::string> tensors = {"normed", "resid_mid", "resid_out", "q", "k",      "v",
                                         "g",      "o",         "o_norm",    "state", "kcache", "vcache"};
  for (const auto& [name, entry] : io_->entries()) {
    if (name == "ids") continue;
    const size_t dot = name.find('.');
    const std::string prefix = name.substr(0, dot), rest = dot == std::string::npos ? "" : name.substr(dot + 1);
    bool known = prefix == "wp1" || prefix == "w" || prefix == "mixed";
    if (rest != "logits" && rest != "final_norm") {
      const size_t second = rest.find('.');
      known = known && rest.starts_with("L") && second != std::string::npos && tensors.count(rest.substr(second + 1)) > 0 &&
              std::atoi(rest.c_str() + 1) < config_.layers;
    }
    EXPECT_TRUE(known) << "io.safetensors holds \"" << name << "\", which no test here reads";
  }
}

// W + 1 keys in a prompt, in chunks of any size; nothing below it depends on how it was cut.
TEST_P(SpikingBrainGolden, PrefillWithOneKeyMore) {
  for (const WindowRule rule : {WindowRule::kOfficial, WindowRule::kPlusOne})
    for (const int64_t chunk : {int64_t{512}, int64_t{7}, int64_t{1}}) {
      SCOPED_TRACE("chunk " + std::to_string(chunk));
      Engine e(dir_, rule);
      expect_all(run(e, static_cast<int64_t>(ids_.size()), chunk), "wp1");
    }
}

TEST_P(SpikingBrainGolden, FinalNorm) {
  if (!io_->entries().count("wp1.final_norm")) return;
  class Final : public LayerObserver {
   public:
    explicit Final(int layers, int64_t width) : layers_(layers), width_(width) {}
    bool wants_hidden() const override { return true; }
    void on_hidden(int layer, int64_t first, int64_t tokens, const float* h) override {
      if (layer + 1 == layers_) rows.insert(rows.end(), h, h + tokens * width_);
    }
    std::vector<float> rows;

   private:
    int layers_;
    int64_t width_;
  };
  Engine e(dir_, WindowRule::kConfig);
  Final final(e.model->info().layers, e.model->info().hidden);
  SequenceState state = e.model->new_state(e.memory, {});
  prefill(e.ctx, *e.model, state, ids_, &final, {}, nullptr);
  expect_close(final.rows, "wp1.final_norm");
}

TEST_P(SpikingBrainGolden, DecodeWithOneKeyMore) {
  Engine e(dir_, WindowRule::kPlusOne);
  for (const int64_t prefilled : {int64_t{1}, prefilled_of_mixed()}) expect_all(run(e, prefilled, 512), "wp1");
}

TEST_P(SpikingBrainGolden, ExactWindow) {
  Engine e(dir_, WindowRule::kExact);
  const auto n = static_cast<int64_t>(ids_.size());
  for (const int64_t prefilled : {n, int64_t{1}, std::max<int64_t>(1, n / 2)}) {
    SCOPED_TRACE("prefill of " + std::to_string(prefilled));
    expect_all(run(e, prefilled, 11), "w");
  }
}

// A prompt no longer than the window, then token by token: the official code sees W keys throughout.
TEST_P(SpikingBrainGolden, OfficialRuleAfterAShortPrompt) {
  Engine e(dir_, WindowRule::kOfficial);
  expect_all(run(e, std::min(config_.sliding_window, static_cast<int64_t>(ids_.size())), 512), "w");
}

TEST_P(SpikingBrainGolden, OfficialRuleAfterALongPrompt) {
  const int64_t prefilled = prefilled_of_mixed();
  for (const int64_t chunk : {int64_t{512}, int64_t{5}}) {
    Engine e(dir_, WindowRule::kConfig);
    // Pages of one slot: what a page may hold beyond the window would otherwise have to be told apart.
    const Run r = run(e, prefilled, chunk, {DType::kF32, 1});
    expect_all(r, "mixed");
    for (int l = 1; l < config_.layers; l += 2) {
      const std::string at = "mixed.L" + std::to_string(l) + ".";
      if (!io_->entries().count(at + "kcache")) continue;
      const Tensor expected = io_->get(at + "kcache");
      const int64_t slots = expected.shape[0], heads = expected.shape[1], d = expected.shape[2];
      std::vector<float> k(static_cast<size_t>(slots * heads * d)), v(k.size()), row(static_cast<size_t>(slots * d)), row_v(row);
      for (int h = 0; h < heads; ++h) {
        // The next query sees W - 1 old keys: one of the official cache's W is dead already.
        const int64_t length = r.state.kv.length(l, h);
        ASSERT_GE(length, slots - 1);
        ASSERT_LE(length, slots);
        const int64_t missing = slots - length;
        kv_read(e.ctx, r.state.kv.layout(l), r.state.kv.view(l, h), 0, length, row.data(), row_v.data());
        for (int64_t i = 0; i < slots; ++i)
          for (int64_t c = 0; c < d; ++c) {
            const auto to = static_cast<size_t>((i * heads + h) * d + c);
            const auto from = static_cast<size_t>((i - missing) * d + c);
            k[to] = i < missing ? io_->get(at + "kcache").as<float>()[to] : row[from];
            v[to] = i < missing ? io_->get(at + "vcache").as<float>()[to] : row_v[from];
          }
      }
      expect_close(k, at + "kcache");
      expect_close(v, at + "vcache");
    }
  }
}

TEST_P(SpikingBrainGolden, ThreadsChangeNoBit) {
  Engine one(dir_, WindowRule::kConfig, 1), three(dir_, WindowRule::kConfig, 3);
  const auto n = static_cast<int64_t>(ids_.size());
  EXPECT_EQ(run(one, (n + 1) / 2, 512).logits, run(three, (n + 1) / 2, 512).logits);
}

INSTANTIATE_TEST_SUITE_P(Cases, SpikingBrainGolden, testing::ValuesIn(find_cases()), golden::case_name);

TEST(SpikingBrainGoldens, AreThere) {
  EXPECT_FALSE(find_cases().empty()) << "no folder below " << golden_root() << " is a case of SpikingBrain-7B";
}

}  // namespace
}  // namespace lacuna

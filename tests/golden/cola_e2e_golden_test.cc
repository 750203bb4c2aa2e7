// Every Cola DLM generation case below LACUNA_GOLDENS (default tests/goldens) through BlockDiffusionGenerator: each
// Euler step's latents and velocities, logits, emitted ids, stopping, and the distribution that is drawn from. A case
// is a folder below one named "cola" whose io.safetensors holds `p0.known`, beside a checkpoint; one that can't be read, or
// that holds a tensor unknown here, fails.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"
#include "generate/block_diffusion.h"
#include "generate/sampler.h"
#include "goldens.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using golden::golden_root;

// Cases that hold a tensor. One that can't be read is every test's, and fails there.
std::vector<std::string> find_cases(const char* tensor, const fs::path& root = golden_root()) {
  return golden::folders_with(root, [&](const fs::path& file) {
    const fs::path dir = file.parent_path();
    if (file.filename() != "io.safetensors" || !is_cola_checkpoint(dir)) return false;
    if (std::none_of(dir.begin(), dir.end(), [](const fs::path& part) { return part == "cola"; })) return false;
    try {
      return SafetensorsFile(file).entries().count(tensor) > 0;
    } catch (const Error&) {
      return true;
    }
  });
}

// All that one generate() call showed, by request.
class Recorder : public DiffusionObserver {
 public:
  struct Request {
    std::vector<float> z, latents, v_cond, v_uncond, v, logits;  // latents [blocks, steps + 1, ..]
  };
  void on_prompt(size_t r, std::span<const float> z) override { add(requests[r].z, z); }
  void on_step(const DenoiseStep& s) override {
    Request& r = requests[s.request];
    add(r.latents, s.x);
    add(r.v_cond, s.v_cond);
    add(r.v_uncond, s.v_uncond.empty() ? s.v_cond : s.v_uncond);  // equal where there is no history
    add(r.v, s.v);
  }
  void on_block(size_t request, int64_t, std::span<const float> z, std::span<const float> logits) override {
    add(requests[request].latents, z);
    add(requests[request].logits, logits);
  }
  std::map<size_t, Request> requests;

 private:
  static void add(std::vector<float>& to, std::span<const float> from) { to.insert(to.end(), from.begin(), from.end()); }
};

class ColaE2e : public testing::TestWithParam<std::string> {
 protected:
  ColaE2e() : ctx_(memory_, 2) { ctx_.activations = ActivationType::kF32; }
  void SetUp() override {
    dir_ = golden_root() / GetParam();
    io_ = std::make_unique<SafetensorsFile>(dir_ / "io.safetensors");
    noise_ = std::make_shared<NoiseFile>(dir_ / "io.safetensors");
    model_ = ColaModel::load(ctx_, dir_);
    prompts_ = static_cast<size_t>(io_->get("noise").shape[0]);
    blocks_ = io_->get("noise").shape[1];
  }
  bool has(const std::string& name) const { return io_->entries().count(name) > 0; }
  std::vector<int32_t> ids(const std::string& name) {
    seen_.insert(name);
    const Tensor t = io_->get(name);
    EXPECT_EQ(t.dtype, DType::kI64) << name;
    return {t.as<int64_t>(), t.as<int64_t>() + t.elements()};
  }
  // README: 2e-4 absolute.
  void expect_close(std::span<const float> found, const std::string& name, double tolerance = 2e-4) {
    seen_.insert(name);
    const Tensor t = io_->get(name);
    ASSERT_EQ(t.elements(), static_cast<int64_t>(found.size())) << name;
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < found.size(); ++i)
      if (const double e = std::abs(static_cast<double>(found[i]) - t.as<float>()[i]); !(e <= worst)) worst = e, at = i;
    EXPECT_LE(worst, tolerance) << name << " at " << at;
    worst_ = std::max(worst_, worst);
  }
  DiffusionParams params(int steps, const std::string& tag) const {
    DiffusionParams p;
    p.steps = steps;
    p.official = true;
    p.timesteps = tag == "exact" ? TimestepRounding::kNone : TimestepRounding::kBf16;
    p.noise = noise_;
    return p;
  }
  GenerateRequest request(size_t prompt, float penalty) {
    GenerateRequest r;
    r.prompt = ids("p" + std::to_string(prompt) + ".ids");
    r.sampling.repetition_penalty = penalty;
    r.sampling.max_new_tokens = blocks_ * model_->config().block_tokens();
    return r;
  }
  // Emitted ids without the prompt's part of the first block, as results have them.
  std::vector<int32_t> trimmed(const std::string& name, size_t prompt) {
    std::vector<int32_t> all = ids(name);
    all.erase(all.begin(), all.begin() + ids("p" + std::to_string(prompt) + ".known")[0]);
    return all;
  }

  fs::path dir_;
  std::unique_ptr<SafetensorsFile> io_;
  std::shared_ptr<NoiseFile> noise_;
  MemoryAccount memory_;
  Context ctx_;
  std::unique_ptr<ColaModel> model_;
  size_t prompts_ = 0;
  int64_t blocks_ = 0;
  std::set<std::string> seen_;
  double worst_ = 0;
};

class ColaE2eStop : public ColaE2e {};
class ColaE2eShort : public ColaE2e {};
class ColaE2eSampling : public ColaE2e {};

TEST_P(ColaE2e, EveryStepOfEveryPrompt) {
  std::set<std::pair<int, std::string>> settings;
  for (const auto& [name, entry] : io_->entries())
    if (name.starts_with("p0.N")) {
      const auto parts = golden::split(name, '.');
      settings.insert({std::stoi(parts[1].substr(1)), parts[2]});
    }
  ASSERT_FALSE(settings.empty());
  for (const auto& [steps, tag] : settings)
    for (const float penalty : {1.1f, 1.0f}) {
      // Together, then each alone, which must find its own noise in the file.
      for (size_t only = 0; only <= prompts_; ++only) {
        const bool together = only == prompts_;
        std::vector<GenerateRequest> requests;
        DiffusionParams p = params(steps, tag);
        for (size_t i = 0; i < prompts_; ++i)
          if (together || i == only) requests.push_back(request(i, penalty));
        if (!together) p.first_noise = only;
        Recorder recorder;
        BlockDiffusionGenerator generator(ctx_, *model_, nullptr, {}, {}, p);
        generator.observe(&recorder);
        const auto results = generator.generate(requests);
        for (size_t i = 0; i < results.size(); ++i) {
          const size_t prompt = together ? i : only;
          const std::string at = "p" + std::to_string(prompt) + ".", run = at + "N" + std::to_string(steps) + "." + tag + ".";
          SCOPED_TRACE(run + (together ? "together" : "alone"));
          const Recorder::Request& found = recorder.requests[i];
          expect_close(found.z, at + "z");
          expect_close(found.latents, run + "latents");
          expect_close(found.logits, run + "logits");
          if (has(run + "v")) {
            expect_close(found.v, run + "v");
            expect_close(found.v_cond, run + "v_cond");
            expect_close(found.v_uncond, run + "v_uncond");
          }
          EXPECT_EQ(results[i].ids, trimmed(run + (penalty > 1 ? "ids_rp11" : "ids_rp10"), prompt));
          EXPECT_EQ(results[i].finish, FinishReason::kLength);
        }
      }
    }
  EXPECT_EQ(memory_.now(MemoryTag::kKv), 0u);
  std::printf("largest difference %.2e\n", worst_);

  // Nothing in the file is left unlooked at.
  for (const auto& [name, entry] : io_->entries()) {
    const bool elsewhere = name == "noise" || name.starts_with("stop.") || name.starts_with("short.") || name.starts_with("sampling.");
    EXPECT_TRUE(elsewhere || name.find(".margin_") != std::string::npos || seen_.count(name)) << name << " is not known here";
  }
}

TEST_P(ColaE2eStop, StopsWithTheBlockThatHoldsAnEndId) {
  const auto prompt = static_cast<size_t>(ids("stop.prompt")[0]);
  const GenerateRequest r = request(prompt, 1.1f);
  DiffusionParams p = params(4, "exact");
  p.first_noise = prompt;
  BlockDiffusionGenerator generator(ctx_, *model_, nullptr, ids("stop.eos_id"), {}, p);
  const GenerateResult result = generator.generate({&r, 1})[0];
  EXPECT_EQ(result.ids, ids("stop.ids"));
  EXPECT_EQ(result.finish, FinishReason::kEndOfText);

  // Ours: the ids of the same run without penalty, cut before the first that ends a text. Its own history makes the
  // penalty another than the published one, so it is left out.
  p.official = false;
  GenerateRequest plain = r;
  plain.sampling.repetition_penalty = 1;
  const std::vector<int32_t> whole = trimmed("p" + std::to_string(prompt) + ".N4.exact.ids_rp10", prompt);
  for (size_t at = 0; at < whole.size(); ++at) {
    if (std::find(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(at), whole[at]) != whole.begin() + static_cast<std::ptrdiff_t>(at)) continue;
    SCOPED_TRACE("ends at " + std::to_string(at));
    BlockDiffusionGenerator ours(ctx_, *model_, nullptr, {whole[at]}, {}, p);
    const GenerateResult cut = ours.generate({&plain, 1})[0];
    EXPECT_EQ(cut.ids, std::vector<int32_t>(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(at)));
    EXPECT_EQ(cut.finish, FinishReason::kEndOfText);
  }
}

TEST_P(ColaE2eShort, StopsAfterTheFirstBlockIfThatIsEnough) {
  const auto prompt = static_cast<size_t>(ids("stop.prompt")[0]);
  GenerateRequest r = request(prompt, 1.1f);
  r.sampling.max_new_tokens = ids("short.max_new")[0];
  DiffusionParams p = params(4, "exact");
  p.first_noise = prompt;
  BlockDiffusionGenerator generator(ctx_, *model_, nullptr, {}, {}, p);
  EXPECT_EQ(generator.generate({&r, 1})[0].ids, ids("short.ids"));
}

TEST_P(ColaE2eSampling, DrawsFromTheSameDistribution) {
  const Tensor logits = io_->get("sampling.logits"), params = io_->get("sampling.params"), probs = io_->get("sampling.probs");
  const std::vector<int32_t> history = ids("sampling.generated");
  const int64_t rows = logits.shape[0], vocab = logits.shape[1];
  for (int64_t set = 0; set < params.shape[0]; ++set) {
    const float* p = params.as<float>() + set * 4;
    SamplingParams sampling;
    sampling.temperature = p[0];
    sampling.top_k = static_cast<int>(p[1]);
    sampling.top_p = p[2] > 0 ? p[2] : 1.0f;
    sampling.repetition_penalty = p[3];
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<float> own(logits.as<float>() + row * vocab, logits.as<float>() + (row + 1) * vocab);
      const std::vector<double> found = Sampler(sampling).probabilities(own, history);
      for (int64_t i = 0; i < vocab; ++i)
        EXPECT_NEAR(found[static_cast<size_t>(i)], probs.as<float>()[(set * rows + row) * vocab + i], 1e-6) << set << " " << row << " " << i;
    }
  }
}

// What only some cases hold has suites of its own, so that no test passes without having run.
INSTANTIATE_TEST_SUITE_P(Goldens, ColaE2e, testing::ValuesIn(find_cases("p0.known")), golden::case_name);
INSTANTIATE_TEST_SUITE_P(Goldens, ColaE2eStop, testing::ValuesIn(find_cases("stop.ids")), golden::case_name);
INSTANTIATE_TEST_SUITE_P(Goldens, ColaE2eShort, testing::ValuesIn(find_cases("short.ids")), golden::case_name);
INSTANTIATE_TEST_SUITE_P(Goldens, ColaE2eSampling, testing::ValuesIn(find_cases("sampling.probs")), golden::case_name);
// LACUNA_GOLDENS may hold others' cases only.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ColaE2e);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ColaE2eStop);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ColaE2eShort);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ColaE2eSampling);

TEST(ColaE2eCases, OurOwnHoldEveryKind) {
  for (const char* tensor : {"p0.known", "stop.ids", "short.ids", "sampling.probs"})
    EXPECT_FALSE(find_cases(tensor, golden::own_root()).empty()) << tensor;
}

}  // namespace
}  // namespace lacuna

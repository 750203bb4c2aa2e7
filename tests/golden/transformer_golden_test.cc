// Every Transformer case below LACUNA_GOLDENS (default tests/goldens) against what other people's code
// computed: transformers' logits and hidden states, kvpress' scores, LaProx scores, kept sets and the
// decoding that follows, from an fp64 oracle. A case is a folder with config.json and io.safetensors;
// one that can't be read, or that holds a key unknown here, fails.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

#include "base/error.h"
#include "evict/evictor.h"
#include "evict/score_board.h"
#include "formats/safetensors.h"
#include "goldens.h"
#include "models/forward.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using golden::golden_root;
using golden::split;

// Cases of the other systems keep the folder names that the golden set gives them.
bool other_system(const fs::path& relative) {
  static const std::set<std::string> kNames = {"cola", "cola_dit", "cola_vae", "spikingbrain"};
  return std::any_of(relative.begin(), relative.end(), [](const fs::path& part) { return kNames.count(part.string()) > 0; });
}

std::vector<std::string> find_cases() {
  std::vector<std::string> cases;
  const fs::path root = golden_root();
  std::error_code error;
  for (fs::recursive_directory_iterator it(root, fs::directory_options::follow_directory_symlink, error), end; !error && it != end; it.increment(error)) {
    if (!it->is_directory() || !fs::exists(it->path() / "config.json")) continue;
    const fs::path relative = fs::relative(it->path(), root);
    if (!other_system(relative)) cases.push_back(relative.string());
  }
  if (fs::exists(root / "config.json")) cases.push_back(".");
  std::sort(cases.begin(), cases.end());
  return cases;
}

class TransformerGolden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const fs::path dir = golden_root() / GetParam();
    io_ = std::make_unique<SafetensorsFile>(dir / "io.safetensors");
    ctx_ = std::make_unique<Context>(memory_);
    ctx_->activations = ActivationType::kF32;
    model_ = load_model(*ctx_, dir);
    prompt_ = ids("input_ids");
  }

  bool has(const std::string& name) const { return io_->entries().count(name) > 0; }
  std::vector<float> floats(const std::string& name) const {
    const Tensor t = io_->get(name);
    EXPECT_EQ(t.dtype, DType::kF32) << name;
    return t.dtype == DType::kF32 ? std::vector<float>(t.as<float>(), t.as<float>() + t.elements()) : std::vector<float>();
  }
  std::vector<int32_t> ids(const std::string& name) const {
    const Tensor t = io_->get(name);
    std::vector<int32_t> out;
    for (int64_t i = 0; i < t.elements(); ++i)
      out.push_back(t.dtype == DType::kI64 ? static_cast<int32_t>(t.as<int64_t>()[i]) : t.as<int32_t>()[i]);
    return out;
  }
  std::vector<std::string> keys(const std::string& prefix, const std::string& suffix) const {
    std::vector<std::string> out;
    for (const auto& [name, entry] : io_->entries())
      if (name.starts_with(prefix) && name.ends_with(suffix)) out.push_back(name);
    return out;
  }
  int64_t n() const { return static_cast<int64_t>(prompt_.size()); }
  int64_t vocab() const { return model_->info().vocab; }

  // The goldens' own measure: 1e-4, and 1e-3 where logits are large (±40).
  static void expect_close(std::span<const float> found, std::span<const float> expected, const std::string& what) {
    ASSERT_EQ(found.size(), expected.size()) << what;
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      const double excess = std::fabs(static_cast<double>(found[i]) - expected[i]) / (1e-4 + 2.5e-5 * std::fabs(expected[i]));
      if (!(excess <= worst)) {
        worst = excess;
        at = i;
      }
    }
    EXPECT_LE(worst, 1.0) << what << " at index " << at << ": found " << found[at] << ", expected " << expected[at];
  }

  std::vector<float> decode(SequenceState& state, std::span<const int32_t> tokens) {
    std::vector<float> logits(tokens.size() * static_cast<size_t>(vocab()));
    SequenceState* states[] = {&state};
    for (size_t i = 0; i < tokens.size(); ++i)
      decode_step(*ctx_, *model_, states, tokens.subspan(i, 1), logits.data() + i * static_cast<size_t>(vocab()));
    return logits;
  }

  MemoryAccount memory_;
  std::unique_ptr<SafetensorsFile> io_;
  std::unique_ptr<Context> ctx_;
  std::unique_ptr<Model> model_;
  std::vector<int32_t> prompt_;
};

class HiddenObserver : public LayerObserver {
 public:
  HiddenObserver(int layers, int64_t tokens, int64_t width) : width_(width) {
    hidden.assign(static_cast<size_t>(layers) + 1, std::vector<float>(static_cast<size_t>(tokens * width)));
  }
  bool wants_hidden() const override { return true; }
  void on_hidden(int layer, int64_t first_token, int64_t tokens, const float* rows) override {
    std::copy_n(rows, tokens * width_, hidden[static_cast<size_t>(layer + 1)].begin() + first_token * width_);
  }
  std::vector<std::vector<float>> hidden;

 private:
  int64_t width_;
};

TEST_P(TransformerGolden, EveryKeyIsKnown) {
  const std::set<std::string> plain = {"input_ids", "logits", "greedy_ids", "decode.dense.logits"};
  const std::set<std::string> kvpress = {"snapkv", "tova", "keydiff", "knorm", "streaming_llm", "observed_attention",
                                         "expected_attention", "lagkv"};
  for (const auto& [name, entry] : io_->entries()) {
    const auto part = split(name, '.');
    bool known = plain.count(name) > 0;
    if (part[0] == "hidden" && part.size() == 2) known = std::atoi(part[1].c_str()) <= model_->info().layers;
    if (part[0] == "kvpress" && part.size() == 3) known = kvpress.count(part[1]) > 0 && part[2] == "score";
    if (part[0] == "laprox" && part.size() == 5) known = part[4] == "score";
    if (part[0] == "laprox" && part.size() == 6) known = part[5] == "keep" || part[5] == "decode_logits";
    EXPECT_TRUE(known) << "io.safetensors holds \"" << name << "\", which no test here reads";
  }
}

TEST_P(TransformerGolden, LogitsAndHiddenStates) {
  for (const int64_t chunk : {int64_t{512}, int64_t{37}}) {
    SequenceState state = model_->new_state(memory_, {});
    HiddenObserver observer(model_->info().layers, n(), model_->info().hidden);
    std::vector<float> logits(static_cast<size_t>(n() * vocab()));
    prefill(*ctx_, *model_, state, prompt_, &observer, {.chunk = chunk}, nullptr, logits.data());
    for (size_t l = 0; l < observer.hidden.size(); ++l) {
      const std::string name = "hidden." + std::to_string(l);
      if (has(name)) expect_close(observer.hidden[l], floats(name), name + ", chunk " + std::to_string(chunk));
    }
    expect_close(logits, floats("logits"), "logits, chunk " + std::to_string(chunk));
  }
}

TEST_P(TransformerGolden, GreedyDecoding) {
  if (has("greedy_ids")) {
    const std::vector<int32_t> expected = ids("greedy_ids");
    SequenceState state = model_->new_state(memory_, {});
    std::vector<float> logits(static_cast<size_t>(vocab()));
    prefill(*ctx_, *model_, state, prompt_, nullptr, {}, logits.data());
    std::vector<int32_t> found;
    SequenceState* states[] = {&state};
    while (found.size() < expected.size()) {
      found.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      decode_step(*ctx_, *model_, states, {&found.back(), 1}, logits.data());
    }
    EXPECT_EQ(found, expected);
  }
  if (has("decode.dense.logits")) {
    const std::vector<float> expected = floats("decode.dense.logits");
    SequenceState state = model_->new_state(memory_, {});
    prefill(*ctx_, *model_, state, prompt_, nullptr, {}, nullptr);
    const std::vector<int32_t> tokens = ids("greedy_ids");
    expect_close(decode(state, std::span(tokens).first(expected.size() / static_cast<size_t>(vocab()))), expected, "decode.dense.logits");
  }
}

// The policy that a key laprox.<gqa>.<pool_at>.<normalise>… speaks of.
std::string laprox_spec(const std::string& key) {
  const auto part = split(key, '.');
  return "laprox:gqa=" + part[1] + ",pool_at=" + part[2] + ",normalise=" + part[3];
}

TEST_P(TransformerGolden, LaProxScores) {
  for (const std::string& key : keys("laprox.", ".score")) {
    if (split(key, '.').size() != 5) continue;
    ScoreBoard board(*ctx_, *model_, {make_policy(laprox_spec(key))});
    SequenceState state = model_->new_state(memory_, {});
    prefill(*ctx_, *model_, state, prompt_, &board, {.chunk = 50}, nullptr);
    const Tensor expected = io_->get(key);
    ASSERT_EQ(expected.rank, 3) << key;
    const int64_t heads = expected.shape[1], candidates = expected.shape[2];
    for (int64_t l = 0; l < expected.shape[0]; ++l)
      for (int64_t h = 0; h < heads; ++h) {
        const auto& found = board.scores(0, static_cast<int>(l)).heads[static_cast<size_t>(h)].score;
        ASSERT_EQ(static_cast<int64_t>(found.size()), candidates) << key;
        for (int64_t i = 0; i < candidates; ++i) {
          const double e = expected.as<float>()[(l * heads + h) * candidates + i];
          ASSERT_NEAR(found[static_cast<size_t>(i)], e, 1e-7 + 1e-4 * std::fabs(e)) << key << " layer " << l << " head " << h << " token " << i;
        }
      }
  }
}

TEST_P(TransformerGolden, LaProxKeptSetsAndDecoding) {
  for (const std::string& key : keys("laprox.", ".keep")) {
    const auto part = split(key, '.');
    const auto policy = make_policy(laprox_spec(key));
    const Budget budget = parse_budget(part[4]);
    const std::string base = key.substr(0, key.size() - 5);
    const Tensor expected = io_->get(key);
    const int64_t layers = expected.shape[0], heads = expected.shape[1];

    ScoreBoard board(*ctx_, *model_, {policy});
    SequenceState dense = model_->new_state(memory_, {});
    prefill(*ctx_, *model_, dense, prompt_, &board, {}, nullptr);
    EvictionReport report;
    ScoreBoard::KeepMap keep = board.select(0, budget, dense.kv, &report);

    int64_t kept = 0, strangers = 0;
    ScoreBoard::KeepMap golden(static_cast<size_t>(layers));
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t h = 0; h < heads; ++h) {
        std::vector<bool> ours(static_cast<size_t>(n()), false);
        for (int32_t slot : keep[static_cast<size_t>(l)][static_cast<size_t>(h)]) ours[static_cast<size_t>(slot)] = true;
        golden[static_cast<size_t>(l)].emplace_back();
        const auto& score = board.scores(0, static_cast<int>(l)).heads[static_cast<size_t>(h)].score;
        for (int64_t i = 0; i < n(); ++i) {
          const bool theirs = expected.as<uint8_t>()[(l * heads + h) * n() + i] != 0;
          if (theirs) golden[static_cast<size_t>(l)].back().push_back(static_cast<int32_t>(i));
          kept += theirs;
          if (theirs == ours[static_cast<size_t>(i)]) continue;
          ++strangers;  // allowed for a tie at the threshold only
          ASSERT_LT(i, static_cast<int64_t>(score.size())) << key << ": the window is always kept";
          EXPECT_NEAR(score[static_cast<size_t>(i)], report.threshold, 1e-6) << key << " layer " << l << " head " << h << " token " << i;
        }
      }
    EXPECT_EQ(report.entries_kept, kept) << key;
    EXPECT_EQ(static_cast<int64_t>(budget.value) * layers * heads, kept) << key;

    // Streaming eviction while the prompt is read keeps the very same set.
    Evictor evictor(*ctx_, *model_, policy, budget);
    SequenceState streamed = model_->new_state(memory_, {});
    prefill(*ctx_, *model_, streamed, prompt_, &evictor, {.chunk = 29}, nullptr);
    for (int64_t l = 0; l < layers && strangers == 0; ++l)
      for (int64_t h = 0; h < heads; ++h)
        EXPECT_EQ(streamed.kv.positions(static_cast<int>(l), static_cast<int>(h)), keep[static_cast<size_t>(l)][static_cast<size_t>(h)])
            << key << " layer " << l << " head " << h;

    if (!has(base + ".decode_logits")) continue;
    const std::vector<float> logits = floats(base + ".decode_logits");
    const std::vector<int32_t> tokens = ids("greedy_ids");
    const auto fed = std::span(tokens).first(logits.size() / static_cast<size_t>(vocab()));
    SequenceState small{dense.kv.copy(*ctx_, golden), {}, dense.next_position};
    expect_close(decode(small, fed), logits, base + ".decode_logits");
    if (strangers == 0) expect_close(decode(streamed, fed), logits, base + ".decode_logits, streamed");
  }
}

struct Rival {
  std::string key, spec;
  int64_t first = 0;  // kvpress gives so many first tokens a score above all others …
  int64_t last = 0;   // … and so many last ones
};

TEST_P(TransformerGolden, KvpressScores) {
  const std::vector<Rival> rivals = {{"snapkv", "snapkv", 0, 32}, {"tova", "tova", 0, 1},           {"keydiff", "keydiff"},
                                     {"knorm", "knorm"},          {"observed_attention", "h2o"},    {"expected_attention", "expected_attention", 4, 0},
                                     {"lagkv", "lagkv:lag=32"},   {"streaming_llm", "streaming_llm"}};
  std::vector<std::shared_ptr<const Policy>> policies;
  for (const Rival& r : rivals) policies.push_back(make_policy(r.spec));
  ScoreBoard board(*ctx_, *model_, policies);
  SequenceState state = model_->new_state(memory_, {});
  prefill(*ctx_, *model_, state, prompt_, &board, {.chunk = 41}, nullptr);

  for (size_t p = 0; p < rivals.size(); ++p) {
    const std::string key = "kvpress." + rivals[p].key + ".score";
    if (!has(key)) continue;
    const Tensor all = io_->get(key);
    ASSERT_EQ(all.rank, 3) << key;
    for (int64_t l = 0; l < all.shape[0]; ++l)
      for (int64_t h = 0; h < all.shape[1]; ++h) {
        const float* expected = all.as<float>() + (l * all.shape[1] + h) * n();
        const auto& found = board.scores(p, static_cast<int>(l)).heads[static_cast<size_t>(h)].score;
        const std::string where = key + " layer " + std::to_string(l) + " head " + std::to_string(h);
        ASSERT_EQ(static_cast<int64_t>(found.size()), n() - rivals[p].last) << where;
        if (rivals[p].key == "streaming_llm") {
          // Its score depends on the budget: ones for what is kept. The set is what counts.
          const int64_t kept = std::count(expected, expected + n(), 1.0f);
          Budget budget = parse_budget(std::to_string(kept));
          const auto ours = board.select(p, budget, state.kv)[static_cast<size_t>(l)][static_cast<size_t>(h)];
          std::vector<int32_t> theirs;
          for (int64_t i = 0; i < n(); ++i)
            if (expected[i] == 1.0f) theirs.push_back(static_cast<int32_t>(i));
          EXPECT_EQ(ours, theirs) << where;
          continue;
        }
        if (rivals[p].key == "lagkv") {
          // Ranks within blocks; where two tokens of a block differ by rounding only, ranks may swap.
          int64_t swapped = 0;
          for (int64_t i = 0; i < n(); ++i) {
            if (expected[i] >= 1.0f) {
              EXPECT_GE(found[static_cast<size_t>(i)], 1.0f) << where << " token " << i;
              continue;
            }
            const double apart = std::fabs(static_cast<double>(found[static_cast<size_t>(i)]) - expected[i]);
            EXPECT_LE(apart, 1.01 / 32) << where << " token " << i;
            swapped += apart > 1e-6;
          }
          EXPECT_LE(swapped, n() / 20) << where;
          continue;
        }
        float top = -INFINITY;
        double size = 0;  // cosines pass through zero, so the error is also measured against the head's largest score
        for (float x : found) size = std::max(size, std::fabs(static_cast<double>(x)));
        for (int64_t i = rivals[p].first; i < n() - rivals[p].last; ++i) {
          const double e = expected[i];
          ASSERT_NEAR(found[static_cast<size_t>(i)], e, 1e-7 + 2e-4 * std::fabs(e) + 5e-6 * size) << where << " token " << i;
          top = std::max(top, expected[i]);
        }
        for (int64_t i = 0; i < rivals[p].first; ++i) EXPECT_GT(expected[i], top) << where << " token " << i;
        for (int64_t i = n() - rivals[p].last; i < n(); ++i) EXPECT_GT(expected[i], top) << where << " token " << i;
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, TransformerGolden, testing::ValuesIn(find_cases()), golden::case_name);

TEST(TransformerGoldens, AreThere) {
  EXPECT_FALSE(find_cases().empty()) << "no folder below " << golden_root() << " holds a config.json";
}

// A folder with results but no config.json would otherwise never be looked at.
TEST(TransformerGoldens, EveryCaseHasAConfig) {
  std::error_code error;
  for (fs::recursive_directory_iterator it(golden_root(), fs::directory_options::follow_directory_symlink, error), end; !error && it != end; it.increment(error))
    if (it->path().filename() == "io.safetensors" && !other_system(fs::relative(it->path(), golden_root()))) {
      EXPECT_TRUE(fs::exists(it->path().parent_path() / "config.json")) << it->path();
    }
}

}  // namespace
}  // namespace lacuna

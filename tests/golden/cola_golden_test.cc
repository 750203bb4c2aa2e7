// Every Cola DLM case below LACUNA_GOLDENS (default tests/goldens) against what the official code computed in f32. A
// case is a folder with io.safetensors and a checkpoint in the published layout; what it holds says what is tested, and
// one that can't be read, or that holds a tensor unknown here, fails. Of end-to-end cases this tests the model: latents,
// velocities and single Euler steps from the official latents, logits. The loop is the generator's (its own test), and
// so are losses and gradients the trainer's.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "base/error.h"
#include "formats/safetensors.h"
#include "goldens.h"
#include "models/cola.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using golden::golden_root;

std::vector<std::string> find_cases() {
  return golden::folders_with(golden_root(), [](const fs::path& file) {
    return file.filename() == "io.safetensors" && is_cola_checkpoint(file.parent_path());
  });
}

using Floats = std::vector<float>;

struct Recorder : ColaObserver {
  void on_tensor(const ColaTap& tap) override {
    Floats& rows = tensors[std::string(tap.part) + "." + std::to_string(tap.layer) + "." + tap.name];
    for (int64_t i = 0; i < tap.rows; ++i)
      rows.insert(rows.end(), tap.data + i * tap.stride, tap.data + i * tap.stride + tap.width);
  }
  std::map<std::string, Floats> tensors;
};

class ColaGolden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    dir_ = golden_root() / GetParam();
    io_ = std::make_unique<SafetensorsFile>(dir_ / "io.safetensors");
    ctx_ = std::make_unique<Context>(memory_, 2);
    ctx_->activations = ActivationType::kF32;
    model_ = ColaModel::load(*ctx_, dir_);
    latent_ = model_->config().latent_dim();
    vocab_ = model_->config().vae.vocab;
    patch_ = model_->config().vae.patch;
    block_ = model_->config().dit.block;
  }

  bool has(const std::string& name) const { return io_->entries().count(name) > 0; }
  bool has_any(const std::string& prefix) const {
    const auto it = io_->entries().lower_bound(prefix);
    return it != io_->entries().end() && it->first.starts_with(prefix);
  }
  Floats floats(const std::string& name) {
    seen_.insert(name);
    const Tensor t = io_->get(name);
    EXPECT_EQ(t.dtype, DType::kF32) << name;
    if (t.dtype != DType::kF32) return {};
    return {t.as<float>(), t.as<float>() + t.elements()};
  }
  std::vector<int64_t> integers(const std::string& name) {
    seen_.insert(name);
    const Tensor t = io_->get(name);
    EXPECT_EQ(t.dtype, DType::kI64) << name;
    if (t.dtype != DType::kI64) return {};
    return {t.as<int64_t>(), t.as<int64_t>() + t.elements()};
  }
  std::vector<int32_t> ids(const std::string& name) {
    const auto wide = integers(name);
    return {wide.begin(), wide.end()};
  }
  void near(const std::string& name, const Floats& found, double allowed) { near(name, floats(name), found, allowed); }
  static void near(const std::string& what, const Floats& expected, const Floats& found, double allowed) {
    ASSERT_EQ(expected.size(), found.size()) << what;
    size_t at = 0;
    double worst = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      const double d = std::fabs(static_cast<double>(found[i]) - expected[i]);
      if (!(d <= worst)) {
        worst = d;
        at = i;
      }
    }
    EXPECT_LE(worst, allowed) << what << " at index " << at << ": found " << (found.empty() ? 0 : found[at])
                              << ", expected " << (found.empty() ? 0 : expected[at]);
  }
  // Everything the case holds must have been looked at; `others` are prefixes of what another test reads.
  void all_seen(const std::vector<std::string>& others = {}) const {
    for (const auto& [name, entry] : io_->entries()) {
      const bool other = std::any_of(others.begin(), others.end(), [&n = name](const auto& o) { return n.starts_with(o); });
      EXPECT_TRUE(other || seen_.count(name)) << "nobody looked at " << name;
    }
  }

  struct Posterior {
    Floats mean, logvar;
  };
  Posterior encode(const std::vector<int32_t>& tokens, const std::vector<int64_t>& lengths) {
    const size_t n = tokens.size() / static_cast<size_t>(patch_) * static_cast<size_t>(latent_);
    Posterior p{Floats(n), Floats(n)};
    model_->encode(*ctx_, tokens, lengths, p.mean.data(), p.logvar.data());
    return p;
  }
  int64_t rows_of(const Floats& z) const { return static_cast<int64_t>(z.size()) / latent_; }
  Floats decode(const Floats& z, const std::vector<LatentRows>& rows) {
    Floats logits(static_cast<size_t>(rows_of(z) * patch_ * vocab_));
    model_->decode(*ctx_, z.data(), rows, logits.data());
    return logits;
  }
  TimestepTable table(const Floats& t, TimestepRounding rounding = TimestepRounding::kNone) {
    return model_->make_timesteps(*ctx_, t, rounding);
  }
  Floats velocity(const TimestepTable& table, const std::vector<int32_t>& t, const Floats& x,
                  const std::vector<LatentRows>& rows) {
    Floats v(x.size());
    model_->velocity(*ctx_, table, t, x.data(), rows, v.data());
    return v;
  }
  // Clean latents join the state's history, in one call and without a velocity.
  void commit(ColaState& state, const Floats& z) {
    const TimestepTable clean = table({0});
    const int64_t n = rows_of(z);
    const std::vector<int32_t> t(static_cast<size_t>(n), 0);
    const std::vector<LatentRows> rows = {{&state, n, n}};
    model_->velocity(*ctx_, clean, t, z.data(), rows, nullptr);
  }
  ColaState new_state() { return model_->new_state(memory_); }

  void test_vae();
  void test_dit();
  void test_prompt(const std::string& prompt, const std::string& tag, int64_t steps);
  void test_end_to_end();
  void test_train_fm(const std::string& scenario);
  void test_train_vae();

  static Floats part(const Floats& x, int64_t begin, int64_t end) { return {x.begin() + begin, x.begin() + end}; }
  static void append(Floats& to, const Floats& x) { to.insert(to.end(), x.begin(), x.end()); }

  fs::path dir_;
  std::unique_ptr<SafetensorsFile> io_;
  MemoryAccount memory_;
  std::unique_ptr<Context> ctx_;
  std::unique_ptr<ColaModel> model_;
  int64_t latent_ = 0, vocab_ = 0, patch_ = 0, block_ = 0;
  std::set<std::string> seen_;
};

constexpr double kLatent = 2e-5, kLogits = 5e-5, kVelocity = 5e-5, kEndToEnd = 2e-4;

void ColaGolden::test_vae() {
  for (const std::string set : {"enc", "encpad"}) {
    Recorder recorder;
    model_->observe(&recorder);
    const Posterior p = encode(ids(set + ".ids"), integers(set + ".lens"));
    near(set + ".mean", p.mean, kLatent);
    near(set + ".logvar", p.logvar, kLatent);
    for (int i = 0; has(set + ".h" + std::to_string(i)); ++i)
      near(set + ".h" + std::to_string(i), recorder.tensors["encoder." + std::to_string(i) + ".hidden"], kLatent);
    if (set == "enc") {
      model_->observe(nullptr);
      const int64_t n = integers("enc.lens")[0] / patch_;
      near("rt.logits", decode(part(p.mean, 0, n * latent_), {{nullptr, n, 0}}), kLogits);
    }
  }
  Recorder recorder;
  model_->observe(&recorder);
  const Floats z = floats("dec.z");
  const auto lens = integers("dec.lens");
  std::vector<LatentRows> rows;
  for (const int64_t n : lens) rows.push_back({nullptr, n, 0});
  near("dec.logits", decode(z, rows), kLogits);
  for (int i = 0; has("dec.h" + std::to_string(i)); ++i)
    near("dec.h" + std::to_string(i), recorder.tensors["decoder." + std::to_string(i) + ".hidden"], kLatent);
  model_->observe(nullptr);

  // Chunk by chunk, all samples of a call together.
  const auto chunks = integers("decinc.chunks");
  const size_t samples = lens.size();
  std::vector<ColaState> states;
  std::vector<Floats> logits(samples);
  std::vector<int64_t> first(samples);
  for (size_t i = 0; i < samples; ++i) {
    states.push_back(new_state());
    if (i > 0) first[i] = first[i - 1] + lens[i - 1];
  }
  for (size_t at = 0; at < chunks.size(); at += samples) {
    Floats now;
    std::vector<LatentRows> entries;
    for (size_t i = 0; i < samples; ++i) {
      const int64_t n = chunks[at + i], from = first[i] + states[i].decoded;
      append(now, part(z, from * latent_, (from + n) * latent_));
      entries.push_back({&states[i], n, n});
    }
    const Floats out = decode(now, entries);
    int64_t row = 0;
    for (size_t i = 0; i < samples; ++i) {
      const int64_t width = patch_ * vocab_, n = chunks[at + i];
      append(logits[i], part(out, row * width, (row + n) * width));
      row += n;
    }
  }
  Floats all;
  for (const Floats& l : logits) append(all, l);
  near("decinc.logits", all, kLogits);
  all_seen();
}

void ColaGolden::test_dit() {
  const Floats t = floats("t");
  const auto times = static_cast<int32_t>(t.size());
  TimestepTable table = this->table(t);
  near("temb.emb", {table.embedding(), table.embedding() + static_cast<size_t>(times) * static_cast<size_t>(model_->config().dit.dim)},
       kVelocity);
  seen_.insert("temb.sinusoid");  // its embedding stands for it
  const auto all_at = [](int64_t rows, int32_t index) { return std::vector<int32_t>(static_cast<size_t>(rows), index); };

  const Floats full = floats("full.x"), block = floats("block.x");
  const int64_t n = rows_of(full), bs = rows_of(block);
  const auto over_times = [&](const Floats& x, const std::vector<LatentRows>& rows) {
    Floats v;
    for (int32_t i = 0; i < times; ++i) append(v, velocity(table, all_at(rows_of(x), i), x, rows));
    return v;
  };
  near("full.v", over_times(full, {{nullptr, n, 0}}), kVelocity);
  std::vector<int32_t> by_row(static_cast<size_t>(n));
  for (size_t i = 0; i < by_row.size(); ++i) by_row[i] = static_cast<int32_t>(i);
  near("full.v_tok", velocity(this->table(floats("full.t_tok")), by_row, full, {{nullptr, n, 0}}), kVelocity);
  near("uncond.v", over_times(block, {{nullptr, bs, 0}}), kVelocity);

  // A clean history, with the velocities of the call that appends it.
  ColaState state = new_state();
  const Floats hist = floats("hist.x");
  const int64_t h = rows_of(hist);
  const TimestepTable clean = this->table({0});
  near("hist.v", velocity(clean, all_at(h, 0), hist, {{&state, h, h}}), kVelocity);
  const ColaDitConfig& c = model_->config().dit;
  for (int layer = 0; layer < c.layers; ++layer) {
    const std::string at = std::to_string(layer);
    if (!has("hist.k" + at)) continue;
    // The golden's keys are those before RoPE; ours lie rotated.
    Floats keys = floats("hist.k" + at);
    const auto width = static_cast<size_t>(c.heads * c.head_dim);
    Floats found_k(keys.size()), found_v(keys.size()), k(static_cast<size_t>(c.head_dim)), v(k);
    for (int64_t row = 0; row < h; ++row)
      for (int head = 0; head < c.heads; ++head) {
        const size_t to = static_cast<size_t>(row) * width + static_cast<size_t>(head * c.head_dim);
        for (int i = 0; i < c.rope_dim / 2; ++i) {
          const double angle = static_cast<double>(row) * std::pow(10000.0, -2.0 * i / c.rope_dim);
          float &a = keys[to + static_cast<size_t>(2 * i)], &b = keys[to + static_cast<size_t>(2 * i + 1)];
          const double x = a, y = b;
          a = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
          b = static_cast<float>(y * std::cos(angle) + x * std::sin(angle));
        }
        kv_read(*ctx_, state.dit.layout(layer), state.dit.view(layer, head), row, row + 1, k.data(), v.data());
        std::copy(k.begin(), k.end(), found_k.begin() + static_cast<std::ptrdiff_t>(to));
        std::copy(v.begin(), v.end(), found_v.begin() + static_cast<std::ptrdiff_t>(to));
      }
    near("rotated hist.k" + at, keys, found_k, kVelocity);
    near("hist.v" + at, found_v, kVelocity);
  }

  near("cached.v", over_times(block, {{&state, bs, 0}}), kVelocity);
  EXPECT_EQ(state.history, h);
  near("cached.v_pinned",
       velocity(this->table(floats("cached.t_pinned")), {by_row.begin(), by_row.begin() + bs}, block, {{&state, bs, 0}}),
       kVelocity);

  const auto debug = std::find(t.begin(), t.end(), 437.5f);
  ASSERT_NE(debug, t.end());
  Recorder recorder;
  model_->observe(&recorder);
  velocity(table, all_at(bs, static_cast<int32_t>(debug - t.begin())), block, {{&state, bs, 0}});
  model_->observe(nullptr);
  for (int i = 0; i <= c.layers; ++i)
    near("dbg.h" + std::to_string(i), recorder.tensors["dit." + std::to_string(i - 1) + ".hidden"], kVelocity);
  for (const std::string name : {"msa_in", "q_norm", "k_norm", "attn", "after_attn", "mlp_in", "mlp"})
    near("dbg.b0." + name, recorder.tensors["dit.0." + name], kVelocity);

  // The block itself joins, and the next one is asked for: in two calls, and in one that holds both.
  const Floats next = floats("commit.x3");
  ColaState before = state.copy(*ctx_);
  commit(state, block);
  EXPECT_EQ(state.history, h + bs);
  near("commit.v3", over_times(next, {{&state, rows_of(next), 0}}), kVelocity);
  TimestepTable with_clean = [&] {
    Floats both = t;
    both.push_back(0);
    return this->table(both);
  }();
  Floats merged;
  for (int32_t i = 0; i < times; ++i) {
    ColaState copy = before.copy(*ctx_);
    std::vector<int32_t> at = all_at(bs, times);
    at.resize(static_cast<size_t>(bs + rows_of(next)), i);
    Floats both = block;
    append(both, next);
    const Floats v = velocity(with_clean, at, both, {{&copy, rows_of(both), bs}});
    append(merged, part(v, bs * latent_, static_cast<int64_t>(v.size())));
    EXPECT_EQ(copy.history, h + bs);
  }
  near("commit.v3", merged, kVelocity);

  // Histories of unequal lengths, one of them empty.
  const Floats histories = floats("batch.hist"), x = floats("batch.x");
  std::vector<ColaState> states;
  int64_t from = 0;
  const auto lengths = integers("batch.hist_lens");
  for (const int64_t length : lengths) {
    states.push_back(new_state());
    if (length > 0) commit(states.back(), part(histories, from * latent_, (from + length) * latent_));
    from += length;
  }
  std::vector<LatentRows> entries;
  for (ColaState& s : states) entries.push_back({&s, rows_of(x) / static_cast<int64_t>(lengths.size()), 0});
  near("batch.v", velocity(table, all_at(rows_of(x), static_cast<int32_t>(debug - t.begin())), x, entries), kVelocity);
  all_seen();
}

// One prompt with one set of timesteps: every block's velocities and Euler steps from the official latents.
void ColaGolden::test_prompt(const std::string& prompt, const std::string& tag, int64_t steps) {
  const std::string at = prompt + "." + tag + ".";
  std::vector<int32_t> tokens = ids(prompt + ".ids");
  const int64_t known = integers(prompt + ".known")[0];
  const auto real = static_cast<int64_t>(tokens.size()) / patch_;
  const int64_t start = real / block_ * block_, block_size = block_ * latent_;
  EXPECT_EQ(known, (real - start) * patch_);
  tokens.resize(static_cast<size_t>((real + block_ - 1) / block_ * block_ * patch_), static_cast<int32_t>(vocab_ - 1));
  Posterior p = encode(tokens, {static_cast<int64_t>(tokens.size())});
  model_->to_prior(p.mean);
  const Floats z = part(p.mean, 0, real * latent_);
  near(prompt + ".z", z, kLatent);

  const Floats latents = floats(at + "latents");
  const int64_t blocks = static_cast<int64_t>(latents.size()) / ((steps + 1) * block_size);
  Floats t;
  for (int64_t k = 0; k <= steps; ++k) t.push_back(1000 * (1 - static_cast<float>(k) / static_cast<float>(steps)));
  const TimestepTable table =
      this->table(t, tag.ends_with("bf16t") ? TimestepRounding::kBf16 : TimestepRounding::kNone);
  ColaState state = new_state();
  if (start > 0) {
    const Floats prefix = part(z, 0, start * latent_);
    commit(state, prefix);
    const std::vector<LatentRows> rows = {{&state, start, start}};
    model_->decode(*ctx_, prefix.data(), rows, nullptr);
  }
  Floats conditional, unconditional, combined, stepped, logits, expected_steps;
  for (int64_t b = 0; b < blocks; ++b) {
    const auto latent_at = [&](int64_t k) {
      const int64_t from = (b * (steps + 1) + k) * block_size;
      return part(latents, from, from + block_size);
    };
    const float guidance = b == 0 && start == 0 ? 1.0f : 7.0f;
    for (int64_t k = 0; k < steps; ++k) {
      const Floats x = latent_at(k);
      std::vector<int32_t> times(static_cast<size_t>(block_), static_cast<int32_t>(k));
      if (b == 0) std::fill_n(times.begin(), known / patch_, static_cast<int32_t>(steps));
      times.insert(times.end(), times.begin(), times.begin() + block_);
      Floats both = x;
      append(both, x);
      const Floats v = velocity(table, times, both, {{&state, block_, 0}, {nullptr, block_, 0}});
      const Floats c = part(v, 0, block_size), u = part(v, block_size, 2 * block_size);
      const float dt = (t[static_cast<size_t>(k)] - t[static_cast<size_t>(k) + 1]) / 1000;
      for (size_t i = 0; i < c.size(); ++i) {
        combined.push_back(u[i] + guidance * (c[i] - u[i]));
        const bool pinned = b == 0 && static_cast<int64_t>(i) < known / patch_ * latent_;
        stepped.push_back(pinned ? x[i] : x[i] - dt * combined.back());
      }
      append(expected_steps, latent_at(k + 1));
      append(conditional, c);
      append(unconditional, u);
    }
    const Floats last = latent_at(steps);
    append(logits, decode(last, {{&state, block_, block_}}));
    commit(state, last);
  }
  if (has(at + "v_cond")) {
    near(at + "v_cond", conditional, kEndToEnd);
    near(at + "v_uncond", unconditional, kEndToEnd);
    near(at + "v", combined, kEndToEnd);
  }
  near(at + "steps", expected_steps, stepped, kEndToEnd);
  near(at + "logits", logits, kEndToEnd);
}

void ColaGolden::test_end_to_end() {
  int tested = 0;
  for (const auto& [name, entry] : io_->entries()) {
    // p<i>.N<steps>.<tag>.latents
    const auto words = golden::split(name, '.');
    if (words.size() != 4 || words[3] != "latents") continue;
    test_prompt(words[0], words[1] + "." + words[2], std::stoll(words[1].substr(1)));
    ++tested;
  }
  EXPECT_GT(tested, 0);
  for (const auto& [name, entry] : io_->entries())
    if (name.find(".ids_rp") != std::string::npos || name.find(".margin_rp") != std::string::npos) seen_.insert(name);
  all_seen({"noise", "sampling.", "stop.", "short."});
}

// The trainer's forward: a sequence's clean half is history, block by block, and the noisy blocks are asked for.
void ColaGolden::test_train_fm(const std::string& s) {
  const auto lens = integers(s + ".lens"), sizes = integers(s + ".block_sizes");
  const Floats packed = floats(s + ".txt_2L"), t = floats(s + ".timestep_2L");
  Floats pred;
  int64_t row = 0;
  for (size_t i = 0; i < lens.size(); ++i) {
    const int64_t n = lens[i], bs = sizes[std::min(i, sizes.size() - 1)];
    model_ = ColaModel::load(*ctx_, dir_, {}, bs);
    ColaState state = new_state();
    for (int64_t b = 0; b < n; b += bs) {
      const int64_t noisy = row + n + b, m = std::min(bs, n - b);
      const Floats times(t.begin() + noisy, t.begin() + noisy + m);
      std::vector<int32_t> at(static_cast<size_t>(m));
      for (size_t j = 0; j < at.size(); ++j) at[j] = static_cast<int32_t>(j);
      append(pred, velocity(table(times), at, part(packed, noisy * latent_, (noisy + m) * latent_), {{&state, m, 0}}));
      commit(state, part(packed, (row + b) * latent_, (row + b + m) * latent_));
    }
    row += 2 * n;
  }
  near(s + ".pred", pred, kVelocity);
}

void ColaGolden::test_train_vae() {
  const auto lens = integers("lens");
  std::vector<LatentRows> rows;
  for (const int64_t n : lens) rows.push_back({nullptr, n / patch_, 0});
  const Posterior p = encode(ids("ids"), lens);
  near("mean", p.mean, kLatent);
  near("logvar", p.logvar, kLatent);
  const Floats eps = floats("eps");
  Floats z(p.mean.size());
  for (size_t i = 0; i < z.size(); ++i) z[i] = p.mean[i] + std::exp(0.5f * p.logvar[i]) * eps[i];
  near("z", z, kLatent);
  near("logits", decode(z, rows), kLogits);
  near("mean_masked", encode(ids("ids_masked"), lens).mean, kLatent);
}

TEST_P(ColaGolden, IsReproduced) {
  if (has("enc.ids")) {
    test_vae();
  } else if (has("full.x")) {
    test_dit();
  } else if (has("p0.ids")) {
    test_end_to_end();
  } else if (has("plain.pred") || has("mixed.pred")) {
    for (const std::string s : {"plain", "mixed"})
      if (has(s + ".pred")) test_train_fm(s);
  } else if (has("ids_masked")) {
    test_train_vae();
  } else {
    ADD_FAILURE() << "a case of no known kind";
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ColaGolden, testing::ValuesIn(find_cases()), golden::case_name);

TEST(ColaGoldens, ThereAreCases) { EXPECT_FALSE(find_cases().empty()) << golden_root(); }

}  // namespace
}  // namespace lacuna

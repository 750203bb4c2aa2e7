#include "models/state_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>

#include "base/error.h"
#include "formats/safetensors.h"
#include "formats/safetensors_writer.h"
#include "models/forward.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

fs::path goldens() { return fs::path(LACUNA_SOURCE_DIR) / "tests/goldens"; }

struct Engine {
  explicit Engine(const fs::path& dir) : ctx(memory, 2) {
    ctx.activations = ActivationType::kF32;
    model = load_model(ctx, dir);
  }
  std::vector<float> read(SequenceState& state, std::span<const int32_t> ids) {
    std::vector<float> logits(ids.size() * static_cast<size_t>(model->info().vocab));
    prefill(ctx, *model, state, ids, nullptr, {}, nullptr, logits.data());
    return logits;
  }
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<Model> model;
};

std::vector<int32_t> ids_of(int64_t n, int32_t step) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>((i * step + 3) % 61));
  return ids;
}

class StateFile : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("lacuna_state_" + std::to_string(getpid()));
    fs::remove_all(dir_);
    fs::create_directory(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string error_of(const std::function<void()>& act) {
    try {
      act();
    } catch (const Error& e) {
      EXPECT_NE(e.kind(), ErrorKind::kInternal) << e.what();
      return e.what();
    }
    return "no error";
  }
  // The saved file with one thing changed.
  struct Saved {
    std::map<std::string, SafetensorsWriter::Spec> specs;
    std::map<std::string, std::vector<std::byte>> data;
    std::map<std::string, std::string> metadata;
  };
  Saved open(const fs::path& path) {
    const SafetensorsFile file(path);
    Saved s;
    s.metadata = file.metadata();
    for (const auto& [name, e] : file.entries()) {
      s.specs[name] = {name, e.dtype, e.shape};
      s.data[name].assign(e.data.begin(), e.data.end());
    }
    return s;
  }
  void write(const Saved& s, const fs::path& path) {
    std::vector<SafetensorsWriter::Spec> specs;
    for (const auto& [name, spec] : s.specs) specs.push_back(spec);
    SafetensorsWriter writer(path, specs, s.metadata);
    for (const auto& [name, data] : s.data) writer.write(name, data.data(), data.size());
    writer.commit();
  }
  fs::path dir_;
};

// What follows a loaded state is what follows the state itself, bit for bit: caches of every dtype, windows,
// recurrent states, evicted heads of unequal lengths (an empty one among them).
TEST_F(StateFile, GoesOnBitForBit) {
  for (const char* name : {"transformer/qwen3", "transformer/mistral", "spikingbrain/base_T24"}) {
    Engine e(goldens() / name);
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8})
      for (const bool evicted : {false, true}) {
        SCOPED_TRACE(std::string(name) + ", " + std::string(dtype_name(dtype)) + (evicted ? ", evicted" : ""));
        const auto ids = ids_of(75, 7), rest = ids_of(20, 11);
        SequenceState state = e.model->new_state(e.memory, {dtype, 8});
        e.read(state, ids);
        if (evicted)
          for (int l = 0; l < e.model->info().layers; ++l)
            for (int h = 0; h < state.kv.kv_heads(l); ++h) {
              std::vector<int32_t> keep;
              for (int32_t i = l % 2 + h; i < state.kv.length(l, h) && h > 0; i += 2) keep.push_back(i);
              state.kv.keep(e.ctx, l, h, keep);
            }
        save_state(e.ctx, *e.model, state, ids, dir_ / "state");
        for (const int page_slots : {8, 32}) {
          StoredState loaded = load_state(e.ctx, *e.model, page_slots, dir_ / "state");
          EXPECT_EQ(loaded.ids, ids);
          EXPECT_EQ(loaded.state.next_position, 75);
          EXPECT_EQ(loaded.state.kv.shape().dtype, dtype);
          for (int l = 0; l < e.model->info().layers; ++l)
            for (int h = 0; h < state.kv.kv_heads(l); ++h)
              ASSERT_EQ(loaded.state.kv.positions(l, h), state.kv.positions(l, h));
          SequenceState copy = state.copy(e.ctx);
          EXPECT_EQ(e.read(loaded.state, rest), e.read(copy, rest));
        }
      }
  }
}

TEST_F(StateFile, OtherModelsAndWeightsAreRefused) {
  Engine e(goldens() / "spikingbrain/base_T24"), other(goldens() / "spikingbrain/base_T150_g7"), llama(goldens() / "transformer/llama");
  const auto ids = ids_of(12, 5);
  SequenceState state = e.model->new_state(e.memory, {});
  e.read(state, ids);
  save_state(e.ctx, *e.model, state, ids, dir_ / "state");
  std::string what = error_of([&] { load_state(llama.ctx, *llama.model, 32, dir_ / "state"); });
  for (const char* part : {"state", "another model", "architecture", "gla_swa", "llama"}) EXPECT_NE(what.find(part), std::string::npos) << what;
  what = error_of([&] { load_state(other.ctx, *other.model, 32, dir_ / "state"); });
  for (const char* part : {"layers", "\"4\"", "\"3\""}) EXPECT_NE(what.find(part), std::string::npos) << what;

  // The same shapes, other weights.
  const SafetensorsFile file(goldens() / "spikingbrain/base_T24/model.safetensors");
  fs::create_directory(dir_ / "model");
  fs::copy_file(goldens() / "spikingbrain/base_T24/config.json", dir_ / "model/config.json");
  Saved weights = open(goldens() / "spikingbrain/base_T24/model.safetensors");
  auto& bias = weights.data["model.layers.2.attn.v_proj.bias"];
  for (size_t i = 0; i < bias.size() / 4; ++i) reinterpret_cast<float*>(bias.data())[i] = i % 2 ? 9.0f : -7.0f;
  write(weights, dir_ / "model/model.safetensors");
  Engine changed(dir_ / "model");
  what = error_of([&] { load_state(changed.ctx, *changed.model, 32, dir_ / "state"); });
  EXPECT_NE(what.find("other weights"), std::string::npos) << what;
}

TEST_F(StateFile, DamageIsNamed) {
  Engine e(goldens() / "spikingbrain/base_T24");
  const auto ids = ids_of(40, 5);
  SequenceState state = e.model->new_state(e.memory, {});
  e.read(state, ids);
  save_state(e.ctx, *e.model, state, ids, dir_ / "state");
  const Saved good = open(dir_ / "state");
  struct Case {
    std::function<void(Saved&)> change;
    std::vector<std::string> says;
  };
  const auto floats = [](Saved& s, const char* name) { return reinterpret_cast<float*>(s.data.at(name).data()); };
  const auto ints = [](Saved& s, const char* name) { return reinterpret_cast<int32_t*>(s.data.at(name).data()); };
  const std::vector<Case> cases = {
      {[](Saved& s) { s.metadata.erase("format"); }, {"format", "found nothing"}},
      {[](Saved& s) { s.metadata["format"] = "lacuna-state-9"; }, {"lacuna-state-9"}},
      {[](Saved& s) { s.metadata["kv_dtype"] = "f64"; }, {"kv_dtype", "f64"}},
      {[](Saved& s) { s.metadata["kv_dtype"] = "bf16"; }, {"kv.1.0.k", "bf16", "f32"}},
      {[](Saved& s) { s.specs.erase("state.2"), s.data.erase("state.2"); }, {"state.2", "no tensor"}},
      {[](Saved& s) { s.specs["more"] = s.specs["probe"], s.specs["more"].name = "more", s.data["more"] = s.data["probe"]; }, {"tensors"}},
      {[](Saved& s) { s.specs["state.0"].shape = {2, 8, 32}; }, {"state.0", "[2, 8, 32]", "[2, 16, 16]"}},
      {[&](Saved& s) { floats(s, "state.0")[5] = NAN; }, {"state.0"}},
      {[&](Saved& s) { floats(s, "kv.3.1.v")[5] = INFINITY; }, {"kv.3.1.v"}},
      {[&](Saved& s) { ints(s, "kv.1.0.position")[3] = 40; }, {"kv.1.0.position", "40"}},
      {[&](Saved& s) { ints(s, "kv.1.0.position")[3] = -1; }, {"kv.1.0.position", "-1"}},
      {[&](Saved& s) { std::swap(ints(s, "kv.1.0.position")[3], ints(s, "kv.1.0.position")[4]); }, {"ascending"}},
      {[&](Saved& s) { ints(s, "ids")[7] = 71; }, {"ids", "71"}},
      {[&](Saved& s) { ints(s, "ids")[7] = -1; }, {"ids", "-1"}},
  };
  for (const Case& c : cases) {
    Saved bad = good;
    c.change(bad);
    write(bad, dir_ / "bad");
    const std::string what = error_of([&] { load_state(e.ctx, *e.model, 32, dir_ / "bad"); });
    for (const std::string& part : c.says) EXPECT_NE(what.find(part), std::string::npos) << what << "\nlacks " << part;
    EXPECT_NE(what.find("bad"), std::string::npos) << what;
  }
  fs::resize_file(dir_ / "bad", fs::file_size(dir_ / "bad") / 2);
  EXPECT_NE(error_of([&] { load_state(e.ctx, *e.model, 32, dir_ / "bad"); }), "no error");
  EXPECT_NE(error_of([&] { load_state(e.ctx, *e.model, 32, goldens() / "spikingbrain/base_T24/model.safetensors"); }), "no error");
  EXPECT_NE(error_of([&] { load_state(e.ctx, *e.model, 32, dir_ / "nowhere"); }), "no error");
  EXPECT_NE(error_of([&] { save_state(e.ctx, *e.model, state, ids, dir_ / "nowhere" / "state"); }), "no error");
  EXPECT_EQ(e.memory.now(MemoryTag::kKv), state.kv.allocated_bytes()) << "a refused state left memory behind";
}

// Seeded mutations of real files, half of them in the header: each is read, or refused with a typed error. A
// libFuzzer target would need the whole engine under it; the header's own parser has one (safetensors).
TEST_F(StateFile, RandomDamageNeverDoesWorse) {
  for (const char* name : {"transformer/qwen2", "spikingbrain/base_T24"}) {
    Engine e(goldens() / name);
    for (const DType dtype : {DType::kF32, DType::kI8}) {
      SequenceState state = e.model->new_state(e.memory, {.dtype = dtype});
      const auto ids = ids_of(37, 5);
      e.read(state, ids);
      save_state(e.ctx, *e.model, state, ids, dir_ / "good");
      std::ifstream in(dir_ / "good", std::ios::binary);
      const std::string good((std::istreambuf_iterator<char>(in)), {});
      const size_t header = 8 + *reinterpret_cast<const uint64_t*>(good.data());
      std::mt19937_64 random(11);
      const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
      int read = 0, refused = 0;
      for (int round = 0; round < 250; ++round) {
        std::string bad = good;
        for (size_t n = 1 + below(3); n > 0; --n) {
          const size_t at = round % 2 ? below(header) : below(bad.size());
          switch (below(4)) {
            case 0: bad[at] = static_cast<char>(random()); break;
            case 1: bad[at] = static_cast<char>(bad[at] ^ (1 << below(8))); break;
            case 2: bad[at] = good[below(header)]; break;
            default: bad.resize(std::max(bad.size() - below(64), header / 2)); break;
          }
        }
        std::ofstream(dir_ / "bad", std::ios::binary).write(bad.data(), static_cast<std::streamsize>(bad.size()));
        try {
          StoredState stored = load_state(e.ctx, *e.model, 32, dir_ / "bad");
          e.read(stored.state, std::vector<int32_t>{1, 2});
          ++read;
        } catch (const Error& error) {
          EXPECT_NE(error.kind(), ErrorKind::kInternal) << name << " round " << round << ": " << error.what();
          ++refused;
        }
      }
      EXPECT_GT(refused, 100);
      EXPECT_EQ(read + refused, 250);
    }
  }
}

}  // namespace
}  // namespace lacuna

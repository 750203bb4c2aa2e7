#include "models/convert.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "formats/config.h"
#include "formats/safetensors.h"
#include "formats/safetensors_writer.h"
#include "models/forward.h"
#include "models/moe.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

const fs::path kSource = fs::path(LACUNA_SOURCE_DIR) / "tests/goldens/transformer/qwen2";

class Convert : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lacuna-convert-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
    ctx.activations = ActivationType::kF32;
  }
  void TearDown() override { fs::remove_all(dir_); }
  fs::path make(const std::string& name, const ConvertOptions& options, const fs::path& source = kSource) {
    convert_to_spikingbrain(ctx, source, dir_ / name, options);
    return dir_ / name;
  }
  std::string refusal(const ConvertOptions& options, const fs::path& source = kSource, const char* target = "refused") {
    try {
      convert_to_spikingbrain(ctx, source, dir_ / target, options);
    } catch (const Error& e) {
      EXPECT_NE(e.kind(), ErrorKind::kInternal) << e.what();
      return e.what();
    }
    return "";
  }
  std::vector<float> logits(const fs::path& model, int64_t n = 40) {
    auto m = load_model(ctx, model);
    SequenceState state = m->new_state(memory, {});
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 37 % 192);
    std::vector<float> out(static_cast<size_t>(n * m->info().vocab));
    prefill(ctx, *m, state, ids, nullptr, {}, nullptr, out.data());
    return out;
  }
  // The source in another dtype, with weights that are exact in it.
  fs::path source_as(DType dtype) {
    const fs::path to = dir_ / ("source-" + std::string(dtype_name(dtype)));
    fs::create_directory(to);
    for (const char* file : {"config.json", "generation_config.json"}) fs::copy_file(kSource / file, to / file);
    const ModelFiles files = ModelFiles::open(kSource);
    std::vector<SafetensorsWriter::Spec> specs;
    for (const auto& name : files.names()) {
      const Tensor t = files.get(name);
      specs.push_back({name, dtype, std::vector<int64_t>(t.shape.begin(), t.shape.begin() + t.rank)});
    }
    SafetensorsWriter writer(to / "model.safetensors", specs);
    for (const auto& name : files.names()) {
      const Tensor t = files.get(name);
      std::vector<uint16_t> values;
      for (int64_t i = 0; i < t.elements(); ++i)
        values.push_back(dtype == DType::kBF16 ? to_bf16(t.as<float>()[i]).bits : to_f16(t.as<float>()[i]).bits);
      writer.write(name, values.data(), values.size() * 2);
    }
    writer.commit();
    return to;
  }
  size_t entries() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }

  fs::path dir_;
  MemoryAccount memory;
  Context ctx{memory, 2};
};

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.rank == b.rank && a.shape == b.shape && std::memcmp(a.data, b.data, a.bytes()) == 0;
}

Json config_of(const fs::path& model) {
  std::ifstream in(model / "config.json");
  return Json::parse(in);
}

// The table of section 4, by hand.
std::map<std::string, std::string> table(int layers, const std::vector<std::string>& attention) {
  std::map<std::string, std::string> t = {{"model.embeddings.weight", "model.embed_tokens.weight"},
                                          {"model.norm.weight", "model.norm.weight"}};
  for (int i = 0; i < layers; ++i) {
    const std::string at = "model.layers." + std::to_string(i) + ".";
    t[at + "attn_norm.weight"] = at + "input_layernorm.weight";
    t[at + "mlp_norm.weight"] = at + "post_attention_layernorm.weight";
    for (const std::string& branch : attention) {
      for (const char* p : {"q", "k", "v"})
        for (const char* part : {"weight", "bias"})
          t[at + branch + "." + p + "_proj." + part] = at + "self_attn." + p + "_proj." + part;
      t[at + branch + ".o_proj.weight"] = at + "self_attn.o_proj.weight";
    }
    for (const char* p : {"gate", "up", "down"}) t[at + "mlp." + p + "_proj.weight"] = at + "mlp." + p + "_proj.weight";
  }
  return t;
}

TEST_F(Convert, EveryTensorOfTheTableIsTheSourcesBitForBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const fs::path source = dtype == DType::kF32 ? kSource : source_as(dtype);
    const fs::path made = make("gla-" + std::string(dtype_name(dtype)), {}, source);
    const ModelFiles from = ModelFiles::open(source), to = ModelFiles::open(made);
    const auto names = table(3, {"attn"});
    for (const auto& [name, old] : names) EXPECT_TRUE(same_bytes(to.get(name), from.get(old))) << name;
    // And what is new, in even layers only: Xavier-uniform gates, no bias, norms of one.
    std::set<std::string> rest;
    for (const auto& name : to.names())
      if (!names.contains(name)) rest.insert(name);
    std::set<std::string> wanted;
    for (const int i : {0, 2})
      for (const char* part : {"gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias", "g_norm.weight"})
        wanted.insert("model.layers." + std::to_string(i) + ".attn." + part);
    EXPECT_EQ(rest, wanted);
    for (const std::string at : {"model.layers.0.attn.", "model.layers.2.attn."}) {
      for (const auto& [name, shape] :
           {std::pair{at + "gk_proj.0.weight", std::pair{16, 64}}, {at + "gk_proj.1.weight", {16, 16}}}) {
        const Tensor t = to.get(name, {shape.first, shape.second});
        const double bound = std::pow(2.0, -2.5) * std::sqrt(6.0 / (shape.first + shape.second));
        double sum = 0, squares = 0, most = 0;
        for (int64_t i = 0; i < t.elements(); ++i) {
          const double x = t.as<float>()[i];
          sum += x;
          squares += x * x;
          most = std::max(most, std::fabs(x));
        }
        const auto n = static_cast<double>(t.elements());
        EXPECT_LE(most, bound);
        EXPECT_GT(most, 0.95 * bound);
        EXPECT_LT(std::fabs(sum / n), 4 * bound / std::sqrt(3 * n));
        EXPECT_NEAR(squares / n, bound * bound / 3, 0.2 * bound * bound / 3);
      }
      for (int i = 0; i < 16; ++i) EXPECT_EQ(to.get(at + "gk_proj.1.bias").as<float>()[i], 0.0f);
      for (int i = 0; i < 8; ++i) EXPECT_EQ(to.get(at + "g_norm.weight").as<float>()[i], 1.0f);
    }
    const auto out = logits(made);
    EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
  }
}

TEST_F(Convert, ConfigSaysWhatWasAskedFor) {
  ConvertOptions o;
  o.window = 24;
  o.window_rule = "plus_one";
  o.full_attention = {1};
  o.gate_rank = 5;
  const fs::path made = make("out", o);
  const Json j = config_of(made), old = config_of(kSource);
  EXPECT_EQ(j["model_type"], "gla_swa");
  EXPECT_EQ(j["sliding_window"], 24);
  EXPECT_EQ(j["window_rule"], "plus_one");
  EXPECT_EQ(j["full_attention_layers"], Json({1}));
  EXPECT_EQ(j["gate_low_rank_dim"], 5);
  EXPECT_EQ(j["attn_layers"], Json({1}));
  EXPECT_EQ(j["rope_parameters"], old["rope_parameters"]);
  EXPECT_EQ(j["norm_eps"], old["rms_norm_eps"]);
  EXPECT_EQ(j["eos_token_id"], old["eos_token_id"]);
  EXPECT_EQ(j["tie_word_embeddings"], true);
  EXPECT_TRUE(fs::exists(made / "generation_config.json"));
  auto model = load_model(ctx, made);
  EXPECT_EQ(model->attention(0), nullptr);
  EXPECT_EQ(model->attention(1)->window, 0);  // full
}

TEST_F(Convert, SameSeedSameBytesAndAnotherSeedOnlyChangesWhatIsNew) {
  ConvertOptions o;
  const auto bytes = [](const fs::path& p) {
    std::ifstream in(p / "model.safetensors", std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  const fs::path a = make("a", o), b = make("b", o);
  EXPECT_EQ(bytes(a), bytes(b));
  o.seed = 1;
  const ModelFiles x = ModelFiles::open(a), y = ModelFiles::open(make("c", o));
  int changed = 0;
  for (const auto& name : x.names()) {
    const bool same = same_bytes(x.get(name), y.get(name));
    EXPECT_EQ(same,
              name.find("gk_proj.0.weight") == std::string::npos && name.find("gk_proj.1.weight") == std::string::npos)
        << name;
    changed += !same;
  }
  EXPECT_EQ(changed, 4);
}

TEST_F(Convert, Int8OnTheWayIsInt8AtLoad) {
  ConvertOptions o;
  const fs::path stored = make("stored", o);
  o.weights = WeightMode::kInt8;
  const fs::path made = make("int8", o);
  EXPECT_EQ(config_of(made)["quantization_config"]["quant_method"], "lacuna-int8");
  const ModelFiles a = ModelFiles::open(stored), b = ModelFiles::open(made);
  for (const std::string name : {"model.embeddings.weight", "model.layers.1.mlp.down_proj.weight"}) {
    const Tensor w = a.get(name), codes = b.get(name), scales = b.get(name + "_scale");
    ASSERT_EQ(codes.dtype, DType::kI8);
    std::vector<int8_t> c(static_cast<size_t>(w.elements()));
    std::vector<float> s(static_cast<size_t>(w.shape[0]));
    quantize_rows(ctx, w, c.data(), s.data());
    EXPECT_EQ(std::memcmp(c.data(), codes.data, c.size()), 0);
    EXPECT_EQ(std::memcmp(s.data(), scales.data, s.size() * 4), 0);
  }
  // Once more, from int8: codes and scales go through untouched, those of tied embeddings too.
  const ModelFiles base = ModelFiles::open(fs::path(LACUNA_SOURCE_DIR) / "models/base");
  const ModelFiles again = ModelFiles::open(make("base", {}, fs::path(LACUNA_SOURCE_DIR) / "models/base"));
  for (const char* part : {"weight", "weight_scale"})
    EXPECT_TRUE(same_bytes(again.get(std::string("model.embeddings.") + part),
                           base.get(std::string("model.embed_tokens.") + part)));
  EXPECT_TRUE(same_bytes(again.get("model.layers.8.attn.k_proj.weight_scale"),
                         base.get("model.layers.8.self_attn.k_proj.weight_scale")));
}

// ---- experts

ConvertOptions upcycling(int64_t experts, int64_t k, int64_t shared) {
  ConvertOptions o;
  o.experts = experts;
  o.experts_per_token = k;
  o.shared_experts = shared;
  o.dense_layers = {0};
  o.sinks = 7;
  o.window = 16;
  return o;
}

TEST_F(Convert, ExpertsAreScaledCopies) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const fs::path source = dtype == DType::kF32 ? kSource : source_as(dtype);
    const fs::path made = make("moe-" + std::string(dtype_name(dtype)), upcycling(4, 2, 1), source);
    const ModelFiles from = ModelFiles::open(source), to = ModelFiles::open(made);
    auto names = table(3, {"attn.linear", "attn.softmax"});
    for (const int i : {1, 2})
      for (const char* p : {"gate", "up", "down"})
        names.erase("model.layers." + std::to_string(i) + ".mlp." + p + "_proj.weight");
    for (const auto& [name, old] : names) EXPECT_TRUE(same_bytes(to.get(name), from.get(old))) << name;
    const double alpha = std::pow(1 + 2.0 / 4, -1.0 / 3);
    for (const std::string layer : {"model.layers.1.mlp.", "model.layers.2.mlp."})
      for (const char* p : {"gate", "up", "down"}) {
        const Tensor old = from.get(layer + p + "_proj.weight");
        for (const char* e : {"experts.0.", "experts.3.", "shared_experts.0."}) {
          const Tensor t = to.get(layer + e + p + "_proj.weight");
          ASSERT_EQ(t.dtype, dtype);
          for (int64_t i = 0; i < t.elements(); ++i) {
            if (dtype == DType::kF32)
              ASSERT_EQ(t.as<float>()[i], static_cast<float>(old.as<float>()[i] * alpha));
            else if (dtype == DType::kBF16)
              ASSERT_EQ(t.as<BF16>()[i].bits, to_bf16(static_cast<float>(to_float(old.as<BF16>()[i]) * alpha)).bits);
            else
              ASSERT_EQ(t.as<F16>()[i].bits, to_f16(static_cast<float>(to_float(old.as<F16>()[i]) * alpha)).bits);
          }
        }
        EXPECT_FALSE(to.has(layer + p + "_proj.weight"));
      }
    EXPECT_EQ(to.get("model.sink_embeddings").shape[0], 7);
    const auto out = logits(made);
    EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
  }
}

TEST_F(Convert, Int8ExpertsScaleTheirRowScales) {
  const fs::path base = fs::path(LACUNA_SOURCE_DIR) / "models/base";
  const ModelFiles from = ModelFiles::open(base), to = ModelFiles::open(make("moe", upcycling(3, 1, 2), base));
  const std::string old = "model.layers.4.mlp.up_proj.weight";
  for (const char* e : {"experts.2", "shared_experts.1"}) {
    const std::string name = "model.layers.4.mlp." + std::string(e) + ".up_proj.weight";
    EXPECT_TRUE(same_bytes(to.get(name), from.get(old)));
    for (int i = 0; i < 768; ++i)
      ASSERT_EQ(to.get(name + "_scale").as<float>()[i],
                static_cast<float>(from.get(old + "_scale").as<float>()[i] * std::cbrt(1 / (2 + 1.0 / 3))));
  }
}

// All experts are equal, so the mixture is (S + sum of p) times one scaled feed-forward; with every expert
// chosen the p add up to 1. With sigmoid-free softmax and k = E = 1, S = 0, alpha is 1: the dense layer itself.
TEST_F(Convert, UpcycledLayersAreTheDenseOneScaledAsTheFormulaSays) {
  const auto layer_of = [&](const fs::path& dir, MoeWeights& moe, WeightBinder& weights, int experts, int k,
                            int shared) {
    moe.shape = {64, experts, k, RouterGate::kSoftmax};
    moe.router = weights.matrix("model.layers.1.mlp.router.weight", experts, 64);
    for (int e = 0; e < experts; ++e)
      moe.experts.push_back(bind_feed_forward(weights, "model.layers.1.mlp.experts." + std::to_string(e), 64, 96));
    for (int s = 0; s < shared; ++s)
      moe.shared.push_back(
          bind_feed_forward(weights, "model.layers.1.mlp.shared_experts." + std::to_string(s), 64, 96));
  };
  WeightBinder source(ctx, ModelFiles::open(kSource), {});
  const FeedForward dense = bind_feed_forward(source, "model.layers.1.mlp", 64, 96);
  const int64_t m = 20;
  std::vector<float> x(static_cast<size_t>(64 * m));
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i) * 0.7f);
  std::vector<float> plain(x.size());
  feed_forward(ctx, LayerCall{.row_count = m}, dense, x.data(), plain.data(), LinearMode::kStore);

  struct Shape {
    int experts, k, shared;
  };
  int name = 0;
  for (const Shape s : {Shape{16, 1, 1}, {4, 2, 1}, {4, 4, 0}, {3, 1, 2}, {1, 1, 0}}) {
    const fs::path made = make("m" + std::to_string(name++), upcycling(s.experts, s.k, s.shared));
    WeightBinder weights(ctx, ModelFiles::open(made), {});
    MoeWeights moe;
    layer_of(made, moe, weights, s.experts, s.k, s.shared);
    std::vector<int32_t> chosen(static_cast<size_t>(m * s.k));
    std::vector<float> p(chosen.size()), got(x.size());
    route(ctx, moe.shape, moe.router, x.data(), m, chosen.data(), p.data());
    MoeBlock block;
    block.forward(ctx, LayerCall{.row_count = m}, moe, x.data(), got.data());

    // F with all three matrices times alpha, in double from the source's weights.
    const double alpha = std::pow(s.shared + static_cast<double>(s.k) / s.experts, -1.0 / 3);
    const auto value = [](const Projection& w, int64_t row, int64_t column) {
      return double{w.dense.weight.as<float>()[row * w.in() + column]};
    };
    for (int64_t t = 0; t < m; ++t) {
      double weight = s.shared;
      for (int j = 0; j < s.k; ++j) weight += p[static_cast<size_t>(t * s.k + j)];
      std::vector<double> h(96);
      for (int64_t f = 0; f < 96; ++f) {
        double g = 0, u = 0;
        for (int64_t c = 0; c < 64; ++c) {
          g += alpha * value(dense.gate, f, c) * x[static_cast<size_t>(t * 64 + c)];
          u += alpha * value(dense.up, f, c) * x[static_cast<size_t>(t * 64 + c)];
        }
        h[static_cast<size_t>(f)] = g / (1 + std::exp(-g)) * u;
      }
      for (int64_t c = 0; c < 64; ++c) {
        double y = 0;
        for (int64_t f = 0; f < 96; ++f) y += alpha * value(dense.down, c, f) * h[static_cast<size_t>(f)];
        ASSERT_NEAR(got[static_cast<size_t>(t * 64 + c)], weight * y, 2e-5 * (1 + std::fabs(y)));
      }
    }
    if (s.experts == 1) {
      EXPECT_EQ(got, plain);
    }
  }
}

// ---- refusals, and what is left behind

TEST_F(Convert, OptionsThatCannotBeMeant) {
  const auto says = [&](ConvertOptions o, std::initializer_list<const char*> parts) {
    const std::string what = refusal(o);
    for (const char* part : parts) EXPECT_NE(what.find(part), std::string::npos) << what << "\nlacks: " << part;
    EXPECT_EQ(entries(), 0u);
  };
  ConvertOptions o;
  o.window = 0;
  says(o, {"--window", "found 0"});
  o = {};
  o.full_attention = {2};
  says(o, {"--full-attention", "found layer 2", "odd"});
  o.full_attention = {3};
  says(o, {"--full-attention", "found layer 3", "0 to 2"});
  o.full_attention = {1, 1};
  says(o, {"--full-attention", "layer 1 twice"});
  o = {};
  o.window_rule = "wide";
  says(o, {"window_rule", "wide", "exact"});
  o = {};
  o.gate_rank = 0;
  says(o, {"--gate-rank", "found 0"});
  o = {};
  o.dense_layers = {1};
  says(o, {"--dense-layers", "--experts"});
  o = {};
  o.experts = -1;
  says(o, {"--experts", "found -1"});
  o.experts = 1'000'000'000'000;
  says(o, {"num_experts"});
  o.experts = 4;
  o.experts_per_token = 0;
  says(o, {"--top-k", "found 0", "1 to 4"});
  o.experts_per_token = 5;
  says(o, {"--top-k", "found 5"});
  o.experts_per_token = 1;
  o.dense_layers = {0, 0};
  says(o, {"--dense-layers", "layer 0 twice"});
  o.dense_layers = {0};
  o.sinks = 1 << 20;
  says(o, {"num_sink_tokens"});
}

TEST_F(Convert, OnlyQwen2AndOnlyWholeCheckpoints) {
  EXPECT_NE(refusal({}, kSource.parent_path() / "llama").find("qwen2"), std::string::npos);
  EXPECT_NE(refusal({}, dir_ / "nothing"), "");
  EXPECT_EQ(entries(), 0u);
  const fs::path broken = dir_ / "broken";
  fs::create_directory(broken);
  for (const char* file : {"config.json", "model.safetensors"}) fs::copy_file(kSource / file, broken / file);
  fs::permissions(broken / "model.safetensors", fs::perms::owner_write, fs::perm_options::add);
  {
    std::fstream file(broken / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-400, std::ios::end);
    const uint32_t nan = 0x7fc00000u;
    file.write(reinterpret_cast<const char*>(&nan), 4);
  }
  EXPECT_NE(refusal({}, broken).find("not finite"), std::string::npos);
  EXPECT_EQ(entries(), 1u) << "a failed conversion leaves nothing";
}

TEST_F(Convert, ReplacesOnlyWhenAskedAndNeverItsSource) {
  ConvertOptions o;
  const fs::path made = make("out", o);
  EXPECT_NE(refusal(o, kSource, "out").find("--force"), std::string::npos);
  o.replace = true;
  o.window = 9;
  make("out", o);
  EXPECT_EQ(config_of(made)["sliding_window"], 9);
  const fs::path copy = dir_ / "copy";
  fs::create_directory(copy);
  for (const char* file : {"config.json", "model.safetensors"}) fs::copy_file(kSource / file, copy / file);
  EXPECT_NE(refusal(o, copy, "copy").find("source"), std::string::npos);
  EXPECT_TRUE(fs::exists(copy / "model.safetensors"));
  EXPECT_EQ(entries(), 2u);
}

TEST_F(Convert, CancelsAndReportsProgress) {
  ConvertOptions o;
  uint64_t last = 0, whole = 0;
  o.progress = [&](uint64_t done, uint64_t total) {
    EXPECT_GT(done, last);
    last = done;
    whole = total;
  };
  const ConvertReport r = convert_to_spikingbrain(ctx, kSource, dir_ / "out", o);
  EXPECT_EQ(last, whole);
  EXPECT_EQ(r.bytes, whole);
  EXPECT_EQ(r.architecture, "gla_swa");
  auto model = load_model(ctx, dir_ / "out");
  EXPECT_EQ(model->info().parameters, r.copied_parameters + r.new_parameters);
  int polls = 0;
  o.progress = nullptr;
  o.cancelled = [&] { return ++polls > 5; };
  EXPECT_THROW(convert_to_spikingbrain(ctx, kSource, dir_ / "stopped", o), Cancelled);
  EXPECT_EQ(entries(), 1u);
}

}  // namespace
}  // namespace lacuna

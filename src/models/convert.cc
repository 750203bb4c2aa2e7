#include "models/convert.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string_view>

#include "base/atomic_file.h"
#include "base/atomic_folder.h"
#include "base/error.h"
#include "formats/config.h"
#include "formats/json.h"
#include "formats/spikingbrain_config.h"
#include "formats/spikingbrain_moe_config.h"
#include "models/tensor_stream.h"

namespace lacuna {

namespace fs = std::filesystem;

namespace {

// Dense layers of the 76B model, counted from 0 (report, 3.2).
constexpr int64_t kDenseLayers[] = {0, 1, 2, 4, 6, 8, 10};
// What stands beside the weights and means the same for the new model.
constexpr const char* kCompanions[] = {"generation_config.json",
                                       "tokenizer.json",
                                       "tokenizer_config.json",
                                       "tokenizer.model",
                                       "vocab.json",
                                       "merges.txt",
                                       "special_tokens_map.json",
                                       "added_tokens.json",
                                       "chat_template.jinja",
                                       "LICENSE"};

// SplitMix64 (Steele et al. 2014): the same numbers on every machine.
class Random {
 public:
  // Of one tensor: what is drawn for it does not depend on which others there are.
  Random(uint64_t seed, std::string_view tensor) : state_(seed) {
    for (const char c : tensor) state_ = mix(state_ ^ static_cast<unsigned char>(c));
  }
  double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }  // (0, 1)
  double normal() {                                                                 // Box-Muller, one of the pair
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15u); }
  uint64_t state_;
};

class Conversion {
 public:
  Conversion(Context& ctx, const fs::path& source, const ConvertOptions& options)
      : options_(options),
        config_(ConfigFile::load(source / "config.json")),
        model_(read_config(config_)),
        files_(ModelFiles::open(source)),
        stream_(ctx, files_, options.weights == WeightMode::kInt8) {
    check_options();
    const Json fields = config();
    config_text_ = fields.dump(2) + "\n";
    // The new folder's own reader has the last word on what the options come to.
    const ConfigFile made = ConfigFile::parse(config_text_, "the new config.json", ErrorKind::kBadInput);
    if (hybrid()) {
      parse_spikingbrain_moe_config(made);
      announce_hybrid();
    } else {
      parse_spikingbrain_config(made);
      announce_gla_swa();
    }
  }

  TensorStream& stream() { return stream_; }
  const std::string& config_text() const { return config_text_; }

 private:
  bool hybrid() const { return options_.experts != 0; }
  Json config() const {
    Json j = {{"vocab_size", model_.vocab},
              {"hidden_size", model_.hidden},
              {"intermediate_size", model_.intermediate},
              {"num_hidden_layers", model_.layers},
              {"num_attention_heads", model_.heads},
              {"num_key_value_heads", model_.kv_heads},
              {"hidden_act", "swish"},
              {"norm_eps", number("rms_norm_eps", 1e-6)},
              {"max_position_embeddings", model_.max_positions},
              {"sliding_window", options_.window},
              {"tie_word_embeddings", model_.tie_word_embeddings}};
    if (int64_t{model_.heads} * model_.head_dim != model_.hidden) j["head_dim"] = model_.head_dim;
    for (const char* field : {"rope_theta", "rope_scaling", "rope_parameters", "attention_dropout", "initializer_range",
                              "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "spike_coding"})
      if (const Json* value = config_.raw(field)) j[field] = *value;
    if (model_.stored == StoredWeights::kInt8PerRow || options_.weights == WeightMode::kInt8)
      j["quantization_config"] = {{"quant_method", "lacuna-int8"}, {"bits", 8}, {"granularity", "per_row"}};
    if (options_.full_attention) j["full_attention_layers"] = *options_.full_attention;
    hybrid() ? add_hybrid(j) : add_gla_swa(j);
    return j;
  }
  static ModelConfig read_config(const ConfigFile& config) {
    if (config.text("model_type") != "qwen2")
      config.unsupported("model_type", "\"qwen2\", whose layers these are made of");
    ModelConfig m = parse_model_config(config);
    if (std::any_of(m.layer_window.begin(), m.layer_window.end(), [](int64_t w) { return w > 0; }))
      config.unsupported("use_sliding_window", "full attention in the source: new windows are given by --window");
    return m;
  }

  double number(std::string_view field, double fallback) const { return config_.number(field, 0, 1, fallback); }

  // In the words of the options; what the source has no say in is left to the new config.json's reader.
  void check_options() {
    const auto layers_exist = [&](const char* option, const std::optional<std::vector<int64_t>>& list) {
      if (!list) return;
      std::vector<int64_t> sorted = *list;
      std::sort(sorted.begin(), sorted.end());
      for (size_t i = 0; i < sorted.size(); ++i) {
        if (sorted[i] < 0 || sorted[i] >= model_.layers)
          throw BadInput("{}: found layer {}, expected 0 to {}", option, sorted[i], model_.layers - 1);
        if (i && sorted[i] == sorted[i - 1]) throw BadInput("{}: found layer {} twice", option, sorted[i]);
      }
    };
    layers_exist("--full-attention", options_.full_attention);
    layers_exist("--dense-layers", options_.dense_layers);
    if (options_.window < 1) throw BadInput("--window: found {}, expected 1 or more", options_.window);
    if (options_.gate_rank < 1 || options_.gate_rank > model_.hidden)
      throw BadInput("--gate-rank: found {}, expected 1 to {}", options_.gate_rank, model_.hidden);
    if (options_.experts < 0) throw BadInput("--experts: found {}, expected 0 or more", options_.experts);
    if (hybrid()) {
      if (options_.experts_per_token < 1 || options_.experts_per_token > options_.experts)
        throw BadInput("--top-k: found {}, expected 1 to {}, the number of experts", options_.experts_per_token,
                       options_.experts);
      if (options_.shared_experts < 0)
        throw BadInput("--shared: found {}, expected 0 or more", options_.shared_experts);
      if (options_.sinks < 0) throw BadInput("--sinks: found {}, expected 0 or more", options_.sinks);
      return;
    }
    if (options_.dense_layers) throw BadInput("--dense-layers needs --experts: without them every layer is dense");
    if (!options_.full_attention) return;
    for (const int64_t layer : *options_.full_attention)
      if (SpikingBrainConfig::is_linear(static_cast<int>(layer)))
        throw BadInput("--full-attention: found layer {}, expected odd layers: even ones are linear attention", layer);
  }

  // ---- what both have

  int64_t query_width() const { return int64_t{model_.heads} * model_.head_dim; }
  int64_t key_width() const { return int64_t{model_.kv_heads} * model_.head_dim; }

  void announce_ends() {
    stream_.linear("model.embed_tokens", "model.embeddings", model_.vocab, model_.hidden, false);
    stream_.vector("model.norm.weight", "model.norm.weight", model_.hidden);
    if (!model_.tie_word_embeddings) stream_.linear("lm_head", "lm_head", model_.vocab, model_.hidden, false);
  }
  void announce_attention(const std::string& from, const std::string& to) {
    const int64_t d = model_.hidden;
    stream_.linear(from + ".q_proj", to + ".q_proj", query_width(), d, true);
    stream_.linear(from + ".k_proj", to + ".k_proj", key_width(), d, true);
    stream_.linear(from + ".v_proj", to + ".v_proj", key_width(), d, true);
    stream_.linear(from + ".o_proj", to + ".o_proj", d, query_width(), false);
  }
  void announce_feed_forward(const std::string& from, const std::string& to, double factor = 1) {
    const int64_t d = model_.hidden, f = model_.intermediate;
    stream_.linear(from + ".gate_proj", to + ".gate_proj", f, d, false, factor);
    stream_.linear(from + ".up_proj", to + ".up_proj", f, d, false, factor);
    stream_.linear(from + ".down_proj", to + ".down_proj", d, f, false, factor);
  }
  void announce_norms(const std::string& at) {
    stream_.vector(at + "input_layernorm.weight", at + "attn_norm.weight", model_.hidden);
    stream_.vector(at + "post_attention_layernorm.weight", at + "mlp_norm.weight", model_.hidden);
  }
  // Uniform in +-gain sqrt(6 / (in + out)), as the published code initialises: gain 2^-2.5.
  void announce_xavier(const std::string& name, int64_t out, int64_t in) {
    const double bound = std::exp2(-2.5) * std::sqrt(6.0 / static_cast<double>(in + out));
    stream_.generated(name, {out, in}, [name, bound, seed = options_.seed] {
      return [random = Random(seed, name), bound]() mutable {
        return static_cast<float>((2 * random.uniform() - 1) * bound);
      };
    });
  }
  void announce_normal(const std::string& name, int64_t rows, int64_t columns, double deviation) {
    stream_.generated(name, {rows, columns}, [name, deviation, seed = options_.seed] {
      return [random = Random(seed, name), deviation]() mutable {
        return static_cast<float>(random.normal() * deviation);
      };
    });
  }

  // ---- gla_swa

  void announce_gla_swa() {
    announce_ends();
    for (int i = 0; i < model_.layers; ++i) {
      const std::string at = "model.layers." + std::to_string(i) + ".";
      announce_norms(at);
      announce_attention(at + "self_attn", at + "attn");
      announce_feed_forward(at + "mlp", at + "mlp");
      if (!SpikingBrainConfig::is_linear(i)) continue;
      announce_xavier(at + "attn.gk_proj.0.weight", options_.gate_rank, model_.hidden);
      announce_xavier(at + "attn.gk_proj.1.weight", key_width(), options_.gate_rank);
      stream_.constant(at + "attn.gk_proj.1.bias", key_width(), 0);
      stream_.constant(at + "attn.g_norm.weight", model_.head_dim, 1);
    }
  }

  void add_gla_swa(Json& j) const {
    j["model_type"] = "gla_swa";
    j["architectures"] = {"GLAswaForCausalLM"};
    j["attn_mode"] = "chunk";
    j["use_short_conv"] = false;
    j["conv_size"] = 4;
    j["elementwise_affine"] = true;
    j["gate_logit_normalizer"] = 16;
    j["gate_low_rank_dim"] = options_.gate_rank;
    j["window_rule"] = options_.window_rule;
    j["attn_layers"] = Json::array();
    for (int i = 1; i < model_.layers; i += 2) j["attn_layers"].push_back(i);
  }

  // ---- the parallel hybrid

  std::vector<int64_t> dense_layers() const {
    if (options_.dense_layers) return *options_.dense_layers;
    std::vector<int64_t> list;
    for (const int64_t i : kDenseLayers)
      if (i < model_.layers) list.push_back(i);
    return list;
  }

  void announce_hybrid() {
    const double deviation = number("initializer_range", 0.02);
    announce_ends();
    if (options_.sinks > 0) announce_normal("model.sink_embeddings", options_.sinks, model_.hidden, deviation);
    // Each of the three matrices carries it, so that the output has its cube, 1 / (S + k/N): what it takes for
    // S shared experts of weight 1 and k routed ones of weight 1/N each to add up to the dense layer.
    const double alpha =
        std::cbrt(1 / (static_cast<double>(options_.shared_experts) +
                       static_cast<double>(options_.experts_per_token) / static_cast<double>(options_.experts)));
    const std::vector<int64_t> dense = dense_layers();
    for (int i = 0; i < model_.layers; ++i) {
      const std::string at = "model.layers." + std::to_string(i) + ".";
      announce_norms(at);
      for (const char* branch : {"attn.linear", "attn.softmax"}) {
        announce_attention(at + "self_attn", at + branch);
        stream_.constant(at + branch + ".norm.weight", model_.hidden, 1);
      }
      if (std::find(dense.begin(), dense.end(), i) != dense.end()) {
        announce_feed_forward(at + "mlp", at + "mlp");
        continue;
      }
      announce_normal(at + "mlp.router.weight", options_.experts, model_.hidden, deviation);
      for (int64_t e = 0; e < options_.experts; ++e)
        announce_feed_forward(at + "mlp", at + "mlp.experts." + std::to_string(e), alpha);
      for (int64_t s = 0; s < options_.shared_experts; ++s)
        announce_feed_forward(at + "mlp", at + "mlp.shared_experts." + std::to_string(s), alpha);
    }
  }

  void add_hybrid(Json& j) const {
    j["model_type"] = "spikingbrain_moe";
    j["architectures"] = {"SpikingBrainMoeForCausalLM"};
    j["attention_bias"] = true;
    j["num_sink_tokens"] = options_.sinks;
    j["sink_rope"] = true;
    j["linear_sees_sinks"] = true;
    j["softmax_rope"] = true;
    j["branch_norm"] = "after_projection";
    j["branch_weights"] = "fixed";
    j["linear_branch_weight"] = 0.5;
    j["softmax_branch_weight"] = 0.5;
    j["router_function"] = "softmax";
    j["num_experts"] = options_.experts;
    j["num_experts_per_tok"] = options_.experts_per_token;
    j["num_shared_experts"] = options_.shared_experts;
    j["dense_layers"] = dense_layers();
  }

  const ConvertOptions& options_;
  ConfigFile config_;
  ModelConfig model_;
  ModelFiles files_;
  TensorStream stream_;
  std::string config_text_;
};

bool inside(const fs::path& path, const fs::path& folder) {
  const auto [end, unused] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return end == folder.end();
}

}  // namespace

ConvertReport convert_to_spikingbrain(Context& ctx, const fs::path& source, const fs::path& target,
                                      const ConvertOptions& options) {
  // Replacing a folder that holds the source would leave neither.
  std::error_code ignored;
  if (inside(fs::weakly_canonical(source, ignored), fs::weakly_canonical(target, ignored)))
    throw BadInput("{}: holds the source {}; expected another folder for the result", target.string(), source.string());
  Conversion conversion(ctx, source, options);
  TensorStream& stream = conversion.stream();
  AtomicFolder folder(target, options.replace, "config.json");
  ConvertReport report;
  write_file(folder.temporary() / "config.json", conversion.config_text());
  for (const char* name : kCompanions) {
    std::error_code error;
    if (!fs::is_regular_file(source / name, error)) continue;
    const fs::path copy = folder.temporary() / name;
    if (!fs::copy_file(source / name, copy, error) || error)
      throw IoError("{}: cannot be copied to {}: {}", (source / name).string(), copy.string(), error.message());
    fs::permissions(copy, fs::perms::owner_write, fs::perm_options::add, error);
    report.files.push_back(name);
  }
  stream.write(folder.temporary() / "model.safetensors", {options.progress, options.cancelled});
  // What cannot be loaded is not handed over. Values were checked as they were read.
  LoadOptions load;
  load.check_finite = false;
  report.architecture = load_model(ctx, folder.temporary(), load)->info().architecture;
  folder.commit();

  report.tensors = stream.tensors();
  report.copied_parameters = stream.copied_parameters();
  report.new_parameters = stream.new_parameters();
  report.bytes = stream.bytes();
  return report;
}

}  // namespace lacuna

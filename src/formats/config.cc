#include "formats/config.h"

#include <algorithm>
#include <limits>

namespace lacuna {

namespace fs = std::filesystem;

namespace {

// Far above any model, far below where products of two or three sizes leave int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// What the families differ in where config.json leaves a field out or has none for it.
struct Family {
  std::string_view model_type;
  int64_t max_positions;      // default of max_position_embeddings
  int64_t head_dim;           // default; 0 = hidden / heads
  bool attention_bias_field;  // attention_bias rules q, k, v and o
  bool qkv_bias;              // without such a field
  bool mlp_bias_field;
  bool qk_norm;
  enum { kNoWindow, kEveryLayer, kByLayer } window;
};

constexpr Family kFamilies[] = {
    {"llama", 2048, 0, true, false, true, false, Family::kNoWindow},
    {"mistral", 131072, 0, false, false, false, false, Family::kEveryLayer},
    {"qwen2", 32768, 0, false, true, false, false, Family::kByLayer},
    {"qwen3", 32768, 128, true, false, false, true, Family::kByLayer},
};

const Family& family_of(const ConfigFile& config) {
  const std::string type = config.text("model_type");
  for (const Family& family : kFamilies)
    if (family.model_type == type) return family;
  config.unsupported("model_type", "llama, mistral, qwen2 and qwen3 here");
}

std::vector<int64_t> windows(const ConfigFile& config, const Family& family, int layers) {
  std::vector<int64_t> window(static_cast<size_t>(layers), 0);
  if (family.window == Family::kNoWindow) return window;
  if (family.window == Family::kEveryLayer) {
    // An absent field means 4096 to the reference, an explicit null means none.
    const int64_t w = config.mentions("sliding_window") ? config.integer("sliding_window", 1, kMaxPositions, 0) : 4096;
    std::fill(window.begin(), window.end(), w);
    return window;
  }
  const bool use = config.boolean("use_sliding_window", false);
  const bool none = config.mentions("sliding_window") && !config.has("sliding_window");
  const int64_t w = !use || none ? 0 : config.integer("sliding_window", 1, kMaxPositions, 4096);
  if (!config.has("layer_types")) {
    const int64_t first = config.integer("max_window_layers", 0, kMaxPositions, 28);
    for (int64_t i = first; i < layers; ++i) window[static_cast<size_t>(i)] = w;
    return window;
  }
  const auto types = config.texts("layer_types");
  if (types.size() != window.size()) config.wrong("layer_types", fmt::format("{} entries, one a layer", layers));
  for (size_t i = 0; i < types.size(); ++i) {
    if (types[i] == "full_attention") continue;
    if (types[i] != "sliding_attention") config.unsupported("layer_types", "full_attention and sliding_attention");
    if (w == 0) config.wrong("sliding_window", "a window, since layer_types has sliding_attention");
    window[i] = w;
  }
  return window;
}

RopeConfig rope_from(const ConfigFile& parameters, const ConfigFile& config, double theta, int64_t max_positions) {
  constexpr double kHuge = 1e15;
  RopeConfig rope;
  rope.theta = parameters.number("rope_theta", 1, kHuge, theta);
  const std::string_view field = parameters.has("rope_type") ? "rope_type" : "type";
  const std::string type = parameters.text(field, "default");
  for (const ConfigFile* where : {&parameters, &config})
    if (where->number("partial_rotary_factor", 0, 1, 1) != 1)
      where->unsupported("partial_rotary_factor", "1: the whole head is rotated");
  if (type == "default") return rope;
  const auto factor = [&] { return parameters.number("factor", 1e-6, 1e6); };
  const auto original = [&] {
    // Some families keep it beside the parameters, where it has priority.
    const ConfigFile& where = config.has("original_max_position_embeddings") ? config : parameters;
    return static_cast<double>(
        where.integer("original_max_position_embeddings", 1, kMaxPositions, max_positions));
  };
  if (type == "linear" || type == "dynamic") {
    rope.type = type == "linear" ? RopeType::kLinear : RopeType::kDynamic;
    rope.factor = factor();
  } else if (type == "llama3") {
    rope.type = RopeType::kLlama3;
    rope.factor = factor();
    rope.original_max_position = original();
    rope.low_freq_factor = parameters.number("low_freq_factor", 1e-6, 1e6);
    rope.high_freq_factor = parameters.number("high_freq_factor", 1e-6, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor)
      parameters.wrong("high_freq_factor", fmt::format("more than low_freq_factor, {}", rope.low_freq_factor));
  } else if (type == "yarn") {
    rope.type = RopeType::kYarn;
    rope.original_max_position = original();
    rope.factor = parameters.has("factor") || !parameters.mentions("factor")
                      ? factor()
                      : static_cast<double>(max_positions) / rope.original_max_position;
    // The ramp divides by log(theta).
    if (rope.theta <= 1) parameters.wrong("rope_theta", "more than 1 with yarn");
    const auto optional = [&](std::string_view name) -> std::optional<double> {
      if (!parameters.has(name)) return std::nullopt;
      return parameters.number(name, 0, 1e6);
    };
    rope.attention_factor = optional("attention_factor");
    rope.mscale = optional("mscale");
    rope.mscale_all_dim = optional("mscale_all_dim");
    const auto rotations = [&](std::string_view name, double fallback) {
      const double x = parameters.number(name, 0, 1e6, fallback);
      return x == 0 ? fallback : x;  // the reference takes 0 for "not set"
    };
    rope.beta_fast = rotations("beta_fast", 32);
    rope.beta_slow = rotations("beta_slow", 1);
    rope.truncate = parameters.boolean("truncate", true);
  } else {
    parameters.unsupported(field, "default, linear, dynamic, llama3 and yarn");
  }
  return rope;
}

std::optional<int32_t> token_id(const ConfigFile& config, std::string_view field) {
  if (!config.has(field)) return std::nullopt;
  return static_cast<int32_t>(config.integer(field, 0, std::numeric_limits<int32_t>::max()));
}

}  // namespace

StoredWeights parse_stored_weights(const ConfigFile& config) {
  const auto quantization = config.object("quantization_config");
  if (!quantization) return StoredWeights::kFloat;
  if (quantization->text("quant_method") != "lacuna-int8")
    quantization->unsupported("quant_method", "\"lacuna-int8\" (made by lacuna convert)");
  if (quantization->integer("bits", 1, 64) != 8) quantization->unsupported("bits", "8");
  if (quantization->text("granularity") != "per_row") quantization->unsupported("granularity", "\"per_row\"");
  return StoredWeights::kInt8PerRow;
}

std::vector<int32_t> parse_token_ids(const ConfigFile& config, std::string_view field) {
  std::vector<int32_t> ids;
  for (int64_t id : config.integers(field, 0, std::numeric_limits<int32_t>::max()))
    ids.push_back(static_cast<int32_t>(id));
  return ids;
}

HeadShape parse_head_shape(const ConfigFile& config, int64_t hidden, int64_t max_width, int default_head_dim) {
  HeadShape s;
  s.heads = static_cast<int>(config.integer("num_attention_heads", 1, 1 << 16));
  s.kv_heads = static_cast<int>(config.integer("num_key_value_heads", 1, 1 << 16, s.heads));
  if (s.heads % s.kv_heads != 0)
    config.wrong("num_key_value_heads", fmt::format("a divisor of num_attention_heads, {}", s.heads));
  if (config.has("head_dim") || default_head_dim != 0) {
    s.head_dim = static_cast<int>(config.integer("head_dim", 1, 1 << 16, default_head_dim));
    s.source = "head_dim";
  } else {
    if (hidden % s.heads != 0)
      config.wrong("hidden_size", fmt::format("a multiple of num_attention_heads, {}, or a field head_dim", s.heads));
    s.head_dim = static_cast<int>(hidden / s.heads);
    s.source = "hidden_size";
  }
  if (int64_t{s.heads} * s.head_dim > max_width)
    config.wrong(s.source, fmt::format("heads of at most {} over all {}", max_width, s.heads));
  return s;
}

RopeConfig parse_rope_config(const ConfigFile& config, int64_t max_positions) {
  const double theta = config.number("rope_theta", 1, 1e15, 10000);
  std::optional<ConfigFile> parameters;
  for (const char* field : {"rope_scaling", "rope_parameters"}) {  // the reference's order
    if (parameters && !parameters->fields().empty()) break;
    if (auto found = config.object(field)) parameters = std::move(found);
  }
  if (!parameters || parameters->fields().empty()) {
    if (config.number("partial_rotary_factor", 0, 1, 1) != 1)
      config.unsupported("partial_rotary_factor", "1: the whole head is rotated");
    RopeConfig rope;
    rope.theta = theta;
    return rope;
  }
  // Parameters by layer type are read when all say the same.
  std::optional<RopeConfig> uniform;
  for (const std::string& field : parameters->fields()) {
    if (!parameters->is_object(field)) continue;
    const RopeConfig rope = rope_from(*parameters->object(field), config, theta, max_positions);
    if (uniform && !(*uniform == rope))
      parameters->unsupported(field, "one set of rotary parameters for all layer types");
    uniform = rope;
  }
  return uniform ? *uniform : rope_from(*parameters, config, theta, max_positions);
}

ModelConfig parse_model_config(const ConfigFile& config) {
  const Family& family = family_of(config);
  ModelConfig m;
  m.model_type = family.model_type;
  m.vocab = config.integer("vocab_size", 1, kMaxVocab);
  m.hidden = config.integer("hidden_size", 1, kMaxWidth);
  m.intermediate = config.integer("intermediate_size", 1, kMaxWidth);
  m.layers = static_cast<int>(config.integer("num_hidden_layers", 1, kMaxLayers));
  const HeadShape shape = parse_head_shape(config, m.hidden, kMaxWidth, family.head_dim);
  m.heads = shape.heads;
  m.kv_heads = shape.kv_heads;
  m.head_dim = shape.head_dim;
  if (m.head_dim % 2 != 0)
    config.wrong(shape.source, fmt::format("an even size of a head (it is {}): rotary embedding turns pairs", m.head_dim));
  m.rms_norm_eps = static_cast<float>(config.number("rms_norm_eps", 1e-30, 1, 1e-6));
  m.tie_word_embeddings = config.boolean("tie_word_embeddings", false);
  m.qkv_bias = family.attention_bias_field ? config.boolean("attention_bias", false) : family.qkv_bias;
  m.o_bias = family.attention_bias_field && m.qkv_bias;
  m.mlp_bias = family.mlp_bias_field && config.boolean("mlp_bias", false);
  m.qk_norm = family.qk_norm;
  const std::string activation = config.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") config.unsupported("hidden_act", "\"silu\"");
  m.max_positions = config.integer("max_position_embeddings", 1, kMaxPositions, family.max_positions);
  m.layer_window = windows(config, family, m.layers);
  m.rope = parse_rope_config(config, m.max_positions);
  m.bos_id = token_id(config, "bos_token_id");
  m.eos_ids = parse_token_ids(config, "eos_token_id");
  m.stored = parse_stored_weights(config);
  return m;
}

std::string load_model_type(const fs::path& dir) { return ConfigFile::load(dir / "config.json").text("model_type"); }

ModelConfig load_model_config(const fs::path& dir) { return parse_model_config(ConfigFile::load(dir / "config.json")); }

GenerationConfig parse_generation_config(const ConfigFile& config) {
  constexpr double kHuge = 1e6;
  GenerationConfig g;
  g.bos_id = token_id(config, "bos_token_id");
  g.eos_ids = parse_token_ids(config, "eos_token_id");
  const auto number = [&](std::string_view field, double min, double max) -> std::optional<float> {
    if (!config.has(field)) return std::nullopt;
    return static_cast<float>(config.number(field, min, max));
  };
  if (config.has("do_sample")) g.do_sample = config.boolean("do_sample", false);
  g.temperature = number("temperature", 0, kHuge);
  g.top_p = number("top_p", 0, 1);
  g.min_p = number("min_p", 0, 1);
  g.repetition_penalty = number("repetition_penalty", 1e-6, kHuge);
  if (config.has("top_k")) g.top_k = static_cast<int>(config.integer("top_k", 0, kMaxVocab));
  if (config.has("max_new_tokens")) g.max_new_tokens = config.integer("max_new_tokens", 1, kMaxPositions);
  return g;
}

GenerationConfig load_generation_config(const fs::path& dir) {
  std::error_code ignored;
  GenerationConfig g;
  if (fs::exists(dir / "generation_config.json", ignored))
    g = parse_generation_config(ConfigFile::load(dir / "generation_config.json"));
  if (g.eos_ids.empty() && fs::exists(dir / "config.json", ignored))
    g.eos_ids = parse_token_ids(ConfigFile::load(dir / "config.json"), "eos_token_id");
  return g;
}

}  // namespace lacuna

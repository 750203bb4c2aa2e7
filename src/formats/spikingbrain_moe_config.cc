#include "formats/spikingbrain_moe_config.h"

#include <limits>
#include <string>
#include <string_view>

namespace lacuna {
namespace {

// Far above any model, far below where products of two or three sizes leave int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kMaxExperts = 1 << 12;
constexpr int64_t kMaxSinks = 1 << 16;
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();
// Every seventh layer attends to everything (report, 3.1).
constexpr int kFullEvery = 7;

// A list of layers as marks, each at most once.
std::vector<bool> layer_set(const ConfigFile& config, std::string_view field, int layers) {
  std::vector<bool> marked(static_cast<size_t>(layers), false);
  for (const int64_t layer : config.integers(field, 0, layers - 1)) {
    if (marked[static_cast<size_t>(layer)])
      config.wrong(field, fmt::format("each layer at most once ({} stands there again)", layer));
    marked[static_cast<size_t>(layer)] = true;
  }
  return marked;
}

// One of two words.
bool second_of(const ConfigFile& config, std::string_view field, std::string_view first, std::string_view second) {
  const std::string word = config.text(field, first);
  if (word != first && word != second) config.wrong(field, fmt::format("\"{}\" or \"{}\"", first, second));
  return word == second;
}

void read_heads(const ConfigFile& config, SpikingBrainMoeConfig& m) {
  const HeadShape shape = parse_head_shape(config, m.hidden, kMaxWidth);
  m.heads = shape.heads;
  m.kv_heads = shape.kv_heads;
  m.head_dim = shape.head_dim;
}

void read_attention(const ConfigFile& config, SpikingBrainMoeConfig& m) {
  std::vector<bool> full(static_cast<size_t>(m.layers), false);
  if (config.has("full_attention_layers")) {
    full = layer_set(config, "full_attention_layers", m.layers);
  } else {
    for (int i = kFullEvery - 1; i < m.layers; i += kFullEvery) full[static_cast<size_t>(i)] = true;
  }
  bool windowed = false;
  for (const bool f : full) windowed = windowed || !f;
  // A window nobody uses may be left out, but not be wrong.
  const int64_t window =
      windowed || config.has("sliding_window") ? config.integer("sliding_window", 1, kMaxPositions) : 0;
  for (const bool f : full) m.layer_window.push_back(f ? 0 : window);

  m.softmax_rope = config.boolean("softmax_rope", true);
  m.rope = parse_rope_config(config, m.max_positions);
  if (m.softmax_rope && m.head_dim % 2 != 0)
    config.wrong("head_dim", fmt::format("an even size (it is {}): rotary embedding turns pairs", m.head_dim));
  m.sinks = static_cast<int>(config.integer("num_sink_tokens", 0, kMaxSinks, 0));
  m.sink_rope = config.boolean("sink_rope", true);
  m.linear_sees_sinks = config.boolean("linear_sees_sinks", true);
  if (m.sinks > 0 && m.sink_rope && m.softmax_rope && m.rope.type == RopeType::kDynamic)
    config.unsupported("rope_scaling",
                       "angles that do not depend on the length, since sinks are rotated once for all sequences");
}

void read_branches(const ConfigFile& config, SpikingBrainMoeConfig& m) {
  m.branch_norm = second_of(config, "branch_norm", "after_projection", "before_projection")
                      ? BranchNorm::kBeforeProjection
                      : BranchNorm::kAfterProjection;
  m.learned_branch_weights = second_of(config, "branch_weights", "fixed", "learned");
  constexpr double kLargest = 1e6;
  m.linear_weight = static_cast<float>(config.number("linear_branch_weight", -kLargest, kLargest, 0.5));
  m.softmax_weight = static_cast<float>(config.number("softmax_branch_weight", -kLargest, kLargest, 0.5));
}

void read_experts(const ConfigFile& config, SpikingBrainMoeConfig& m) {
  m.layer_dense = layer_set(config, "dense_layers", m.layers);
  m.experts = static_cast<int>(config.integer("num_experts", 0, kMaxExperts, 0));
  m.router =
      second_of(config, "router_function", "softmax", "sigmoid") ? RouterFunction::kSigmoid : RouterFunction::kSoftmax;
  if (m.experts == 0) {
    if (config.integer("num_experts_per_tok", 0, kMaxExperts, 0) != 0)
      config.wrong("num_experts_per_tok", "0 or nothing, since num_experts is 0");
    m.layer_dense.assign(static_cast<size_t>(m.layers), true);
    return;
  }
  m.experts_per_token = static_cast<int>(config.integer("num_experts_per_tok", 1, m.experts, 1));
  m.shared_experts = static_cast<int>(config.integer("num_shared_experts", 0, kMaxExperts, 1));
}

}  // namespace

SpikingBrainMoeConfig parse_spikingbrain_moe_config(const ConfigFile& config) {
  const std::string type = config.text("model_type");
  if (type != "spikingbrain_moe") config.unsupported("model_type", "\"spikingbrain_moe\" here");
  SpikingBrainMoeConfig m;
  m.vocab = config.integer("vocab_size", 1, kMaxVocab);
  m.hidden = config.integer("hidden_size", 1, kMaxWidth);
  m.intermediate = config.integer("intermediate_size", 1, kMaxWidth);
  m.layers = static_cast<int>(config.integer("num_hidden_layers", 1, kMaxLayers));
  m.norm_eps = static_cast<float>(config.number("norm_eps", 1e-30, 1, 1e-6));
  m.tie_word_embeddings = config.boolean("tie_word_embeddings", false);
  m.qkv_bias = config.boolean("attention_bias", true);
  m.max_positions = config.integer("max_position_embeddings", 1, kMaxPositions, 131072);
  const std::string activation = config.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") config.unsupported("hidden_act", "\"silu\"");
  m.stored = parse_stored_weights(config);
  m.eos_ids = parse_token_ids(config, "eos_token_id");
  read_heads(config, m);
  read_attention(config, m);
  read_branches(config, m);
  read_experts(config, m);
  return m;
}

SpikingBrainMoeConfig load_spikingbrain_moe_config(const std::filesystem::path& dir) {
  return parse_spikingbrain_moe_config(ConfigFile::load(dir / "config.json"));
}

}  // namespace lacuna

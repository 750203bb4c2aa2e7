#include "formats/spikingbrain_config.h"

#include <limits>

namespace lacuna {
namespace {

// Far above any model, far below where products of two or three sizes leave int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1 << 14;
// Positions are 31-bit, and W + 1 keys must be countable too.
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max() - 1;

void read_heads(const ConfigFile& config, SpikingBrainConfig& m) {
  const HeadShape shape = parse_head_shape(config, m.hidden, kMaxWidth);
  m.heads = shape.heads;
  m.kv_heads = shape.kv_heads;
  m.head_dim = shape.head_dim;
  if (m.head_dim % 2 != 0)
    config.wrong(shape.source, fmt::format("an even size of a head (it is {}): rotary embedding turns pairs", m.head_dim));
}

void read_windows(const ConfigFile& config, SpikingBrainConfig& m) {
  m.sliding_window = config.integer("sliding_window", 1, kMaxPositions);
  const std::string rule = config.text("window_rule", "official");
  if (rule == "exact")
    m.window = SpikingBrainConfig::Window::kExact;
  else if (rule == "plus_one")
    m.window = SpikingBrainConfig::Window::kPlusOne;
  else if (rule != "official")
    config.wrong("window_rule", "\"official\", \"exact\" or \"plus_one\"");
  m.full_attention.assign(static_cast<size_t>(m.layers), false);
  for (const int64_t layer : config.integers("full_attention_layers", 0, m.layers - 1)) {
    if (SpikingBrainConfig::is_linear(static_cast<int>(layer)))
      config.wrong("full_attention_layers", fmt::format("odd layers; {} is gated linear attention", layer));
    if (m.full_attention[static_cast<size_t>(layer)])
      config.wrong("full_attention_layers", fmt::format("each layer at most once ({} stands there again)", layer));
    m.full_attention[static_cast<size_t>(layer)] = true;
  }
}

}  // namespace

SpikingBrainConfig parse_spikingbrain_config(const ConfigFile& config) {
  if (config.text("model_type") != "gla_swa") config.unsupported("model_type", "\"gla_swa\" here");
  SpikingBrainConfig m;
  m.vocab = config.integer("vocab_size", 1, kMaxVocab);
  m.hidden = config.integer("hidden_size", 1, kMaxWidth);
  m.intermediate = config.integer("intermediate_size", 1, kMaxWidth);
  m.layers = static_cast<int>(config.integer("num_hidden_layers", 1, kMaxLayers));
  read_heads(config, m);
  read_windows(config, m);
  m.norm_eps = static_cast<float>(config.number("norm_eps", 1e-30, 1, 1e-6));
  m.tie_word_embeddings = config.boolean("tie_word_embeddings", false);
  m.max_positions = config.integer("max_position_embeddings", 1, kMaxPositions);
  const std::string activation = config.text("hidden_act", "swish");
  if (activation != "silu" && activation != "swish") config.unsupported("hidden_act", "\"swish\"");
  if (config.boolean("use_short_conv", false)) config.unsupported("use_short_conv", "false: no convolution");
  if (!config.boolean("elementwise_affine", true)) config.unsupported("elementwise_affine", "true: norms with weights");
  m.gate_logit_normalizer = static_cast<float>(config.number("gate_logit_normalizer", 1e-3, 1e6, 16));
  m.gate_low_rank_dim = config.integer("gate_low_rank_dim", 1, kMaxWidth, 16);
  m.rope = parse_rope_config(config, m.max_positions);
  m.eos_ids = parse_token_ids(config, "eos_token_id");
  m.stored = parse_stored_weights(config);
  return m;
}

SpikingBrainConfig load_spikingbrain_config(const std::filesystem::path& dir) {
  return parse_spikingbrain_config(ConfigFile::load(dir / "config.json"));
}

}  // namespace lacuna

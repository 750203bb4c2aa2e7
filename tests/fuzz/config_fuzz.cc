#include <cmath>

#include "formats/cola_config.h"
#include "formats/config.h"
#include "formats/spike_config.h"
#include "formats/spikingbrain_config.h"
#include "formats/spikingbrain_moe_config.h"
#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lacuna::fuzz(data, size, [](std::string_view text) {
    lacuna::parse_generation_config(lacuna::ConfigFile::parse(text, "fuzz"));
  });
  lacuna::fuzz(data, size, [](std::string_view text) {
    const auto config = lacuna::parse_spikingbrain_config(lacuna::ConfigFile::parse(text, "fuzz"));
    // What passes the checks must give shapes that multiply and divide.
    if (config.heads % config.kv_heads != 0 || config.head_dim % 2 != 0 || config.sliding_window < 1) std::abort();
    if (config.full_attention.size() != static_cast<size_t>(config.layers)) std::abort();
    if (!(config.gate_logit_normalizer > 0) || !std::isfinite(1 / config.gate_logit_normalizer)) std::abort();
    for (float f : lacuna::rope_frequencies(config.rope, config.head_dim, config.max_positions, 100'000).inv_freq)
      if (!std::isfinite(f)) std::abort();
  });
  lacuna::fuzz(data, size, [](std::string_view text) {
    const auto config = lacuna::parse_spikingbrain_moe_config(lacuna::ConfigFile::parse(text, "fuzz"));
    // What passes the checks must be a model that can be laid out.
    if (config.heads % config.kv_heads != 0 || config.experts_per_token > config.experts ||
        (config.experts > 0) != (config.experts_per_token > 0) ||
        config.layer_window.size() != static_cast<size_t>(config.layers) ||
        config.layer_dense.size() != static_cast<size_t>(config.layers))
      std::abort();
    for (int64_t window : config.layer_window)
      if (window < 0) std::abort();
  });
  lacuna::fuzz(data, size, [](std::string_view text) {
    const auto vae = lacuna::parse_cola_vae_config(lacuna::ConfigFile::parse(text, "fuzz"));
    if (vae.dim != int64_t{vae.heads} * vae.head_dim || vae.head_dim % 2 != 0 || vae.ffn_dim % 2 != 0 || vae.block < 1 ||
        vae.patch < 1 || !(vae.norm_eps > 0))
      std::abort();
    for (float f : lacuna::rope_frequencies(vae.rope, vae.head_dim, 100'000, 0).inv_freq)
      if (!std::isfinite(f)) std::abort();
  });
  lacuna::fuzz(data, size, [](std::string_view text) {
    const auto dit = lacuna::parse_cola_dit_config(lacuna::ConfigFile::parse(text, "fuzz"));
    if (dit.rope_dim < 2 || dit.rope_dim > dit.head_dim || dit.rope_dim % 2 != 0 || dit.block < 1 || dit.layers < 1 ||
        !(dit.norm_eps > 0))
      std::abort();
  });
  lacuna::fuzz(data, size, [](std::string_view text) {
    const auto config = lacuna::ConfigFile::parse(text, "fuzz");
    if (lacuna::parse_quantiser_group(config) % 4 != 0) std::abort();
    const auto coding = lacuna::parse_spike_coding(config, 2);
    if (!coding) return;
    if (coding->k.size() != 2) std::abort();
    for (const auto& layer : coding->k)
      for (float k : layer)
        if (!(k >= 0) || !std::isfinite(k) || (k > 0 && !std::isfinite(1 / k))) std::abort();
  });
  return lacuna::fuzz(data, size, [](std::string_view text) {
    const auto config = lacuna::parse_model_config(lacuna::ConfigFile::parse(text, "fuzz"));
    const auto rope = lacuna::rope_frequencies(config.rope, config.head_dim, config.max_positions, 100'000);
    // What passes the checks must give angles that can be used.
    for (float f : rope.inv_freq)
      if (!std::isfinite(f)) std::abort();
  });
}

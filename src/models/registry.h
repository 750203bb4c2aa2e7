#pragma once

#include "formats/config.h"
#include "models/model.h"

namespace lacuna {

using ModelFactory = std::unique_ptr<Model> (*)(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);

using OutlineFactory = ModelOutline (*)(const std::filesystem::path& dir);

// gla_swa.cc: SpikingBrain-7B.
std::unique_ptr<Model> load_gla_swa(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);
ModelOutline outline_gla_swa(const std::filesystem::path& dir);

// decoder.cc: Llama, Mistral, Qwen2, Qwen3.
std::unique_ptr<Model> load_decoder(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);
ModelOutline outline_decoder(const std::filesystem::path& dir);

// spikingbrain_moe.cc: the parallel hybrid with experts of SpikingBrain-76B.
std::unique_ptr<Model> load_spikingbrain_moe(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);
ModelOutline outline_spikingbrain_moe(const std::filesystem::path& dir);

}  // namespace lacuna

#pragma once

#include "formats/config.h"
#include "models/model.h"

namespace lacuna {

using ModelFactory = std::unique_ptr<Model> (*)(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);

// gla_swa.cc: SpikingBrain-7B.
std::unique_ptr<Model> load_gla_swa(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);

// decoder.cc: Llama, Mistral, Qwen2, Qwen3.
std::unique_ptr<Model> load_decoder(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options);

}  // namespace lacuna

#include "models/registry.h"

#include <fmt/ranges.h>

namespace lacuna {
namespace {

struct Architecture {
  const char* model_type;
  ModelFactory load;
  OutlineFactory outline;
};

// An architecture is one file and one line here.
constexpr Architecture kArchitectures[] = {
    {"llama", load_decoder, outline_decoder},
    {"mistral", load_decoder, outline_decoder},
    {"qwen2", load_decoder, outline_decoder},
    {"qwen3", load_decoder, outline_decoder},
    {"gla_swa", load_gla_swa, outline_gla_swa},
    {"spikingbrain_moe", load_spikingbrain_moe, outline_spikingbrain_moe},
};

}  // namespace

std::vector<std::string> known_architectures() {
  std::vector<std::string> names;
  for (const auto& a : kArchitectures) names.emplace_back(a.model_type);
  return names;
}

namespace {

const Architecture& architecture_of(const std::filesystem::path& dir) {
  const std::string type = load_model_type(dir);
  for (const auto& a : kArchitectures)
    if (type == a.model_type) return a;
  throw Unsupported("{}: model_type: found \"{}\", expected one of {}", (dir / "config.json").string(), type,
                    fmt::join(known_architectures(), ", "));
}

}  // namespace

std::unique_ptr<Model> load_model(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options) {
  return architecture_of(dir).load(ctx, dir, options);
}

ModelOutline outline_model(const std::filesystem::path& dir) { return architecture_of(dir).outline(dir); }

}  // namespace lacuna

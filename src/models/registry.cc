#include "models/registry.h"

#include <fmt/ranges.h>

namespace lacuna {
namespace {

struct Architecture {
  const char* model_type;
  ModelFactory load;
};

// An architecture is one file and one line here.
constexpr Architecture kArchitectures[] = {
    {"llama", load_decoder},
    {"mistral", load_decoder},
    {"qwen2", load_decoder},
    {"qwen3", load_decoder},
    {"gla_swa", load_gla_swa},
};

}  // namespace

std::vector<std::string> known_architectures() {
  std::vector<std::string> names;
  for (const auto& a : kArchitectures) names.emplace_back(a.model_type);
  return names;
}

std::unique_ptr<Model> load_model(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options) {
  const std::string type = load_model_type(dir);
  for (const auto& a : kArchitectures)
    if (type == a.model_type) return a.load(ctx, dir, options);
  throw Unsupported("{}: model_type: found \"{}\", expected one of {}", (dir / "config.json").string(), type,
                    fmt::join(known_architectures(), ", "));
}

}  // namespace lacuna

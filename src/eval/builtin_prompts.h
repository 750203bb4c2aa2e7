#pragma once

#include <string_view>

namespace lacuna {

// presets/prompts/tasks.json as it was when this binary was built (src/eval/builtin_prompts.cc.in).
extern const std::string_view kBuiltinPrompts;

}  // namespace lacuna

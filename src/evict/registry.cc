#include <algorithm>

#include <fmt/ranges.h>

#include "base/error.h"
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

struct Entry {
  std::string_view name;
  PolicyPtr (*make)(PolicyOptions&);
  PolicyPtr (*wrap)(PolicyOptions&, PolicyPtr base);
};

constexpr Entry kPolicies[] = {
    {"laprox", make_laprox, nullptr},
    {"laprox_exact", make_laprox_exact, nullptr},
    {"snapkv", make_snapkv, nullptr},
    {"pyramidkv", make_pyramidkv, nullptr},
    {"adakv", nullptr, make_adakv},
    {"criticalkv", nullptr, make_criticalkv},
    {"layer_defensive", make_layer_defensive, nullptr},
    {"lava", make_lava, nullptr},
    {"cake", make_cake, nullptr},
    {"expected_attention", make_expected_attention, nullptr},
    {"kvzip", make_kvzip, nullptr},
    {"lagkv", make_lagkv, nullptr},
    {"h2o", make_h2o, nullptr},
    {"tova", make_tova, nullptr},
    {"keydiff", make_keydiff, nullptr},
    {"knorm", make_knorm, nullptr},
    {"streaming_llm", make_streaming_llm, nullptr},
    {"random", make_random, nullptr},
};

}  // namespace

void PolicyNeeds::merge(const PolicyNeeds& other) {
  window_rows = std::max(window_rows, other.window_rows);
  keys |= other.keys;
  values |= other.values;
  projected_norms |= other.projected_norms;
  projected_l1 |= other.projected_l1;
  projected_products |= other.projected_products;
  column_sums |= other.column_sums;
  raw_queries |= other.raw_queries;
  output_norm |= other.output_norm;
  replay |= other.replay;
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const Entry& e : kPolicies) names.emplace_back(e.name);
  return names;
}

// name[:switches][:base…]; a part with '=' in it is a list of switches.
std::shared_ptr<const Policy> make_policy(std::string_view spec) {
  const size_t colon = spec.find(':');
  const std::string_view name = spec.substr(0, colon);
  std::string_view rest = colon == std::string_view::npos ? std::string_view() : spec.substr(colon + 1);
  const auto entry = std::find_if(std::begin(kPolicies), std::end(kPolicies), [&](const Entry& e) { return e.name == name; });
  if (entry == std::end(kPolicies))
    throw BadInput("there is no eviction policy \"{}\"; policies are {}", name, fmt::join(policy_names(), ", "));

  std::string_view switches;
  const size_t next = rest.find(':');
  if (rest.substr(0, next).find('=') != std::string_view::npos) {
    switches = rest.substr(0, next);
    rest = next == std::string_view::npos ? std::string_view() : rest.substr(next + 1);
  }
  PolicyOptions options(name, switches);
  if (entry->wrap) return entry->wrap(options, make_policy(rest.empty() ? "snapkv" : rest));
  if (!rest.empty())
    throw BadInput("policy {}: \"{}\" is no switch, and this policy stands on no other; switches are written key=value", name, rest);
  return entry->make(options);
}

}  // namespace lacuna

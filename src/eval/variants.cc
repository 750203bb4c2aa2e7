#include "eval/variants.h"

#include <algorithm>
#include <set>

#include "base/error.h"

namespace lacuna {

std::string Variant::label() const {
  std::string out = full() ? policy : policy + "@" + budget.text;
  if (format != KvFormat::kNative) out.append("+").append(kv_format_name(format));
  return out;
}

Variant parse_variant(const std::string& text) {
  Variant out;
  std::string rest = text;
  if (const size_t plus = rest.rfind('+'); plus != std::string::npos) {
    out.format = parse_kv_format(rest.substr(plus + 1));
    rest.resize(plus);
  }
  const size_t at = rest.rfind('@');
  if (at == std::string::npos) {
    if (rest != "full") throw BadInput("\"{}\": expected full, POLICY@BUDGET, or one of them with +int8, +int4, +int3 or +int2", text);
    out.policy = rest;
    return out;
  }
  out.policy = rest.substr(0, at);
  if (out.full()) throw BadInput("\"{}\": the full cache takes no budget", text);
  out.budget = parse_budget(rest.substr(at + 1));
  // The canonical name, so that one policy spelled in two ways is one policy.
  out.policy = make_policy(out.policy)->name();
  return out;
}

std::vector<std::string> split_policies(const std::vector<std::string>& lists) {
  std::vector<std::string> out;
  for (const std::string& list : lists)
    for (size_t at = 0; at <= list.size();) {
      const size_t comma = std::min(list.find(',', at), list.size());
      const std::string part = list.substr(at, comma - at);
      const bool is_switch = at > 0 && part.find('=') < part.find(':');
      if (is_switch) out.back() += "," + part;
      else if (!part.empty()) out.push_back(part);
      at = comma + 1;
    }
  return out;
}

std::vector<Variant> list_variants(const std::vector<std::string>& policies, const std::vector<std::string>& budgets,
                                   const std::vector<std::string>& extra) {
  std::vector<std::string> texts = {"full"};
  for (const std::string& policy : policies) {
    if (policy == "full") continue;
    for (const std::string& budget : budgets) texts.push_back(policy + "@" + budget);
  }
  texts.insert(texts.end(), extra.begin(), extra.end());
  std::vector<Variant> out;
  std::set<std::string> seen;
  for (const std::string& text : texts)
    if (Variant v = parse_variant(text); seen.insert(v.label()).second) out.push_back(std::move(v));
  return out;
}

}  // namespace lacuna

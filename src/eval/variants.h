#pragma once

#include <string>
#include <vector>

#include "eval/kv_formats.h"
#include "evict/budget.h"
#include "evict/policy.h"

namespace lacuna {

// One way of holding a prompt's cache: the whole of it, or what a policy keeps within a budget; in the
// cache's own format or rounded to a smaller one.
struct Variant {
  std::string policy;  // "full", or a policy as make_policy reads it
  Budget budget;       // of no meaning for "full"
  KvFormat format = KvFormat::kNative;
  bool full() const { return policy == "full"; }
  std::string label() const;  // "full", "laprox@5%", "laprox@20%+int4": unique within a list
};

// "full", "full+int8", "laprox@5%", "adakv:snapkv@10%+int4". Throws BadInput.
Variant parse_variant(const std::string& text);

// Names with commas between them, as commands take them. A policy's switches have commas too: a part that
// sets a switch belongs to the policy before it ("laprox:gqa=exact,window=64,snapkv" names two).
std::vector<std::string> split_policies(const std::vector<std::string>& lists);

// The full cache, then every policy at every budget, then `extra` in the parse_variant form; repeats dropped.
std::vector<Variant> list_variants(const std::vector<std::string>& policies, const std::vector<std::string>& budgets,
                                   const std::vector<std::string>& extra);

}  // namespace lacuna

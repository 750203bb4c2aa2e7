#pragma once

#include "evict/options.h"
#include "evict/policy.h"

namespace lacuna {

using PolicyPtr = std::shared_ptr<const Policy>;

// One maker a policy; each reads its switches and refuses the rest.
PolicyPtr make_laprox(PolicyOptions& options);
PolicyPtr make_laprox_exact(PolicyOptions& options);
PolicyPtr make_snapkv(PolicyOptions& options);
PolicyPtr make_pyramidkv(PolicyOptions& options);
PolicyPtr make_streaming_llm(PolicyOptions& options);
PolicyPtr make_random(PolicyOptions& options);
PolicyPtr make_knorm(PolicyOptions& options);
PolicyPtr make_keydiff(PolicyOptions& options);
PolicyPtr make_tova(PolicyOptions& options);
PolicyPtr make_h2o(PolicyOptions& options);
PolicyPtr make_expected_attention(PolicyOptions& options);
PolicyPtr make_lagkv(PolicyOptions& options);
PolicyPtr make_cake(PolicyOptions& options);
PolicyPtr make_lava(PolicyOptions& options);
PolicyPtr make_kvzip(PolicyOptions& options);
PolicyPtr make_layer_defensive(PolicyOptions& options);
// These change how another policy's scores are used.
PolicyPtr make_adakv(PolicyOptions& options, PolicyPtr base);
PolicyPtr make_criticalkv(PolicyOptions& options, PolicyPtr base);

// What nearly all policies have in common.
class NamedPolicy : public Policy {
 public:
  std::string name() const override { return name_; }
  SelectionRule rule() const override { return rule_; }

 protected:
  std::string name_;
  SelectionRule rule_;
};

}  // namespace lacuna

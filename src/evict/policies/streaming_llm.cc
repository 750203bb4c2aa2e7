// StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones.
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

class StreamingLLM : public NamedPolicy {
 public:
  explicit StreamingLLM(PolicyOptions& options) {
    rule_.scope = Scope::kHead;
    rule_.sinks = options.integer("sinks", 4, 0, 1024);
    rule_.non_negative = false;
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override { return {}; }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.resize(static_cast<size_t>(e.candidates));
    for (int64_t i = 0; i < e.candidates; ++i) out.score[static_cast<size_t>(i)] = static_cast<float>(i);
  }
};

}  // namespace

PolicyPtr make_streaming_llm(PolicyOptions& options) { return std::make_shared<StreamingLLM>(options); }

}  // namespace lacuna

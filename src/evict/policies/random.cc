// Chance, as the floor under every method: a seeded hash of layer, head and position.
#include "evict/policies/policies.h"

namespace lacuna {
namespace {

// splitmix64's finaliser: every bit of the input moves every bit of the output.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Random : public NamedPolicy {
 public:
  explicit Random(PolicyOptions& options) {
    rule_.scope = Scope::kHead;
    seed_ = static_cast<uint64_t>(options.integer("seed", 0, 0, 2147483647));
    options.done();
    name_ = options.canonical();
  }
  PolicyNeeds needs() const override { return {}; }
  void score(const HeadEvidence& e, HeadScores& out, LayerScores&) const override {
    out.score.resize(static_cast<size_t>(e.candidates));
    const uint64_t head = mix(mix(seed_) ^ (static_cast<uint64_t>(e.layer) << 32 | static_cast<uint64_t>(e.head)));
    for (size_t i = 0; i < out.score.size(); ++i)
      out.score[i] = static_cast<float>(mix(head ^ static_cast<uint64_t>(out.position[i])) >> 40) * 0x1p-24f;
  }

 private:
  uint64_t seed_;
};

}  // namespace

PolicyPtr make_random(PolicyOptions& options) { return std::make_shared<Random>(options); }

}  // namespace lacuna

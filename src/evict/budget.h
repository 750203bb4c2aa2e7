#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cache/kv_cache.h"
#include "evict/policy.h"

namespace lacuna {

// How much of a cache may stay.
struct Budget {
  enum class Kind : uint8_t { kTokens, kFraction, kBytes, kMass };
  Kind kind = Kind::kTokens;
  double value = 0;  // entries a KV head on average | part of the prompt | bytes | retained mass 1 - epsilon
  std::string text;  // as it was given
};

// "256" entries a KV head on average | "5%" or "0.05" of the prompt | "64MiB" (B, KiB, MiB, GiB, kB, MB, GB)
// of the cache's pages | "mass:0.99" of each layer's score. Throws BadInput.
Budget parse_budget(std::string_view text);

// Slots of every layer and KV head that selection may choose from.
struct CacheSizes {
  std::vector<std::vector<int64_t>> length;  // [layer][KV head]; a layer without attention has no heads
  int64_t heads() const;
  int64_t slots() const;
  int64_t protected_slots(int window) const;  // those inside the window
};

// Largest number of bytes that `slots` slots can occupy, however they are spread over heads: every
// head may leave one page almost empty.
size_t bytes_bound(const KvCacheShape& shape, int64_t slots);
// Bytes of exactly these lengths.
size_t bytes_of(const KvCacheShape& shape, const CacheSizes& sizes);

// A hard limit on the cache's bytes, and what else must fit below it.
struct KvLimit {
  size_t bytes = 0;            // 0 = none
  size_t used_elsewhere = 0;   // of these, held by other sequences on the same account
  int64_t growth = 0;          // tokens that will be appended to every head before anything is evicted again
  bool sustained = false;      // eviction happens again after `growth` tokens, for as long as it takes
  bool streaming = true;       // earlier layers shrink while later ones are read
  CacheSizes stored;           // slots that a head holds while its layer is read, where that is more than `sizes`
};

struct BudgetPlan {
  bool evict = false;
  bool by_mass = false;
  double mass = 1;
  int64_t target = 0;  // entries that may stay in all, windows included; may exceed what there is
  int64_t keep = 0;    // K: entries to choose among the candidates
  size_t peak_bytes = 0;  // with a limit: a bound on the cache's bytes at any moment, growth included
};

// What a budget means for a cache of these sizes. Throws BadInput when the budget is below the window
// (and sinks) or makes no sense for the policy, OutOfMemory when the hard limit cannot be kept.
BudgetPlan plan_budget(const Budget& budget, const SelectionRule& rule, const KvCacheShape& shape,
                       const CacheSizes& sizes, const KvLimit& limit = {});

}  // namespace lacuna

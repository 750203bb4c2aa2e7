// evict: the policy interface, one file a policy, budgets, the selection over the model, the evictor.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/threads.h"

namespace lacuna {

// What a policy reads of a prefill. Evidence is computed once and shared by all policies of a
// ScoreBoard; what nobody needs is never computed.
struct PolicyNeeds {
  int window_rows = 0;            // attention rows of so many last queries
  bool keys = false;              // K as f32
  bool values = false;            // V as f32
  bool projected_norms = false;   // ||v W_O^h||_2
  bool projected_l1 = false;      // ||v W_O^h||_1: the explicit product, D/d times dearer than the norms
  bool projected_products = false;  // v W_O^h W_O^h'^T v^T for every pair of heads in a group
  bool column_sums = false;       // attention summed over all queries: a second pass over Q K^T
  bool raw_queries = false;       // mean and covariance of the queries before RoPE
  bool output_norm = false;       // Frobenius norm of the layer's attention output over the window
  bool replay = false;            // attention of a replayed context: a second prefill
  void merge(const PolicyNeeds& other);
};

// Evidence about one layer and KV head, for `candidates` consecutive slots that start at slot `first`
// of the `slots` cached ones. Rows are addressed at the first candidate. The r query heads of the
// group are called h = 0 … r-1.
struct HeadEvidence {
  int layer = 0, head = 0, layers = 0;
  int group = 0;       // r
  int head_dim = 0;    // d
  int rows = 0;        // rows of `probs`; the last ones are the newest queries
  int64_t slots = 0, first = 0, candidates = 0;
  int64_t next_position = 0;  // original position of the token that will come next
  float scale = 0;
  const int32_t* positions = nullptr;  // [slots]
  const float* probs = nullptr;        // [r, rows, slots]
  const float* keys = nullptr;         // [slots, d], after RoPE
  const float* values = nullptr;       // [slots, d]
  const float* norms = nullptr;        // [r, slots] ||v W_O^h||_2
  const float* norms_l1 = nullptr;     // [r, slots] ||v W_O^h||_1
  const float* products = nullptr;     // [r (r+1) / 2, slots], pairs (0,0) (0,1) … (1,1) …, h <= h'
  const float* column_sums = nullptr;  // [r, slots]
  const float* observers = nullptr;    // [slots] queries that could see the slot
  const float* replayed = nullptr;     // [slots] largest attention from any replayed query and head of the group
  const double* query_mean = nullptr;  // [r, d] before RoPE
  const double* query_cov = nullptr;   // [r, d, d]
  const float* inv_freq = nullptr;     // [d / 2]
  float rope_factor = 1;
  ThreadPool* pool = nullptr;

  const float* prob_row(int h, int row) const { return probs + (static_cast<int64_t>(h) * rows + row) * slots + first; }
  const float* norm_row(int h) const { return norms + h * slots + first; }
  const float* l1_row(int h) const { return norms_l1 + h * slots + first; }
  const float* product_row(int pair) const { return products + pair * slots + first; }
  const float* sum_row(int h) const { return column_sums + h * slots + first; }
  const float* key(int64_t candidate) const { return keys + (first + candidate) * head_dim; }
  const float* value(int64_t candidate) const { return values + (first + candidate) * head_dim; }
};

// Scores of one KV head's candidates. `slot` is the index in the head's cache when it was scored.
struct HeadScores {
  std::vector<int32_t> slot, position;
  std::vector<float> score;
  std::vector<float> second;  // of policies that choose in two stages
  std::vector<float> weight;  // between score() and finish_layer(): what is compared across heads
};

struct LayerScores {
  std::vector<HeadScores> heads;
  double total = 0;        // sum of the scores of all candidates, before anything was dropped
  float peak = 0;          // the largest of them
  double preference = 0;   // this layer's weight where budgets are measured (CAKE, LAVa)
  double spread = 0;       // CAKE: variance of the window attention over queries, summed
  double bound_scale = 0;  // Z: what one unit of lost score costs at most in attention output; 0 = no bound known
  double output_norm = 0;  // if asked for: Frobenius norm of the attention output over the window
};

enum class Scope : uint8_t { kHead, kLayer, kModel };          // one top-k per head | per layer | over the model
enum class LayerShare : uint8_t { kEven, kPyramid, kMeasured };  // how a budget is split between layers

// How scores become a set of kept slots.
struct SelectionRule {
  Scope scope = Scope::kModel;
  LayerShare share = LayerShare::kEven;  // for kHead and kLayer
  double pyramid_beta = 20;
  bool pyramid_holds_window = false;  // kvpress's reading: the window is part of what falls with depth
  double guarantee = 0;       // every head keeps at least this part of an even share
  double first_stage = 1;     // part of each head's entries chosen by score; the rest by `second`
  int window = 0;             // the last so many slots are always kept
  int sinks = 0;              // so are the first, within the budget
  bool counts_window = true;  // whether the budget includes the window
  bool non_negative = true;   // whether scores can be summed to a mass
  // Whether the set after every layer holds the final set, so that earlier layers may be evicted at once.
  bool streams() const {
    const bool settled = scope != Scope::kModel && share != LayerShare::kMeasured;
    if (first_stage < 1) return settled;
    return settled || guarantee == 0 || share != LayerShare::kMeasured;
  }
};

// One eviction method: scores the candidates of a KV head, larger = keep. Stateless and shareable.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string name() const = 0;  // as make_policy reads it, switches that differ from the defaults included
  virtual PolicyNeeds needs() const = 0;
  virtual SelectionRule rule() const = 0;
  // Fills out.score [e.candidates] and, if the policy has two stages, out.second; may add to `layer`.
  virtual void score(const HeadEvidence& e, HeadScores& out, LayerScores& layer) const = 0;
  // All heads of a layer are scored: normalise, or combine heads.
  virtual void finish_layer(LayerScores& layer) const {}
  // Scores that depend on how much each head may keep on average; called once, when that is known.
  virtual void apply_quota(LayerScores& layer, double mean_candidates) const {}
};

// "laprox", "laprox:gqa=exact,window=64", "adakv:snapkv", "criticalkv:adakv:snapkv:window=64", …
// Throws BadInput that names the allowed policies, switches or values.
std::shared_ptr<const Policy> make_policy(std::string_view spec);
std::vector<std::string> policy_names();

}  // namespace lacuna

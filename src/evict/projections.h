#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "models/model.h"

namespace lacuna {

// What scoring needs of the output projections W_O of a model, made at first use and kept: share one
// between all evictors of a model. With W_O^h [d, D] = (columns h*d … of o_proj)^T and the QR
// factorisation (W_O^h)^T = Q_h R_h, ||v W_O^h|| = ||R_h v||: D/d times fewer operations than the
// explicit product, and never negative under rounding.
class OutputProjections {
 public:
  explicit OutputProjections(const Model& model);

  // R_h of every query head, f32. Being upper triangular, the lower half of its rows has no left half:
  // for each KV head the upper rows of its r heads, [r * (d/2), d], then the lower ones without their zeros,
  // [r * (d - d/2), d - d/2]; head h's rows are the h-th part of either.
  struct Factors {
    const float* upper = nullptr;
    const float* lower = nullptr;
  };
  Factors factors(Context& ctx, int layer, int kv_head);
  // W_O^h W_O^h'^T for the pairs h <= h' of every group, symmetrised: [G, r (r+1) / 2, d, d] f32.
  const float* products(Context& ctx, int layer);
  // (W_O^h)^T as f32 [D, d], whatever the stored dtype.
  void block(int layer, int head, float* out) const;

 private:
  const Model& model_;
  std::mutex mutex_;
  std::vector<Buffer> factors_, products_;  // one a layer, tag kWeights
};

}  // namespace lacuna

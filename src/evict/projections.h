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

  // R_h of a KV head's query heads in order, packed for triangle_products.
  const float* factors(Context& ctx, int layer, int kv_head);
  // v W_O^h W_O^h'^T v^T for the pairs h <= h' of a group: x^T T x with a triangle for each, packed likewise. Only
  // the symmetric part counts, so what stands right of the diagonal is doubled and the rest dropped.
  const float* products(Context& ctx, int layer, int kv_head);
  // (W_O^h)^T as f32 [D, d], whatever the stored dtype.
  void block(int layer, int head, float* out) const;

 private:
  const Model& model_;
  std::mutex mutex_;
  std::vector<Buffer> factors_, products_;  // one a layer, tag kWeights
};

}  // namespace lacuna

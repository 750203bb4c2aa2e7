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
  // v W_O^h W_O^h'^T v^T for the pairs h <= h' of a group sees only the symmetric part P of the product, so P's
  // blocks of columns left of the diagonal are dropped and those right of it doubled: v P v^T = sum over the
  // kBlocks blocks of rows b of v_b . (P_b v), P_b [p, width(b), d - first(b)] for all pairs p, f32.
  struct Products {
    static constexpr int kBlocks = 2;
    Products(int64_t head_dim, int64_t pairs) : d(head_dim), pairs(pairs) {}
    int64_t first(int b) const { return d * b / kBlocks; }
    int64_t width(int b) const { return first(b + 1) - first(b); }
    // Where block b begins; kBlocks: their size.
    int64_t at(int b) const { return b == 0 ? 0 : at(b - 1) + pairs * width(b - 1) * (d - first(b - 1)); }
    int64_t d, pairs;
    const float* data = nullptr;
  };
  Products products(Context& ctx, int layer, int kv_head);
  // (W_O^h)^T as f32 [D, d], whatever the stored dtype.
  void block(int layer, int head, float* out) const;

 private:
  const Model& model_;
  std::mutex mutex_;
  std::vector<Buffer> factors_, products_;  // one a layer, tag kWeights
};

}  // namespace lacuna

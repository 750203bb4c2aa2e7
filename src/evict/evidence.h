#pragma once

#include "evict/policy.h"
#include "evict/projections.h"
#include "models/model.h"

namespace lacuna {

// What must be remembered of one layer's queries while they go by: the last few, and what policies
// sum over all of them.
class LayerWitness {
 public:
  void reset();
  void observe(Context& ctx, const LayerTap& tap, const AttentionLayer& attention, const KvCache& cache,
               const PolicyNeeds& needs);
  int64_t next_position() const { return last_position_ + 1; }

 private:
  friend class EvidenceReader;
  void remember_last(Context& ctx, const LayerTap& tap, const AttentionLayer& attention, int rows, bool mixed);
  void sum_columns(Context& ctx, const LayerTap& tap, const AttentionLayer& attention, const KvCache& cache);
  void sum_queries(Context& ctx, const LayerTap& tap, const AttentionLayer& attention);

  // The last queries [rows, H*d] in order, and beside them what they left for the cache [rows, H] if there are
  // sinks; buffers of twice that, so that one more row is a copy and not a shift of all.
  Buffer queries_, mixed_, shares_;
  bool shared_ = false;
  int64_t held_ = 0, begin_ = 0;
  int64_t last_position_ = -1;
  // By original position, so that slots may come and go: attention received, and queries that could see it.
  std::vector<std::vector<float>> column_sums_;  // [H]
  std::vector<float> observers_;
  // Queries before RoPE, the first four positions left out (kvpress): count, sum and sum of outer products.
  int64_t query_count_ = 0;
  std::vector<double> query_sum_, query_outer_;  // [H, d], [H, d, d]
};

// Turns a layer's cache and witness into evidence, one KV head at a time, in buffers that are reused.
class EvidenceReader {
 public:
  EvidenceReader(const Model& model, std::shared_ptr<OutputProjections> projections);

  // Evidence about all slots of a head; set_window() says which are candidates. Valid until the next call.
  HeadEvidence read(Context& ctx, const KvCache& cache, int layer, int head, const LayerWitness& witness,
                    const PolicyNeeds& needs, int64_t next_position);
  // What evicting all slots but `kept` ([KV head], ascending) does to the layer's attention output over the
  // last queries: its Frobenius norm before, and how far it moves with and without renormalised attention.
  struct Error {
    double output_norm = 0, renormalised = 0, plain = 0;
  };
  Error error(Context& ctx, const KvCache& cache, int layer, const LayerWitness& witness, int rows,
              const std::vector<std::vector<int32_t>>& kept);
  // Frobenius norm over the last `rows` queries of the layer's attention output, the bias left out.
  double output_norm(Context& ctx, int layer, const LayerWitness& witness, int rows);

 private:
  void read_norms(Context& ctx, int layer, int head, int group, int64_t slots, int head_dim, bool l1);
  double projected_norm(Context& ctx, int layer, const float* mixed, int64_t rows);
  void read_products(Context& ctx, int layer, int head, int group, int64_t slots, int head_dim);

  const Model& model_;
  std::shared_ptr<OutputProjections> projections_;
  Buffer probs_, keys_, values_, norms_, norms_l1_, products_, sums_, observers_, rows_, block_;
  std::vector<int32_t> positions_;
  std::vector<double> query_mean_, query_cov_;
};

// Leaves the last `window` slots out of the candidates.
void set_window(HeadEvidence& e, int window);

// Slots of a head that later tokens can still see: those of a sliding window that have left it are
// no candidates and are dropped whatever their score.
int64_t first_visible(const AttentionLayer& attention, const KvCache& cache, int layer, int head, int64_t next_position);

}  // namespace lacuna

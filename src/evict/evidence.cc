#include "evict/evidence.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "evict/columns.h"

namespace lacuna {
namespace {

constexpr int64_t kRowPiece = 128;  // rows a thread reduces at a time
constexpr int64_t kQuerySinks = 4;  // kvpress leaves the first four queries out of its statistics: outliers

// Scores are f32 whatever the precision of the model's own products.
class FullPrecision {
 public:
  explicit FullPrecision(Context& ctx) : ctx_(ctx), before_(ctx.activations) { ctx.activations = ActivationType::kF32; }
  ~FullPrecision() { ctx_.activations = before_; }

 private:
  Context& ctx_;
  ActivationType before_;
};

float* ensure(Context& ctx, Buffer& buffer, int64_t floats) {
  buffer.ensure(ctx.memory, MemoryTag::kScratch, static_cast<size_t>(floats) * sizeof(float));
  return buffer.as<float>();
}

// body(row) for every row, in pieces on all threads.
template <typename Body>
void for_rows(Context& ctx, int64_t count, const Body& body) {
  ctx.pool.parallel_for((count + kRowPiece - 1) / kRowPiece, [&](int64_t piece, int) {
    for (int64_t i = piece * kRowPiece; i < std::min(count, (piece + 1) * kRowPiece); ++i) body(i);
  });
}

LinearWeight matrix(const float* data, int64_t rows, int64_t columns) {
  LinearWeight w;
  w.weight = Tensor(data, DType::kF32, {rows, columns});
  return w;
}

}  // namespace

int64_t first_visible(const AttentionLayer& attention, const KvCache& cache, int layer, int head, int64_t next_position) {
  if (attention.window == 0) return 0;
  const KvHeadView& view = cache.view(layer, head);
  const KvLayout& layout = cache.layout(layer);
  int64_t low = 0, high = view.length;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (view.position(layout, middle) > next_position - attention.window)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

void set_window(HeadEvidence& e, int window) {
  e.candidates = std::max<int64_t>(0, e.slots - window - e.first);
}

void LayerWitness::reset() {
  held_ = begin_ = 0;
  last_position_ = -1;
  column_sums_.clear();
  observers_.clear();
  query_count_ = 0;
  query_sum_.clear();
  query_outer_.clear();
}

void LayerWitness::observe(Context& ctx, const LayerTap& tap, const AttentionLayer& attention, const KvCache& cache,
                           const PolicyNeeds& needs) {
  // Tokens in between that nobody watched: the queries remembered are no longer the last ones.
  if (tap.first_position != last_position_ + 1) held_ = begin_ = 0;
  last_position_ = tap.first_position + tap.tokens - 1;
  const int rows = needs.window_rows;
  if (rows > 0 && tap.first_token + tap.tokens > tap.call_tokens - rows)
    remember_last(ctx, tap, attention, rows, needs.output_norm);
  if (needs.column_sums) sum_columns(ctx, tap, attention, cache);
  if (needs.raw_queries) sum_queries(ctx, tap, attention);
}

void LayerWitness::remember_last(Context& ctx, const LayerTap& tap, const AttentionLayer& attention, int rows,
                                 bool mixed) {
  const int64_t heads = attention.query_heads, row = heads * attention.head_dim;
  const int64_t fresh = std::min<int64_t>(tap.tokens, rows);
  const int64_t capacity = 2 * rows;
  const size_t row_bytes = static_cast<size_t>(row) * sizeof(float), share_bytes = static_cast<size_t>(heads) * sizeof(float);
  shared_ = tap.cache_share != nullptr;
  if (shared_) shares_.ensure(ctx.memory, MemoryTag::kScratch, static_cast<size_t>(capacity) * share_bytes);
  queries_.ensure(ctx.memory, MemoryTag::kScratch, static_cast<size_t>(capacity) * row_bytes);
  if (mixed) mixed_.ensure(ctx.memory, MemoryTag::kScratch, static_cast<size_t>(capacity) * row_bytes);
  if (begin_ + held_ + fresh > capacity) {
    const int64_t stay = std::min<int64_t>(held_, rows - fresh);
    const int64_t from = begin_ + held_ - stay;
    std::memmove(queries_.as<float>(), queries_.as<float>() + from * row, static_cast<size_t>(stay) * row_bytes);
    if (mixed) std::memmove(mixed_.as<float>(), mixed_.as<float>() + from * row, static_cast<size_t>(stay) * row_bytes);
    if (shared_) std::memmove(shares_.as<float>(), shares_.as<float>() + from * heads, static_cast<size_t>(stay) * share_bytes);
    begin_ = 0;
    held_ = stay;
  }
  const int64_t source = (tap.tokens - fresh) * row, target = (begin_ + held_) * row;
  std::memcpy(queries_.as<float>() + target, tap.q + source, static_cast<size_t>(fresh) * row_bytes);
  if (mixed) std::memcpy(mixed_.as<float>() + target, tap.mixed + source, static_cast<size_t>(fresh) * row_bytes);
  if (shared_)
    std::memcpy(shares_.as<float>() + (begin_ + held_) * heads, tap.cache_share + (tap.tokens - fresh) * heads,
                static_cast<size_t>(fresh) * share_bytes);
  held_ += fresh;
  if (held_ > rows) {
    begin_ += held_ - rows;
    held_ = rows;
  }
}

void LayerWitness::sum_columns(Context& ctx, const LayerTap& tap, const AttentionLayer& attention, const KvCache& cache) {
  const int group = attention.query_heads / attention.kv_heads, d = attention.head_dim;
  const int64_t stride = int64_t{attention.query_heads} * d;
  const int64_t end = last_position_ + 1;
  column_sums_.resize(static_cast<size_t>(attention.query_heads));
  for (auto& sums : column_sums_) sums.resize(static_cast<size_t>(end), 0.0f);
  std::vector<float> slot_sums;
  for (int h = 0; h < attention.query_heads; ++h) {
    const KvHeadView& view = cache.view(tap.layer, h / group);
    slot_sums.assign(static_cast<size_t>(view.length), 0.0f);
    attention_column_sums(ctx, cache.layout(tap.layer), view, tap.q + h * d, tap.tokens, 1, stride, tap.first_position,
                          attention.scale, attention.window, slot_sums.data(),
                          tap.cache_share ? tap.cache_share + h : nullptr, attention.query_heads);
    auto& sums = column_sums_[static_cast<size_t>(h)];
    for (int64_t i = 0; i < view.length; ++i)
      sums[static_cast<size_t>(view.position(cache.layout(tap.layer), i))] += slot_sums[static_cast<size_t>(i)];
  }
  observers_.resize(static_cast<size_t>(end), 0.0f);
  for (int64_t p = 0; p < end; ++p) {
    const int64_t reach = attention.window > 0 ? std::min(end, p + attention.window) : end;
    observers_[static_cast<size_t>(p)] += static_cast<float>(std::max<int64_t>(0, reach - std::max(p, tap.first_position)));
  }
}

void LayerWitness::sum_queries(Context& ctx, const LayerTap& tap, const AttentionLayer& attention) {
  const int64_t d = attention.head_dim, heads = attention.query_heads;
  query_sum_.resize(static_cast<size_t>(heads * d), 0.0);
  query_outer_.resize(static_cast<size_t>(heads * d * d), 0.0);
  const int64_t skip = std::clamp<int64_t>(kQuerySinks - tap.first_position, 0, tap.tokens);
  query_count_ += tap.tokens - skip;
  ctx.pool.parallel_for(heads, [&](int64_t h, int) {
    double* sum = query_sum_.data() + h * d;
    double* outer = query_outer_.data() + h * d * d;
    for (int64_t t = skip; t < tap.tokens; ++t) {
      const float* q = tap.q_raw + (t * heads + h) * d;
      for (int64_t i = 0; i < d; ++i) {
        const double x = q[i];
        sum[i] += x;
        for (int64_t j = 0; j <= i; ++j) outer[i * d + j] += x * q[j];
      }
    }
  });
}

EvidenceReader::EvidenceReader(const Model& model, std::shared_ptr<OutputProjections> projections)
    : model_(model), projections_(projections ? std::move(projections) : std::make_shared<OutputProjections>(model)) {}

HeadEvidence EvidenceReader::read(Context& ctx, const KvCache& cache, int layer, int head, const LayerWitness& witness,
                                  const PolicyNeeds& needs, int64_t next_position) {
  const AttentionLayer& a = *model_.attention(layer);
  const KvHeadView& view = cache.view(layer, head);
  const KvLayout& layout = cache.layout(layer);
  const int64_t n = view.length, d = a.head_dim;
  const int group = a.query_heads / a.kv_heads;
  HeadEvidence e;
  e.layer = layer;
  e.head = head;
  e.layers = model_.info().layers;
  e.group = group;
  e.head_dim = a.head_dim;
  e.slots = n;
  e.first = first_visible(a, cache, layer, head, next_position);
  e.next_position = next_position;
  e.scale = a.scale;
  e.inv_freq = a.inv_freq.data();
  e.rope_factor = a.rope_factor;
  e.pool = &ctx.pool;
  positions_.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) positions_[static_cast<size_t>(i)] = view.position(layout, i);
  e.positions = positions_.data();

  e.rows = static_cast<int>(std::min({static_cast<int64_t>(needs.window_rows), witness.held_, n}));
  if (e.rows > 0) {
    const int64_t stride = int64_t{a.query_heads} * d;
    const float* q = witness.queries_.as<float>() + (witness.begin_ + witness.held_ - e.rows) * stride + head * group * d;
    float* probs = ensure(ctx, probs_, static_cast<int64_t>(group) * e.rows * n);
    window_attention(ctx, layout, view, q, e.rows, group, stride, witness.last_position_ - e.rows + 1, a.scale, a.window,
                     probs);
    if (witness.shared_) {
      // A row of the whole softmax sums to what the sinks leave.
      const float* share = witness.shares_.as<float>() + (witness.begin_ + witness.held_ - e.rows) * a.query_heads + head * group;
      for_rows(ctx, int64_t{group} * e.rows, [&](int64_t row) {
        const float s = share[row % e.rows * a.query_heads + row / e.rows];
        for (int64_t i = 0; i < n; ++i) probs[row * n + i] *= s;
      });
    }
    e.probs = probs;
  }
  const bool values = needs.values || needs.projected_norms || needs.projected_l1 || needs.projected_products;
  if (needs.keys || values) {
    float* k = needs.keys ? ensure(ctx, keys_, n * d) : nullptr;
    float* v = values ? ensure(ctx, values_, n * d) : nullptr;
    kv_read(ctx, layout, view, 0, n, k, v);
    e.keys = k;
    e.values = v;
  }
  const FullPrecision f32(ctx);
  if (needs.projected_norms) {
    read_norms(ctx, layer, head, group, n, a.head_dim, false);
    e.norms = norms_.as<float>();
  }
  if (needs.projected_l1) {
    read_norms(ctx, layer, head, group, n, a.head_dim, true);
    e.norms_l1 = norms_l1_.as<float>();
  }
  if (needs.projected_products) {
    read_products(ctx, layer, head, group, n, a.head_dim);
    e.products = products_.as<float>();
  }
  if (needs.column_sums && !witness.column_sums_.empty()) {
    float* sums = ensure(ctx, sums_, group * n);
    float* observers = ensure(ctx, observers_, n);
    for (int64_t i = 0; i < n; ++i) {
      const size_t p = static_cast<size_t>(positions_[static_cast<size_t>(i)]);
      for (int h = 0; h < group; ++h) sums[h * n + i] = witness.column_sums_[static_cast<size_t>(head * group + h)][p];
      observers[i] = witness.observers_[p];
    }
    e.column_sums = sums;
    e.observers = observers;
  }
  if (needs.raw_queries) {
    query_mean_.assign(static_cast<size_t>(group * d), 0.0);
    query_cov_.assign(static_cast<size_t>(group * d * d), 0.0);
    const double count = static_cast<double>(std::max<int64_t>(1, witness.query_count_));
    for (int64_t h = 0; h < group && !witness.query_sum_.empty(); ++h) {
      const double* sum = witness.query_sum_.data() + (head * group + h) * d;
      const double* outer = witness.query_outer_.data() + (head * group + h) * d * d;
      double* mean = query_mean_.data() + h * d;
      double* cov = query_cov_.data() + h * d * d;
      for (int64_t i = 0; i < d; ++i) mean[i] = sum[i] / count;
      for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j <= i; ++j) cov[i * d + j] = cov[j * d + i] = outer[i * d + j] / count - mean[i] * mean[j];
    }
    e.query_mean = query_mean_.data();
    e.query_cov = query_cov_.data();
  }
  return e;
}

void EvidenceReader::read_norms(Context& ctx, int layer, int head, int group, int64_t slots, int head_dim, bool l1) {
  const int64_t d = head_dim;
  const float* v = values_.as<float>();
  float* out = ensure(ctx, l1 ? norms_l1_ : norms_, group * slots);
  if (!l1) {
    triangle_products(ctx, v, slots, head_dim, projections_->factors(ctx, layer, head), group, true, out, slots);
    for_rows(ctx, group * slots, [&](int64_t i) { out[i] = std::sqrt(out[i]); });
    return;
  }
  constexpr int64_t kBlock = 512;
  const int64_t hidden = model_.attention(layer)->output.out();
  float* w = ensure(ctx, block_, hidden * d);
  float* rows = ensure(ctx, rows_, std::min(slots, kBlock) * hidden);
  for (int h = 0; h < group; ++h) {
    projections_->block(layer, head * group + h, w);
    const LinearWeight block = matrix(w, hidden, d);
    for (int64_t begin = 0; begin < slots; begin += kBlock) {
      const int64_t count = std::min(kBlock, slots - begin);
      linear(ctx, block, v + begin * d, count, rows);
      for_rows(ctx, count, [&](int64_t i) { out[h * slots + begin + i] = absolute_sum(rows + i * hidden, hidden); });
    }
  }
}

void EvidenceReader::read_products(Context& ctx, int layer, int head, int group, int64_t slots, int head_dim) {
  const int pairs = group * (group + 1) / 2;
  float* out = ensure(ctx, products_, pairs * slots);
  triangle_products(ctx, values_.as<float>(), slots, head_dim, projections_->products(ctx, layer, head), pairs, false,
                    out, slots);
}

// Frobenius norm of mixed [rows, H * d] times the output projection.
double EvidenceReader::projected_norm(Context& ctx, int layer, const float* mixed, int64_t rows) {
  LinearWeight w = model_.attention(layer)->output;
  w.bias = nullptr;
  float* out = ensure(ctx, rows_, rows * w.out());
  const FullPrecision f32(ctx);
  linear(ctx, w, mixed, rows, out);
  double sum = 0;
  for (int64_t i = 0; i < rows * w.out(); ++i) sum += static_cast<double>(out[i]) * out[i];
  return std::sqrt(sum);
}

double EvidenceReader::output_norm(Context& ctx, int layer, const LayerWitness& witness, int rows) {
  const AttentionLayer& a = *model_.attention(layer);
  const int64_t held = std::min<int64_t>(rows, witness.held_), row = int64_t{a.query_heads} * a.head_dim;
  if (held == 0) return 0;
  return projected_norm(ctx, layer, witness.mixed_.as<float>() + (witness.begin_ + witness.held_ - held) * row, held);
}

EvidenceReader::Error EvidenceReader::error(Context& ctx, const KvCache& cache, int layer, const LayerWitness& witness,
                                            int rows, const std::vector<std::vector<int32_t>>& kept) {
  const AttentionLayer& a = *model_.attention(layer);
  const int group = a.query_heads / a.kv_heads, d = a.head_dim;
  const int64_t row = int64_t{a.query_heads} * d;
  PolicyNeeds needs;
  needs.window_rows = rows;
  needs.values = true;
  std::vector<float> full, moved, lost;  // [rows, H * d]
  int64_t held = 0;
  for (int g = 0; g < a.kv_heads; ++g) {
    const HeadEvidence e = read(ctx, cache, layer, g, witness, needs, witness.next_position());
    if (g == 0) {
      held = e.rows;
      full.assign(static_cast<size_t>(held * row), 0.0f);
      moved = lost = full;
    }
    std::vector<bool> stays(static_cast<size_t>(e.slots), false);
    for (int32_t slot : kept[static_cast<size_t>(g)]) stays[static_cast<size_t>(slot)] = true;
    const int64_t first = witness.begin_ + witness.held_ - e.rows;  // of the rows in the witness's buffers
    ctx.pool.parallel_for(int64_t{group} * e.rows, [&](int64_t index, int) {
      const int64_t h = index / e.rows, t = index % e.rows, head = g * group + h;
      const float* p = e.probs + index * e.slots;
      std::vector<double> out(static_cast<size_t>(d), 0.0), stay(static_cast<size_t>(d), 0.0);
      double mass = 0;
      for (int64_t i = 0; i < e.slots; ++i) {
        const bool keep = stays[static_cast<size_t>(i)];
        if (keep) mass += p[i];
        for (int j = 0; j < d; ++j) {
          const double x = static_cast<double>(p[i]) * e.values[i * d + j];
          out[static_cast<size_t>(j)] += x;
          if (keep) stay[static_cast<size_t>(j)] += x;
        }
      }
      const int64_t at = t * row + head * d;
      // Sinks stay: their probability, and what they add to the output, is the rest of what the model mixed.
      const double sinks = witness.shared_ ? 1.0 - witness.shares_.as<float>()[(first + t) * a.query_heads + head] : 0;
      for (int j = 0; j < d; ++j) {
        const double o = out[static_cast<size_t>(j)], s = stay[static_cast<size_t>(j)];
        const double r = witness.shared_ ? witness.mixed_.as<float>()[first * row + at + j] - o : 0;
        full[static_cast<size_t>(at + j)] = static_cast<float>(o + r);
        lost[static_cast<size_t>(at + j)] = static_cast<float>(o - s);
        moved[static_cast<size_t>(at + j)] = static_cast<float>(o + r - (mass + sinks > 0 ? (s + r) / (mass + sinks) : 0));
      }
    });
  }
  if (held == 0) return {};
  return {projected_norm(ctx, layer, full.data(), held), projected_norm(ctx, layer, moved.data(), held),
          projected_norm(ctx, layer, lost.data(), held)};
}

}  // namespace lacuna

#include "models/latent_attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "kernels/elementwise.h"
#include "kernels/latent_heads.h"

namespace lacuna {
namespace {

constexpr int64_t kLeastPiece = 16, kMostPiece = 64;
// How late the last of threads that go apart may end: never worth the meetings, and always.
constexpr double kSurelyApart = 1.05, kNeverApart = 1.3;
constexpr int kCallsATrial = 32;

}  // namespace

std::vector<LatentChunk> cut_into_chunks(std::span<const LatentPart> parts, int64_t block, int64_t most) {
  std::vector<LatentChunk> chunks(1);
  const auto flush = [&] {
    const LatentChunk& last = chunks.back();
    chunks.push_back({last.first_row + last.rows, 0, {}});
  };
  for (LatentPart rest : parts) {
    while (rest.rows > 0) {
      const int64_t room = most - chunks.back().rows;
      int64_t take = rest.rows;
      if (take > room && rest.kv) {
        // To the last end of a block that fits; none does: to the first.
        const int64_t first = rest.first_position, end = (first + std::max<int64_t>(room, 0)) / block * block;
        take = end > first ? end - first : 0;
        if (take == 0 && chunks.back().rows == 0) take = std::min(rest.rows, block - first % block);
      } else if (take > room && chunks.back().rows > 0) {
        take = 0;
      }
      if (take == 0) {
        flush();
        continue;
      }
      chunks.back().parts.push_back({rest.kv, take, rest.first_position});
      chunks.back().rows += take;
      rest.rows -= take;
      rest.first_position += take;
    }
  }
  if (chunks.back().rows == 0) chunks.pop_back();
  return chunks;
}

AppendGuard::~AppendGuard() {
  for (const Entry& e : entries_)
    for (int layer = 0; layer < e.kv->layers(); ++layer)
      for (int h = 0; h < e.kv->kv_heads(layer); ++h) {
        // A sequence's next call wants as many slots again: rows that come and go at every step keep their pages.
        const int64_t keep = e.length + (committed_ ? e.keep : 0);
        e.kv->truncate(layer, h, std::min(keep, e.kv->length(layer, h)), committed_);
      }
}

LatentAttention::LatentAttention(const RopeConfig& rope, Pairs pairs, int rope_dim, int layers, int heads, int head_dim,
                                 int64_t block, int64_t row_weights)
    : rope_(rope, rope_dim, std::numeric_limits<int32_t>::max()),
      pairs_(pairs),
      rope_dim_(rope_dim),
      layers_(layers),
      heads_(heads),
      head_dim_(head_dim),
      block_(block),
      row_weights_(row_weights) {}

void LatentAttention::begin(Context& ctx, const LatentChunk& chunk, const KvLayout& layout) {
  const int64_t half = rope_dim_ / 2;
  float* cos = ctx.activation(ActivationSlot::kCos, static_cast<size_t>(chunk.rows * half));
  float* sin = ctx.activation(ActivationSlot::kSin, static_cast<size_t>(chunk.rows * half));
  cos_ = cos;
  sin_ = sin;
  layout_ = layout;
  for (const LatentPart& p : chunk.parts) {
    const RopeTable::Rows rows = rope_.rows(ctx, p.first_position, p.rows, p.first_position + p.rows);
    cos = std::copy_n(rows.cos, p.rows * half, cos);
    sin = std::copy_n(rows.sin, p.rows * half, sin);
  }

  const auto pages_of = [this](const LatentPart& p) {
    return p.kv ? 0 : (p.rows + layout_.page_slots - 1) / layout_.page_slots;
  };
  int64_t pages = 0;
  for (const LatentPart& p : chunk.parts) pages += pages_of(p) * heads_;
  const size_t bytes = layout_.page_bytes();
  pages_.ensure(ctx.memory, MemoryTag::kScratch, static_cast<size_t>(pages) * bytes);
  page_list_.resize(static_cast<size_t>(pages));
  for (size_t i = 0; i < page_list_.size(); ++i) page_list_[i] = pages_.as<std::byte>() + i * bytes;

  parts_ = chunk.parts.size();
  const auto heads = static_cast<size_t>(heads_), all = static_cast<size_t>(layers_) * parts_;
  rows_.resize(all);
  sequences_.resize(all);
  before_.resize(all * heads);
  after_.resize(all * heads);
  size_t at = 0;
  for (int layer = 0; layer < layers_; ++layer) {
    std::byte* const* own = page_list_.data();
    for (const LatentPart& p : chunk.parts) {
      KvHeadView *before = &before_[at * heads], *after = &after_[at * heads];
      if (p.kv) p.kv->reserve(layer, p.rows);
      for (size_t h = 0; h < heads; ++h, own += pages_of(p)) {
        before[h] = p.kv ? p.kv->view(layer, static_cast<int>(h)) : KvHeadView{own, 0};
        after[h] = {before[h].pages, before[h].length + p.rows};
      }
      rows_[at] = {before, p.rows, p.first_position};
      AttentionSequence& s = sequences_[at];
      s.tokens = p.rows;
      s.first_position = p.first_position;
      s.heads = after;
      ++at;
    }
  }
}

// Says where the rows of whole parts lie, in all layers.
void LatentAttention::place(const LatentChunk& chunk, int64_t first, int64_t rows, const Place& place) {
  const float* q = place.rows(ActivationSlot::kQuery, 3 * width());
  float* out = place.rows(ActivationSlot::kMixed, width());
  int64_t row = 0;
  for (size_t i = 0; i < parts_; row += chunk.parts[i++].rows) {
    if (row < first || row >= first + rows) continue;
    for (size_t at = i; at < sequences_.size(); at += parts_) {
      sequences_[at].q = q + (row - first) * 3 * width();
      sequences_[at].out = out + (row - first) * width();
    }
  }
}

// Whole parts in pieces that can do without each other: how much later the last thread ends than if the work were
// shared out evenly, and the work.
LatentAttention::Division LatentAttention::divide(const LatentChunk& chunk, const AttentionPlan& plan,
                                                  int64_t threads) {
  // Several pieces a thread even out, but no fewer rows than its products want, nor more than stay in its L2.
  const int64_t share = threads > 1 ? (chunk.rows + 2 * threads - 1) / (2 * threads) : kMostPiece;
  const int64_t most = std::clamp(share, kLeastPiece, kMostPiece);
  // A row's key costs as much as four of its weights a value: attention runs at half the pace of products.
  const int64_t row_cost = row_weights_ / (4 * width());
  std::vector<int64_t> busy(static_cast<size_t>(threads));
  pieces_.clear();
  int64_t row = 0, rows = 0, cost = 0, total = 0;
  const auto close = [&] {
    *std::min_element(busy.begin(), busy.end()) += cost;
    total += cost;
    rows = cost = 0;
  };
  for (size_t i = 0; i < chunk.parts.size(); ++i) {
    const LatentPart& p = chunk.parts[i];
    if (rows > 0 && rows + p.rows > most) close();
    if (rows == 0) pieces_.push_back({row, plan.first_item(static_cast<int64_t>(i))});
    row += p.rows;
    rows += p.rows;
    cost += p.rows * (row_cost + (p.kv ? p.first_position : 0) + p.rows);
  }
  close();
  const int64_t last = *std::max_element(busy.begin(), busy.end());
  return {static_cast<double>(last * threads) / static_cast<double>(total), static_cast<double>(total)};
}

// Together or apart, which pays depends on how far apart the threads' caches are: two cores of one chip hand a line
// over in 25 ns, of two chips in 200, and a virtual machine's may move from one to the other. So both are tried now and
// then.
bool LatentAttention::Pace::apart(const Division& d) {
  if (d.lateness <= kSurelyApart) return true;
  if (d.lateness > kNeverApart) return false;
  const bool faster = ns_[1] < ns_[0];
  return ++calls_ % kCallsATrial == 0 ? !faster : faster;
}
void LatentAttention::Pace::took(bool apart, double ns, const Division& d) {
  // Interruptions only ever add: a longer time is believed bit by bit.
  double& pace = ns_[apart];
  pace = pace > 0 ? std::min(ns / d.work, pace * 1.01) : ns / d.work;
}

void LatentAttention::append(Context& ctx, int layer, int64_t first, int64_t rows, float* qkv, bool queries) const {
  const int64_t n = width(), stride = 3 * n, half = rope_dim_ / 2;
  const float *cos = cos_ + first * half, *sin = sin_ + first * half;
  // Heads of k follow those of q.
  float* x = queries ? qkv : qkv + n;
  const int64_t heads = queries ? 2 * heads_ : heads_;
  if (pairs_ == Pairs::kHalves)
    rope(ctx, x, rows, heads, head_dim_, cos, sin, stride);
  else
    rope_pairs(ctx, x, rows, heads, head_dim_, rope_dim_, cos, sin, stride);
  kv_append_rows(ctx, layout_, of_layer(rows_, layer), heads_, first, rows, qkv + n, qkv + 2 * n, stride);
}

void LatentAttention::append(Context& ctx, int layer, int64_t first, int64_t rows, float* qkv, bool queries,
                             const LayerNorm& q_norm, const LayerNorm& k_norm) const {
  LACUNA_CHECK(pairs_ == Pairs::kNeighbours);
  const int64_t half = rope_dim_ / 2;
  const HeadPreparation how{q_norm, k_norm, rope_dim_, cos_ + first * half, sin_ + first * half};
  prepare_heads(ctx, layout_, how, of_layer(rows_, layer), heads_, first, rows, qkv, 3 * width(), queries);
}

void LatentAttention::run(Context& ctx, const LatentChunk& chunk, const KvLayout& layout, int steps, const Step& step,
                          Lanes* lanes) {
  begin(ctx, chunk, layout);
  place(chunk, 0, chunk.rows, {ctx, chunk.rows, 0});
  AttentionShape shape;
  shape.query_heads = shape.kv_heads = heads_;
  shape.scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
  shape.q_stride = 3 * width();
  shape.block = block_;
  if (!lanes) {
    for (int s = 0; s < steps; ++s) {
      step(ctx, s, 0, chunk.rows, {ctx, chunk.rows, 0});
      ctx.layer = s;
      if (s + 1 < steps) attention(ctx, layout, shape, of_layer(sequences_, s));
    }
  } else {
    AttentionPlan plan(ctx, layout, shape, of_layer(sequences_, 0));
    const Division division = divide(chunk, plan, ctx.pool.size());
    const bool apart = pace_.apart(division);
    Lanes::Steps all;
    all.steps = steps;
    all.body = [&](Context& lane, int64_t s, int64_t first, int64_t rows) {
      if (!apart) return step(lane, static_cast<int>(s), first, rows, {ctx, chunk.rows, first});
      const Place own{lane, rows, 0};
      if (s == 0) place(chunk, first, rows, own);
      step(lane, static_cast<int>(s), first, rows, own);
    };
    all.items = plan.items();
    all.mix = [&](Context& lane, int64_t s, int64_t item, int thread) {
      lane.layer = static_cast<int32_t>(s);
      plan.item(lane, of_layer(sequences_, s), item, thread);
    };
    const auto start = std::chrono::steady_clock::now();
    if (apart)
      lanes->apart(ctx, pieces_, chunk.rows, all);
    else
      lanes->chain(ctx, chunk.rows, all);
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    pace_.took(apart, taken.count(), division);
  }
  for (int layer = 0; layer < layers_; ++layer)
    for (const LatentPart& p : chunk.parts)
      if (p.kv) p.kv->extend(layer, p.rows);
}

}  // namespace lacuna

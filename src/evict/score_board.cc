#include "evict/score_board.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "evict/replay.h"

namespace lacuna {
namespace {

constexpr int kErrorRows = 32;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

ScoreBoard::ScoreBoard(Context& ctx, Model& model, std::vector<std::shared_ptr<const Policy>> policies,
                       std::shared_ptr<OutputProjections> projections, bool measure_error)
    : ctx_(ctx), model_(model), policies_(std::move(policies)), measure_error_(measure_error),
      reader_(model, std::move(projections)),
      scores_(policies_.size(), std::vector<LayerScores>(static_cast<size_t>(model.info().layers))) {
  for (const auto& policy : policies_) needs_.merge(policy->needs());
  if (measure_error_) {
    needs_.window_rows = std::max(needs_.window_rows, kErrorRows);
    needs_.output_norm = true;  // so that the output is remembered, of which sinks may have a part
  }
  witnesses_.resize(measure_error_ ? static_cast<size_t>(model.info().layers) : 1);
}

LayerWitness& ScoreBoard::witness(int layer) { return witnesses_[witnesses_.size() == 1 ? 0 : static_cast<size_t>(layer)]; }

void ScoreBoard::on_chunk(const LayerTap& tap, SequenceState& state) {
  const auto start = std::chrono::steady_clock::now();
  LayerWitness& seen = witness(tap.layer);
  if (tap.first_token == 0) seen.reset();
  seen.observe(ctx_, tap, *model_.attention(tap.layer), state.kv, needs_);
  prompt_tokens_ = tap.call_tokens;
  score_seconds_ += seconds_since(start);
}

void ScoreBoard::on_layer_end(int layer, SequenceState& state) {
  if (!model_.attention(layer)) return;
  next_position_ = witness(layer).next_position();
  score_layer(layer, state, next_position_, false, {});
}

void ScoreBoard::score_layer(int layer, const SequenceState& state, int64_t next_position, bool replayed,
                             const std::vector<std::vector<float>>& attention) {
  const auto start = std::chrono::steady_clock::now();
  LayerWitness& seen = witness(layer);
  const int heads = state.kv.kv_heads(layer);
  PolicyNeeds needs;
  for (size_t p = 0; p < policies_.size(); ++p) {
    if (policies_[p]->needs().replay != replayed) continue;
    needs.merge(policies_[p]->needs());
    LayerScores& scores = scores_[p][static_cast<size_t>(layer)];
    scores = {};
    scores.heads.resize(static_cast<size_t>(heads));
    if (policies_[p]->needs().output_norm) scores.output_norm = reader_.output_norm(ctx_, layer, seen, policies_[p]->rule().window);
  }
  if (replayed) needs.window_rows = 0;  // the queries that are still remembered are the prompt's
  for (int h = 0; h < heads; ++h) {
    HeadEvidence e = reader_.read(ctx_, state.kv, layer, h, seen, needs, next_position);
    if (replayed) e.replayed = attention[static_cast<size_t>(h)].data();
    for (size_t p = 0; p < policies_.size(); ++p) {
      if (policies_[p]->needs().replay != replayed) continue;
      set_window(e, policies_[p]->rule().window);
      HeadScores& out = scores_[p][static_cast<size_t>(layer)].heads[static_cast<size_t>(h)];
      out.position.assign(e.positions + e.first, e.positions + e.first + e.candidates);
      out.slot.resize(static_cast<size_t>(e.candidates));
      std::iota(out.slot.begin(), out.slot.end(), static_cast<int32_t>(e.first));
      policies_[p]->score(e, out, scores_[p][static_cast<size_t>(layer)]);
    }
  }
  for (size_t p = 0; p < policies_.size(); ++p)
    if (policies_[p]->needs().replay == replayed) policies_[p]->finish_layer(scores_[p][static_cast<size_t>(layer)]);
  score_seconds_ += seconds_since(start);
}

void ScoreBoard::finish(SequenceState& state, std::span<const int32_t> prompt, const std::vector<int32_t>& replay_prompt,
                        const PrefillOptions& prefill) {
  if (!needs_.replay) return;
  const auto start = std::chrono::steady_clock::now();
  const auto attention = replay_attention(ctx_, model_, state, prompt, replay_prompt, prefill);
  score_seconds_ += seconds_since(start);
  for (int layer = 0; layer < model_.info().layers; ++layer)
    if (model_.attention(layer)) score_layer(layer, state, state.next_position, true, attention[static_cast<size_t>(layer)]);
}

ScoreBoard::KeepMap ScoreBoard::select(size_t index, const Budget& budget, const KvCache& cache, EvictionReport* report) const {
  const Policy& policy = *policies_[index];
  const SelectionRule rule = policy.rule();
  CacheSizes sizes;
  sizes.length.resize(static_cast<size_t>(cache.layers()));
  std::vector<std::vector<int64_t>> first(static_cast<size_t>(cache.layers()));
  for (int l = 0; l < cache.layers(); ++l)
    for (int h = 0; model_.attention(l) && h < cache.kv_heads(l); ++h) {
      first[static_cast<size_t>(l)].push_back(first_visible(*model_.attention(l), cache, l, h, next_position_));
      sizes.length[static_cast<size_t>(l)].push_back(cache.length(l, h) - first[static_cast<size_t>(l)].back());
    }
  const BudgetPlan plan = plan_budget(budget, rule, cache.shape(), sizes);

  EvictionReport filled;
  filled.policy = policy.name();
  filled.budget = budget.text;
  filled.prompt_tokens = prompt_tokens_;
  filled.evicted = plan.evict;
  filled.rounds = plan.evict ? 1 : 0;
  filled.score_seconds = score_seconds_;
  const auto start = std::chrono::steady_clock::now();

  KeepMap keep(static_cast<size_t>(cache.layers()));
  Selection selection(rule, plan, sizes);
  if (plan.evict) {
    const double mean = static_cast<double>(plan.keep) / static_cast<double>(std::max<int64_t>(1, sizes.heads()));
    for (int l = 0; l < cache.layers(); ++l) {
      if (!model_.attention(l)) continue;
      LayerScores scores = scores_[index][static_cast<size_t>(l)];
      policy.apply_quota(scores, mean);
      selection.add_layer(l, std::move(scores));
    }
    selection.shrink(true);
  }
  for (int l = 0; l < cache.layers(); ++l)
    for (int h = 0; h < static_cast<int>(sizes.length[static_cast<size_t>(l)].size()); ++h) {
      std::vector<int32_t> slots;
      const int64_t length = cache.length(l, h);
      int64_t from = 0;
      if (plan.evict) {
        slots = selection.layer(l).heads[static_cast<size_t>(h)].slot;
        from = std::max<int64_t>(first[static_cast<size_t>(l)][static_cast<size_t>(h)], length - rule.window);
      }
      for (int64_t s = std::max<int64_t>(0, from); s < length; ++s) slots.push_back(static_cast<int32_t>(s));
      keep[static_cast<size_t>(l)].push_back(std::move(slots));
    }
  if (!report) return keep;

  filled.select_seconds = seconds_since(start);
  filled.entries_before = cache.total_slots();
  filled.threshold = plan.evict && rule.scope == Scope::kModel ? selection.threshold() : 0;
  filled.positions.resize(keep.size());
  const KvCacheShape& shape = cache.shape();
  CacheSizes kept;
  kept.length.resize(keep.size());
  for (size_t l = 0; l < keep.size(); ++l) {
    for (size_t h = 0; h < keep[l].size(); ++h) {
      std::vector<int32_t> positions;
      for (int32_t slot : keep[l][h])
        positions.push_back(cache.view(static_cast<int>(l), static_cast<int>(h)).position(cache.layout(static_cast<int>(l)), slot));
      filled.entries_kept += static_cast<int64_t>(keep[l][h].size());
      filled.used_bytes += keep[l][h].size() * cache.layout(static_cast<int>(l)).slot_bytes();
      kept.length[l].push_back(static_cast<int64_t>(keep[l][h].size()));
      filled.positions[l].push_back(std::move(positions));
    }
    if (keep[l].empty()) continue;
    LayerReport entry;
    entry.layer = static_cast<int>(l);
    if (plan.evict) {
      entry.kept_share = rule.non_negative ? selection.kept_share(entry.layer) : 1;
      entry.bound = selection.layer(entry.layer).bound_scale * (1 - entry.kept_share);
    }
    if (measure_error_) {
      const auto error = reader_.error(ctx_, cache, entry.layer, witnesses_[l], rule.window > 0 ? rule.window : kErrorRows, keep[l]);
      entry.error = error.renormalised;
      entry.error_plain = error.plain;
      entry.output_norm = error.output_norm;
    }
    filled.layers.push_back(entry);
  }
  filled.allocated_bytes = bytes_of(shape, kept);
  filled.slack_bytes = filled.allocated_bytes - filled.used_bytes;
  *report = std::move(filled);
  return keep;
}

}  // namespace lacuna

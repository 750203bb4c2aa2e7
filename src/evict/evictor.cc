#include "evict/evictor.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "evict/replay.h"

namespace lacuna {
namespace {

constexpr int kErrorRows = 32;  // queries over which true errors are measured for policies without a window

class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace

Evictor::Evictor(Context& ctx, Model& model, std::shared_ptr<const Policy> policy, Budget budget, EvictorOptions options,
                 std::shared_ptr<OutputProjections> projections)
    : ctx_(ctx), model_(model), policy_(std::move(policy)), budget_(std::move(budget)), options_(std::move(options)),
      rule_(policy_->rule()), needs_(policy_->needs()), reader_(model, std::move(projections)) {
  for (int l = 0; l < model.info().layers; ++l)
    if (model.attention(l)) attention_layers_.push_back(l);
  if (attention_layers_.empty())
    throw BadInput("this {} model has no attention layers, so there is no KV cache to evict from", model.info().architecture);
  if (options_.during_decode && needs_.replay)
    throw BadInput("policy {} replays the prompt, which cannot be done while decoding; evict at prefill only", policy_->name());
  if (options_.decode_block < 1) throw BadInput("a decode block of {} tokens is too small; at least 1", options_.decode_block);
  streaming_ = rule_.streams() && !needs_.replay && !options_.measure_error;
  if (options_.measure_error) {
    needs_.window_rows = std::max(needs_.window_rows, kErrorRows);
    needs_.output_norm = true;  // so that the output is remembered, of which sinks may have a part
  }
  witnesses_.resize(options_.during_decode || options_.measure_error ? static_cast<size_t>(model.info().layers) : 1);
  report_.policy = policy_->name();
  report_.budget = budget_.text;
}

LayerWitness& Evictor::witness(int layer) { return witnesses_[witnesses_.size() == 1 ? 0 : static_cast<size_t>(layer)]; }

// Lengths once `tokens` more from first_position on are in; the call may have begun to append them.
// Of a sliding-window layer only the slots count that a later token can still see.
CacheSizes Evictor::sizes_after(const SequenceState& state, int64_t first_position, int64_t tokens, bool visible_only) const {
  CacheSizes sizes;
  sizes.length.resize(static_cast<size_t>(state.kv.layers()));
  for (int l : attention_layers_) {
    const int64_t window = model_.attention(l)->window;
    const int64_t oldest = visible_only && window > 0 ? first_position + tokens - window + 1 : 0;  // first position in sight
    for (int h = 0; h < state.kv.kv_heads(l); ++h) {
      const KvHeadView& view = state.kv.view(l, h);
      const auto slots_before = [&](int64_t position) {
        int64_t low = 0, high = view.length;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (view.position(state.kv.layout(l), middle) < position)
            low = middle + 1;
          else
            high = middle;
        }
        return low;
      };
      const int64_t old = slots_before(first_position) - slots_before(std::min(oldest, first_position));
      sizes.length[static_cast<size_t>(l)].push_back(old + std::min(tokens, first_position + tokens - std::max(oldest, first_position)));
    }
  }
  return sizes;
}

const BudgetPlan& Evictor::plan(const SequenceState& state, int64_t prompt_tokens, int64_t new_tokens) {
  KvLimit limit;
  limit.bytes = options_.kv_limit;
  limit.used_elsewhere = options_.used_elsewhere;
  limit.sustained = options_.during_decode;
  limit.growth = options_.question_tokens + (options_.during_decode ? options_.decode_block : new_tokens);
  limit.streaming = streaming_;
  limit.stored = sizes_after(state, state.next_position, prompt_tokens, false);
  plan_ = plan_budget(budget_, rule_, state.kv.shape(), sizes_after(state, state.next_position, prompt_tokens, true), limit);
  planned_ = true;
  new_tokens_ = new_tokens;
  report_.prompt_tokens = prompt_tokens;
  return plan_;
}

void Evictor::begin_call(const LayerTap& tap, const SequenceState& state) {
  if (!prefilled_) {
    // The first chunk is in already, but next_position still stands before the call.
    if (!planned_ || report_.prompt_tokens != tap.call_tokens) plan(state, tap.call_tokens, new_tokens_);
    if (plan_.evict && !needs_.replay) begin_round(sizes_after(state, tap.first_position, tap.call_tokens, true), plan_);
    return;
  }
  if (!options_.during_decode) return;
  tokens_since_round_ += tap.call_tokens;
  if (tokens_since_round_ < options_.decode_block) return;
  CacheSizes sizes = sizes_after(state, tap.first_position, tap.call_tokens, true);
  BudgetPlan plan = plan_;
  plan.keep = plan_.target - sizes.protected_slots(rule_.window);
  if (!plan_.by_mass && (sizes.slots() <= plan_.target || plan.keep < 0)) return;
  begin_round(std::move(sizes), plan);
}

void Evictor::begin_round(CacheSizes sizes, const BudgetPlan& plan) {
  selection_ = std::make_unique<Selection>(rule_, plan, sizes);
  mean_candidates_ = static_cast<double>(plan.keep) / static_cast<double>(std::max<int64_t>(1, sizes.heads()));
  held_.assign(sizes.length.size(), {});
  report_.entries_before = 0;
  report_.layers.clear();
}

void Evictor::on_chunk(const LayerTap& tap, SequenceState& state) {
  if (tap.layer == attention_layers_.front() && tap.first_token == 0) begin_call(tap, state);
  if (!selection_ && !options_.during_decode && !(needs_.replay && options_.measure_error)) return;
  LayerWitness& seen = witness(tap.layer);
  if (tap.first_token == 0 && witnesses_.size() == 1) seen.reset();
  const Stopwatch watch(report_.score_seconds);
  seen.observe(ctx_, tap, *model_.attention(tap.layer), state.kv, needs_);
}

void Evictor::on_layer_end(int layer, SequenceState& state) {
  if (!model_.attention(layer)) return;
  const bool last = layer == attention_layers_.back();
  if (selection_) {
    score_layer(layer, state);
    if (streaming_ || last) {
      {
        const Stopwatch watch(report_.select_seconds);
        selection_->shrink(last);
      }
      if (options_.measure_error) measure_errors(state);
      evict_layers(state);
    }
    if (last) end_round(state);
  }
  if (last) prefilled_ = true;
}

void Evictor::score_layer(int layer, SequenceState& state) {
  const Stopwatch watch(report_.score_seconds);
  LayerWitness& seen = witness(layer);
  LayerScores scores;
  scores.heads.resize(static_cast<size_t>(state.kv.kv_heads(layer)));
  if (needs_.output_norm) scores.output_norm = reader_.output_norm(ctx_, layer, seen, rule_.window);
  for (int h = 0; h < state.kv.kv_heads(layer); ++h) {
    HeadEvidence e = reader_.read(ctx_, state.kv, layer, h, seen, needs_, seen.next_position());
    set_window(e, rule_.window);
    HeadScores& out = scores.heads[static_cast<size_t>(h)];
    out.position.assign(e.positions + e.first, e.positions + e.first + e.candidates);
    out.slot.resize(static_cast<size_t>(e.candidates));
    std::iota(out.slot.begin(), out.slot.end(), static_cast<int32_t>(e.first));
    OpScope op(ctx_, OpKind::kEvictScore);
    op.record.layer = layer;
    op.record.m = rule_.window;
    op.record.n = e.candidates;
    policy_->score(e, out, scores);
  }
  add_scores(layer, std::move(scores), state, seen.next_position());
}

void Evictor::add_scores(int layer, LayerScores scores, const SequenceState& state, int64_t next_position) {
  policy_->finish_layer(scores);
  policy_->apply_quota(scores, mean_candidates_);
  for (int h = 0; h < state.kv.kv_heads(layer); ++h) {
    Held held;
    held.end = static_cast<int32_t>(state.kv.length(layer, h));
    held.window_begin = static_cast<int32_t>(std::max(first_visible(*model_.attention(layer), state.kv, layer, h, next_position),
                                                      static_cast<int64_t>(held.end) - rule_.window));
    held.slots.resize(static_cast<size_t>(held.end));
    std::iota(held.slots.begin(), held.slots.end(), 0);
    report_.entries_before += held.end;
    held_[static_cast<size_t>(layer)].push_back(std::move(held));
  }
  selection_->add_layer(layer, std::move(scores));
}

std::vector<int32_t> Evictor::kept_slots(int layer, int head) const {
  const Held& held = held_[static_cast<size_t>(layer)][static_cast<size_t>(head)];
  std::vector<int32_t> slots = selection_->layer(layer).heads[static_cast<size_t>(head)].slot;
  for (int32_t s = std::max(held.window_begin, 0); s < held.end; ++s) slots.push_back(s);
  return slots;
}

void Evictor::evict_layers(SequenceState& state) {
  struct Move {
    int layer, head;
    std::vector<int32_t> slots;  // in today's numbering
  };
  std::vector<Move> moves;
  {
    const Stopwatch watch(report_.select_seconds);
    OpScope op(ctx_, OpKind::kEvictSelect);
    for (int layer : attention_layers_) {
      if (held_[static_cast<size_t>(layer)].empty()) break;  // not scored yet, nor are those after it
      for (int h = 0; h < state.kv.kv_heads(layer); ++h) {
        Held& held = held_[static_cast<size_t>(layer)][static_cast<size_t>(h)];
        std::vector<int32_t> stay = kept_slots(layer, h);
        op.record.kv_tokens_kept += static_cast<int64_t>(stay.size());
        op.record.kv_tokens_evicted += static_cast<int64_t>(held.slots.size() - stay.size());
        if (stay.size() == held.slots.size()) continue;
        Move move{layer, h, std::vector<int32_t>(stay.size())};
        for (size_t i = 0, at = 0; i < stay.size(); ++i, ++at) {
          while (held.slots[at] != stay[i]) ++at;
          move.slots[i] = static_cast<int32_t>(at);
        }
        held.slots = std::move(stay);
        moves.push_back(std::move(move));
      }
    }
  }
  const Stopwatch watch(report_.compact_seconds);
  for (const Move& move : moves) state.kv.keep(ctx_, move.layer, move.head, move.slots);
}

void Evictor::measure_errors(SequenceState& state) {
  for (int layer : attention_layers_) {
    std::vector<std::vector<int32_t>> kept;
    for (int h = 0; h < state.kv.kv_heads(layer); ++h) kept.push_back(kept_slots(layer, h));
    const auto error = reader_.error(ctx_, state.kv, layer, witness(layer), rule_.window > 0 ? rule_.window : kErrorRows, kept);
    LayerReport entry;
    entry.layer = layer;
    entry.error = error.renormalised;
    entry.error_plain = error.plain;
    entry.output_norm = error.output_norm;
    report_.layers.push_back(entry);
  }
}

void Evictor::end_round(const SequenceState& state) {
  if (report_.layers.empty())
    for (int layer : attention_layers_) report_.layers.push_back({.layer = layer});
  for (LayerReport& entry : report_.layers) {
    entry.kept_share = rule_.non_negative ? selection_->kept_share(entry.layer) : 1;
    entry.bound = selection_->layer(entry.layer).bound_scale * (1 - entry.kept_share);
  }
  report_.threshold = rule_.scope == Scope::kModel ? selection_->threshold() : 0;
  report_.entries_kept = state.kv.total_slots();
  report_.evicted = true;
  ++report_.rounds;
  tokens_since_round_ = 0;
  selection_.reset();
  held_.clear();
}

void Evictor::finish(SequenceState& state, std::span<const int32_t> prompt, const PrefillOptions& prefill) {
  if (!needs_.replay || !plan_.evict || report_.evicted) return;
  std::vector<std::vector<std::vector<float>>> attention;
  {
    const Stopwatch watch(report_.score_seconds);
    attention = replay_attention(ctx_, model_, state, prompt, options_.replay_prompt, prefill);
  }
  begin_round(sizes_after(state, state.next_position, 0, true), plan_);
  PolicyNeeds needs = needs_;
  needs.window_rows = 0;  // the queries that are still remembered are the prompt's
  for (int layer : attention_layers_) {
    const Stopwatch watch(report_.score_seconds);
    LayerScores scores;
    scores.heads.resize(static_cast<size_t>(state.kv.kv_heads(layer)));
    for (int h = 0; h < state.kv.kv_heads(layer); ++h) {
      HeadEvidence e = reader_.read(ctx_, state.kv, layer, h, witness(layer), needs, state.next_position);
      set_window(e, rule_.window);
      e.replayed = attention[static_cast<size_t>(layer)][static_cast<size_t>(h)].data();
      HeadScores& out = scores.heads[static_cast<size_t>(h)];
      out.position.assign(e.positions, e.positions + e.candidates);
      out.slot.resize(static_cast<size_t>(e.candidates));
      std::iota(out.slot.begin(), out.slot.end(), 0);
      policy_->score(e, out, scores);
    }
    add_scores(layer, std::move(scores), state, state.next_position);
  }
  {
    const Stopwatch watch(report_.select_seconds);
    selection_->shrink(true);
  }
  if (options_.measure_error) measure_errors(state);
  evict_layers(state);
  end_round(state);
}

EvictionReport Evictor::report(const SequenceState& state) const {
  EvictionReport report = report_;
  describe_cache(state.kv, report);
  if (!report.evicted) report.entries_before = report.entries_kept = state.kv.total_slots();
  return report;
}

}  // namespace lacuna

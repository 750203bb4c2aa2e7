#include "generate/autoregressive.h"

#include <algorithm>
#include <chrono>

#include "generate/sampler.h"
#include "generate/text_stream.h"

namespace lacuna {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What kvzip replays the context with.
constexpr const char* kReplayInstruction = "\n\nRepeat the previous context exactly.\n";

}  // namespace

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEndOfText: return "end_of_text";
    case FinishReason::kStopString: return "stop_string";
    case FinishReason::kLength: return "length";
    case FinishReason::kContextFull: return "context_full";
  }
  return "?";
}

struct AutoregressiveGenerator::Sequence {
  Sequence(const GenerateRequest& r, SequenceState s, const Tokenizer& tokenizer)
      : request(r), state(std::move(s)), sampler(r.sampling), stream(tokenizer, r.sampling.stop) {}

  const GenerateRequest& request;
  SequenceState state;
  Sampler sampler;
  TextStream stream;
  std::unique_ptr<Evictor> evictor;
  std::vector<int32_t> history;  // prompt, question and generated ids
  std::vector<float> logits;     // of the last prompt token
  GenerateResult result;
  int32_t next = -1;  // sampled, not yet read by the model
  bool done = false;
};

AutoregressiveGenerator::AutoregressiveGenerator(Context& ctx, Model& model, const Tokenizer& tokenizer,
                                                 std::vector<int32_t> end_ids, KvOptions kv, PrefillOptions prefill)
    : ctx_(ctx),
      model_(model),
      tokenizer_(tokenizer),
      end_ids_(std::move(end_ids)),
      kv_(kv),
      prefill_(std::move(prefill)),
      projections_(std::make_shared<OutputProjections>(model)) {}

void AutoregressiveGenerator::check(const GenerateRequest& request) const {
  validate(request.sampling);
  if (!request.infill.empty())
    throw BadInput("infill: a {} model writes from left to right and cannot hold later tokens fixed", model_.info().architecture);
  const int64_t before = request.after ? request.after->state.next_position : 0;
  const auto prompt = before + static_cast<int64_t>(request.prompt.size() + (request.eviction ? request.eviction->question.size() : 0));
  if (prompt > model_.info().max_positions)
    throw BadInput("the prompt has {} tokens; the model has {} positions", prompt, model_.info().max_positions);
}

void AutoregressiveGenerator::read_prompt(Sequence& s, size_t index, const GenerateCallbacks& callbacks) {
  const auto start = Clock::now();
  const GenerateRequest& request = s.request;
  PrefillOptions options = prefill_;
  if (callbacks.on_prefill)
    options.progress = [&](int64_t done, int64_t total) { callbacks.on_prefill(index, done, total); };
  if (callbacks.cancelled) options.cancelled = callbacks.cancelled;

  if (request.after) s.history = request.after->ids;
  s.history.insert(s.history.end(), request.prompt.begin(), request.prompt.end());
  s.logits.resize(static_cast<size_t>(model_.info().vocab));
  const bool ask_later = request.eviction && !request.eviction->question.empty();
  if (request.eviction) {
    const EvictionRequest& e = *request.eviction;
    EvictorOptions evictor;
    const Budget budget = parse_budget(e.budget);
    evictor.during_decode = e.during_decode;
    evictor.question_tokens = static_cast<int64_t>(e.question.size());
    // A budget in bytes is a promise about this request's cache at every moment.
    if (budget.kind == Budget::Kind::kBytes) evictor.kv_limit = static_cast<size_t>(budget.value);
    const auto policy = make_policy(e.policy);
    if (policy->needs().replay) evictor.replay_prompt = tokenizer_.encode(kReplayInstruction, false);
    s.evictor = std::make_unique<Evictor>(ctx_, model_, policy, budget, evictor, projections_);
    const auto later = static_cast<int64_t>(e.question.size()) + request.sampling.max_new_tokens;
    s.evictor->plan(s.state, static_cast<int64_t>(request.prompt.size()), later);
  }
  prefill(ctx_, model_, s.state, request.prompt, s.evictor.get(), options, ask_later ? nullptr : s.logits.data());
  if (s.evictor) s.evictor->finish(s.state, request.prompt, options);
  if (ask_later) {
    const auto& question = request.eviction->question;
    // Evicting again while decoding scores by the latest queries, the question's among them.
    LayerObserver* watcher = request.eviction->during_decode ? s.evictor.get() : nullptr;
    prefill(ctx_, model_, s.state, question, watcher, options, s.logits.data());
    s.history.insert(s.history.end(), question.begin(), question.end());
  }
  if (callbacks.on_read) callbacks.on_read(index, s.state, s.history);
  s.result.prompt_tokens = static_cast<int64_t>(s.history.size() - (request.after ? request.after->ids.size() : 0));
  s.result.prefill_seconds = seconds_since(start);
}

void AutoregressiveGenerator::finish(Sequence& s, size_t index, FinishReason reason, const GenerateCallbacks& callbacks) {
  const std::string tail = s.stream.finish();
  if (callbacks.on_text && !tail.empty()) callbacks.on_text(index, tail);
  s.result.text = s.stream.text();
  s.result.finish = reason;
  s.result.kv_bytes = s.state.kv.allocated_bytes();
  s.result.kv_slots = s.state.kv.total_slots();
  s.result.state_bytes = s.state.recurrent.bytes();
  if (s.evictor) s.result.eviction = s.evictor->report(s.state);
  s.done = true;
}

// Samples one token and decides whether the sequence goes on.
void AutoregressiveGenerator::take(Sequence& s, size_t index, std::span<float> logits, const GenerateCallbacks& callbacks) {
  const int32_t id = s.sampler.sample(logits, s.history);
  const SamplingParams& p = s.request.sampling;
  if (!p.ignore_eos && std::find(end_ids_.begin(), end_ids_.end(), id) != end_ids_.end())
    return finish(s, index, FinishReason::kEndOfText, callbacks);
  s.result.ids.push_back(id);
  s.history.push_back(id);
  const std::string text = s.stream.push(id);
  if (callbacks.on_text && !text.empty()) callbacks.on_text(index, text);
  if (s.stream.stopped()) return finish(s, index, FinishReason::kStopString, callbacks);
  if (static_cast<int64_t>(s.result.ids.size()) >= p.max_new_tokens)
    return finish(s, index, FinishReason::kLength, callbacks);
  if (static_cast<int64_t>(s.history.size()) > model_.info().max_positions)
    return finish(s, index, FinishReason::kContextFull, callbacks);
  s.next = id;
}

std::vector<GenerateResult> AutoregressiveGenerator::generate(std::span<const GenerateRequest> requests,
                                                              const GenerateCallbacks& callbacks) {
  stats_ = {};
  for (const auto& r : requests) check(r);
  ctx_.memory.reset_peak(MemoryTag::kKv);
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (size_t i = 0; i < requests.size(); ++i) {
    sequences.push_back(std::make_unique<Sequence>(
        requests[i], requests[i].after ? requests[i].after->state.copy(ctx_) : model_.new_state(ctx_.memory, kv_), tokenizer_));
    Sequence& s = *sequences.back();
    read_prompt(s, i, callbacks);
    take(s, i, s.logits, callbacks);
    s.logits = {};
  }

  // What decoding reads, from the kernels' own reports; someone else's ledger stays in place.
  struct Listen {
    Context& ctx;
    OpTotals* sink;
    Listen(Context& c, OpTotals& s) : ctx(c), sink(c.trace ? nullptr : &s) {
      if (sink) ctx.trace = sink;
    }
    ~Listen() {
      if (sink) ctx.trace = nullptr;
    }
  } listen(ctx_, stats_.decode_ops);
  const auto start = Clock::now();
  const size_t vocab = static_cast<size_t>(model_.info().vocab);
  std::vector<size_t> active;
  std::vector<SequenceState*> states;
  std::vector<LayerObserver*> observers;
  std::vector<int32_t> ids;
  for (;;) {
    active.clear();
    states.clear();
    observers.clear();
    ids.clear();
    for (size_t i = 0; i < sequences.size(); ++i) {
      Sequence& s = *sequences[i];
      if (s.done) continue;
      active.push_back(i);
      states.push_back(&s.state);
      observers.push_back(s.evictor && s.request.eviction->during_decode ? s.evictor.get() : nullptr);
      ids.push_back(s.next);
    }
    if (active.empty()) break;
    if (callbacks.cancelled && callbacks.cancelled()) throw Cancelled("stopped after {} decoded tokens", stats_.decode_tokens);
    float* logits = ctx_.activation(ActivationSlot::kLogits, active.size() * vocab);
    decode_step(ctx_, model_, states, ids, logits, observers);
    ++stats_.decode_steps;
    for (size_t a = 0; a < active.size(); ++a) {
      take(*sequences[active[a]], active[a], {logits + a * vocab, vocab}, callbacks);
      ++stats_.decode_tokens;
    }
  }
  stats_.decode_seconds = seconds_since(start);
  stats_.kv_peak_bytes = ctx_.memory.peak(MemoryTag::kKv);
  stats_.kv_now_bytes = ctx_.memory.now(MemoryTag::kKv);
  std::vector<GenerateResult> results;
  for (auto& s : sequences) results.push_back(std::move(s->result));
  return results;
}

}  // namespace lacuna

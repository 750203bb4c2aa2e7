#include "eval/runner.h"

#include <algorithm>
#include <chrono>
#include <map>

namespace lacuna {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Which prompt it was, and nothing yet of how it went.
PromptResult result_of(const TaskPrompt& prompt) {
  PromptResult out;
  out.task = prompt.task;
  out.length = prompt.length;
  out.index = prompt.index;
  out.depth = prompt.depth;
  out.asked_depth = prompt.asked_depth;
  return out;
}

}  // namespace

int32_t most_likely(const float* logits, int64_t vocab) {
  return static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
}

std::vector<std::shared_ptr<const Policy>> collect_policies(const std::vector<Variant>& variants, std::vector<size_t>& policy_of) {
  std::vector<std::shared_ptr<const Policy>> out;
  std::map<std::string, size_t> index;
  policy_of.assign(variants.size(), 0);
  for (size_t v = 0; v < variants.size(); ++v) {
    if (variants[v].full()) continue;
    const auto [at, fresh] = index.try_emplace(variants[v].policy, out.size());
    if (fresh) out.push_back(make_policy(variants[v].policy));
    policy_of[v] = at->second;
  }
  return out;
}

KvCache variant_cache(Context& ctx, const Variant& variant, size_t policy, const SequenceState& dense, const ScoreBoard& board) {
  KvCache cache = variant.full() ? dense.kv.copy(ctx) : dense.kv.copy(ctx, board.select(policy, variant.budget, dense.kv));
  round_to_format(cache, variant.format);
  return cache;
}

PromptRunner::PromptRunner(Context& ctx, Model& model, TextCodec codec, std::vector<Variant> variants, RunnerOptions options)
    : ctx_(ctx),
      model_(model),
      codec_(std::move(codec)),
      variants_(std::move(variants)),
      options_(std::move(options)),
      policies_(collect_policies(variants_, policy_of_)),
      projections_(std::make_shared<OutputProjections>(model)) {
  if (variants_.empty()) throw BadInput("there is nothing to evaluate: give at least one policy or the full cache");
}

SequenceState PromptRunner::make_state(size_t variant, const SequenceState& dense, const ScoreBoard& board, VariantResult& out) {
  KvCache cache = variant_cache(ctx_, variants_[variant], policy_of_[variant], dense, board);
  out.kv_slots = cache.total_slots();
  out.kv_bytes = format_bytes(cache, variants_[variant].format);
  return SequenceState{std::move(cache), dense.recurrent.copy(ctx_.memory), dense.next_position};
}

PromptResult PromptRunner::run(const TaskPrompt& prompt) {
  const int64_t n = static_cast<int64_t>(prompt.ids.size());
  const int64_t vocab = model_.info().vocab;
  const int64_t context = options_.query_agnostic ? prompt.question_at : n;
  if (context <= 0 || (options_.query_agnostic && context >= n))
    throw BadInput("task {}: prompt {} does not say where its question begins, so its context cannot be compressed first", prompt.task,
                   prompt.index);
  if (n + prompt.new_tokens > model_.info().max_positions)
    throw BadInput("task {}: prompt {} has {} tokens and its answer may take {}; the model has {} positions", prompt.task, prompt.index, n,
                   prompt.new_tokens, model_.info().max_positions);
  const std::span<const int32_t> ids(prompt.ids);

  PromptResult out = result_of(prompt);
  out.prompt_tokens = n;
  out.variants.resize(variants_.size());

  auto start = Clock::now();
  SequenceState dense = model_.new_state(ctx_.memory, options_.kv);
  if (options_.first_token == FirstToken::kRerun && dense.recurrent.bytes() > 0)
    throw Unsupported("the first answer token cannot be rerun on the small cache: this {} model keeps recurrent states, which "
                      "have read the last prompt token already", model_.info().architecture);
  std::vector<float> logits(static_cast<size_t>(vocab));
  ScoreBoard board(ctx_, model_, policies_, projections_);
  LayerObserver* observer = policies_.empty() ? nullptr : &board;
  prefill(ctx_, model_, dense, ids.first(static_cast<size_t>(context)), observer, options_.prefill, logits.data());
  out.prefill_seconds = seconds_since(start);
  if (observer) {
    board.finish(dense, ids.first(static_cast<size_t>(context)), codec_.encode(options_.replay_prompt), options_.prefill);
    out.score_seconds = board.score_seconds();
  }
  out.full_bytes = dense.kv.used_bytes();

  start = Clock::now();
  std::vector<SequenceState> states;
  states.reserve(variants_.size());
  for (size_t v = 0; v < variants_.size(); ++v) states.push_back(make_state(v, dense, board, out.variants[v]));
  {
    SequenceState freed = std::move(dense);  // the batch below needs its memory more
  }
  std::vector<int32_t> next(variants_.size(), most_likely(logits.data(), vocab));
  bool next_is_answer = true;
  if (options_.query_agnostic) {
    for (size_t v = 0; v < states.size(); ++v) {
      prefill(ctx_, model_, states[v], ids.subspan(static_cast<size_t>(context)), nullptr, options_.prefill, logits.data());
      next[v] = most_likely(logits.data(), vocab);
    }
  } else if (options_.first_token == FirstToken::kRerun) {
    for (SequenceState& state : states) {
      for (int layer = 0; layer < state.kv.layers(); ++layer)
        for (int h = 0; h < state.kv.kv_heads(layer); ++h) state.kv.truncate(layer, h, state.kv.length(layer, h) - 1);
      --state.next_position;
    }
    std::fill(next.begin(), next.end(), prompt.ids.back());
    next_is_answer = false;
  }
  decode(prompt, states, std::move(next), next_is_answer, out);
  out.decode_seconds = seconds_since(start);
  return out;
}

void PromptRunner::decode(const TaskPrompt& prompt, std::vector<SequenceState>& states, std::vector<int32_t> next, bool next_is_answer,
                          PromptResult& out) {
  const int64_t vocab = model_.info().vocab;
  std::vector<std::vector<int32_t>> answers(states.size());
  std::vector<size_t> active(states.size());
  for (size_t v = 0; v < active.size(); ++v) active[v] = v;
  std::vector<float> logits;
  // Takes next[v] as a token of the answer; true when the answer goes on.
  const auto accept = [&](size_t v) {
    if (std::find(codec_.end.begin(), codec_.end.end(), next[v]) != codec_.end.end()) return false;
    answers[v].push_back(next[v]);
    if (static_cast<int64_t>(answers[v].size()) >= prompt.new_tokens) return false;
    return !(prompt.one_line && codec_.decode({&next[v], 1}).find('\n') != std::string::npos);
  };
  while (!active.empty()) {
    if (next_is_answer) std::erase_if(active, [&](size_t v) { return !accept(v); });
    next_is_answer = true;
    if (active.empty()) break;
    if (options_.prefill.cancelled && options_.prefill.cancelled()) throw Cancelled("stopped while answers were being written");
    std::vector<SequenceState*> rows;
    std::vector<int32_t> ids;
    for (size_t v : active) {
      rows.push_back(&states[v]);
      ids.push_back(next[v]);
    }
    logits.resize(active.size() * static_cast<size_t>(vocab));
    decode_step(ctx_, model_, rows, ids, logits.data());
    for (size_t i = 0; i < active.size(); ++i) next[active[i]] = most_likely(logits.data() + static_cast<int64_t>(i) * vocab, vocab);
  }
  for (size_t v = 0; v < states.size(); ++v) {
    std::string text = codec_.decode(answers[v]);
    if (prompt.one_line) text.resize(std::min(text.size(), text.find('\n')));
    out.variants[v].score = string_match(text, prompt.references, prompt.rule);
    out.variants[v].answer = std::move(text);
  }
}

PromptResult run_generated(Generator& generator, const TaskPrompt& prompt, const GenerateCallbacks& callbacks) {
  GenerateRequest request;
  request.prompt = prompt.ids;
  request.sampling.max_new_tokens = prompt.new_tokens;
  if (prompt.one_line) request.sampling.stop = {"\n"};
  const GenerateResult result = generator.generate({&request, 1}, callbacks)[0];
  PromptResult out = result_of(prompt);
  out.prompt_tokens = result.prompt_tokens;
  out.full_bytes = result.kv_bytes;
  out.prefill_seconds = result.prefill_seconds;
  out.decode_seconds = generator.stats().decode_seconds;
  out.variants.push_back({string_match(result.text, prompt.references, prompt.rule), result.text, result.kv_bytes, result.kv_slots});
  return out;
}

}  // namespace lacuna

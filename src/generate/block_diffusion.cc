#include "generate/block_diffusion.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "generate/sampler.h"
#include "generate/text_stream.h"

namespace lacuna {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Rows of logits held at a time: a vocabulary of 100,278 makes 51 MB of 128 rows.
constexpr int64_t kLogitRows = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void validate(const DiffusionParams& p) {
  if (p.steps < 1 || p.steps > 1000) throw BadInput("steps: found {}, expected 1 to 1000", p.steps);
  if (!std::isfinite(p.guidance) || p.guidance < 0 || p.guidance > 1000)
    throw BadInput("guidance: found {}, expected 0 to 1000", p.guidance);
}

std::vector<float> diffusion_grid(int steps) {
  // torch.linspace: from the start in the first half, from the end in the second.
  std::vector<float> t(static_cast<size_t>(steps) + 1);
  const float delta = (0.0f - 1000.0f) / static_cast<float>(steps);
  for (int k = 0; k <= steps; ++k)
    t[static_cast<size_t>(k)] = k < (steps + 1) / 2 ? 1000.0f + delta * static_cast<float>(k) : 0.0f - delta * static_cast<float>(steps - k);
  return t;
}

// Positions count latents from the start of the prompt; ids stand at position * patch.
struct BlockDiffusionGenerator::Sequence {
  Sequence(const GenerateRequest& r, size_t i, ColaState s, const Tokenizer* tokenizer, bool official)
      : request(r), index(i), state(std::move(s)), sampler(r.sampling) {
    const bool stops = !official && r.infill.empty();
    if (tokenizer) stream.emplace(*tokenizer, stops ? r.sampling.stop : std::vector<std::string>{}, !official);
  }
  int64_t tokens() const { return static_cast<int64_t>(request.prompt.size()); }
  bool is_known(int64_t position) const { return position < static_cast<int64_t>(known.size()) && known[static_cast<size_t>(position)]; }

  const GenerateRequest& request;
  size_t index;
  std::optional<ColaState> state;  // until the sequence is done
  Sampler sampler;
  std::optional<TextStream> stream;
  std::vector<int32_t> read;       // what the encoder reads (encoder_ids)
  std::vector<float> z;            // [latents of prompt and infill, latent_dim]
  std::vector<uint8_t> known;      // of those, the ones that are held fixed
  int64_t first = 0;               // position where generation begins: the prompt's whole blocks
  int64_t block = 0;               // being made, counted from there
  int64_t position = 0;            // where it begins
  bool denoises = true, guided = false;  // this block
  std::vector<float> x, v, guess;  // [block, latent_dim]: latents, velocity, clean latents that the velocity points at
  std::vector<float> pending;      // [.., latent_dim] clean latents that the DiT has not read yet
  std::vector<int32_t> history;    // default: prompt and text so far; official: all ids of the blocks so far
  bool ended = false;              // official: an end-of-text id was among them
  bool done = false;
  GenerateResult result;
};

// Sums what kernels report, unless someone else's ledger is in place.
struct BlockDiffusionGenerator::Ledger : TraceSink {
  explicit Ledger(Context& c) : ctx(c), on(!c.trace) {
    if (on) ctx.trace = this;
  }
  ~Ledger() override {
    if (on) ctx.trace = nullptr;
  }
  void record(const OpRecord& r) override { part->record(r); }
  Context& ctx;
  bool on;
  OpTotals* part = nullptr;  // set before anything reports
};

BlockDiffusionGenerator::BlockDiffusionGenerator(Context& ctx, ColaModel& model, const Tokenizer* tokenizer,
                                                 std::vector<int32_t> end_ids, KvOptions kv, DiffusionParams params)
    : ctx_(ctx), model_(model), tokenizer_(tokenizer), end_ids_(std::move(end_ids)), kv_(kv) {
  set_params(params);
}

void BlockDiffusionGenerator::set_params(const DiffusionParams& params) {
  validate(params);
  params_ = params;
}

// Costs a sweep over a third of the DiT, so only where the grid has changed.
void BlockDiffusionGenerator::make_timesteps() {
  std::vector<float> t = diffusion_grid(params_.steps);
  if (table_ && t == t_ && rounding_ == params_.timesteps) return;
  const auto start = Clock::now();
  TimestepTable table = model_.make_timesteps(ctx_, t, params_.timesteps);
  table_ = std::make_unique<TimestepTable>(std::move(table));
  t_ = std::move(t);
  rounding_ = params_.timesteps;
  stats_.diffusion->timestep_seconds = seconds_since(start);
}

void BlockDiffusionGenerator::check(const GenerateRequest& r, const GenerateCallbacks& callbacks) const {
  validate(r.sampling);
  const int64_t vocab = model_.config().vae.vocab;
  const auto check_id = [&](const char* what, int32_t id, size_t at) {
    if (id < 0 || id >= vocab) throw BadInput("{}: found id {} at index {}, expected 0 to {}", what, id, at, vocab - 1);
  };
  for (size_t i = 0; i < r.prompt.size(); ++i) check_id("prompt", r.prompt[i], i);
  for (size_t i = 0; i < r.infill.size(); ++i)
    if (r.infill[i] != -1) check_id("infill", r.infill[i], i);
  if (r.eviction) throw BadInput("eviction: a block-diffusion model's cache of clean latents has no policy that could shrink it");
  if (r.after || callbacks.on_read) throw BadInput("stored states: a block-diffusion model has none");
  if (!tokenizer_ && !r.sampling.stop.empty()) throw BadInput("stop strings need a tokenizer, and the model has none");
  if (params_.official && !r.infill.empty()) throw BadInput("infill: the published algorithm has none; leave official off");
  if (params_.official && r.prompt.empty())
    throw BadInput("the prompt is empty, which the published algorithm does not take; leave official off");
}

// What the encoder reads: prompt and infill, training's mask token in the gaps. A VAE whose blocks see ahead gets the
// padding to whole blocks of the DiT that the published code gives every VAE.
std::vector<int32_t> BlockDiffusionGenerator::encoder_ids(const GenerateRequest& r) const {
  const ColaConfig& c = model_.config();
  std::vector<int32_t> ids = r.prompt;
  for (int32_t id : r.infill) ids.push_back(id >= 0 ? id : static_cast<int32_t>(c.vae.vocab));
  const int64_t unit = c.vae.block > 1 ? c.block_tokens() : c.vae.patch;
  int32_t pad = params_.pad_id;
  if (pad < 0) pad = tokenizer_ ? tokenizer_->pad_id().value_or(-1) : -1;
  if (pad < 0 || pad >= c.vae.vocab) pad = static_cast<int32_t>(c.vae.vocab - 1);
  ids.resize(static_cast<size_t>(ceil_div(static_cast<int64_t>(ids.size()), unit) * unit), pad);
  return ids;
}

// Encodes a group's prompts in one pass and puts their whole blocks into both caches. No head, no padding to the longest.
void BlockDiffusionGenerator::read_prompts(std::span<Sequence* const> group, const GenerateCallbacks& callbacks) {
  const ColaConfig& c = model_.config();
  const int64_t d = c.latent_dim(), patch = c.vae.patch, block = c.dit.block;
  DiffusionStats& stats = *stats_.diffusion;
  Ledger ledger(ctx_);
  ledger.part = &stats.prefill_ops;
  const auto start = Clock::now();
  std::vector<int32_t> ids;
  std::vector<int64_t> lengths;
  for (const Sequence* s : group) {
    if (s->read.empty()) continue;
    ids.insert(ids.end(), s->read.begin(), s->read.end());
    lengths.push_back(static_cast<int64_t>(s->read.size()));
  }
  std::vector<float> mean(ids.size() / static_cast<size_t>(patch) * static_cast<size_t>(d));
  if (!ids.empty()) model_.encode(ctx_, ids, lengths, mean.data(), nullptr);
  model_.to_prior(mean);
  stats.encode_seconds += seconds_since(start);

  std::vector<float> prefix;
  std::vector<LatentRows> rows;
  const float* from = mean.data();
  int64_t total = 0;
  for (Sequence* s : group) {
    const GenerateRequest& r = s->request;
    const int64_t given = s->tokens() + static_cast<int64_t>(r.infill.size());
    const int64_t latents = ceil_div(given, patch);
    s->z.assign(from, from + latents * d);
    from += static_cast<int64_t>(s->read.size()) / patch * d;
    // A latent is held fixed if all its tokens are given. The published code lets padding complete the prompt's last.
    s->known.assign(static_cast<size_t>(latents), 1);
    for (int64_t token = s->tokens(); token < latents * patch; ++token) {
      const bool open = token >= given ? !params_.official : r.infill[static_cast<size_t>(token - s->tokens())] < 0;
      if (open) s->known[static_cast<size_t>(token / patch)] = 0;
    }
    const int64_t of_prompt = params_.official ? ceil_div(s->tokens(), patch) : s->tokens() / patch;
    s->first = of_prompt / block * block;
    prefix.insert(prefix.end(), s->z.begin(), s->z.begin() + s->first * d);
    if (s->first > 0) rows.push_back({&*s->state, s->first, s->first});
    total += s->first;
    if (observer_) observer_->on_prompt(s->index, s->z);
  }
  if (total > 0) {
    const auto prefill = Clock::now();
    const std::vector<int32_t> clean(static_cast<size_t>(total), params_.steps);
    model_.velocity(ctx_, *table_, clean, prefix.data(), rows, nullptr);
    model_.decode(ctx_, prefix.data(), rows, nullptr);
    stats.prefill_seconds += seconds_since(prefill);
  }
  const double seconds = seconds_since(start);
  for (Sequence* s : group) {
    s->result.prompt_tokens = s->tokens();
    if (!ids.empty())
      s->result.prefill_seconds = seconds * static_cast<double>(s->read.size()) / static_cast<double>(ids.size());
    if (callbacks.on_prefill && s->tokens() > 0) callbacks.on_prefill(s->index, s->tokens(), s->tokens());
  }
}

void BlockDiffusionGenerator::start_block(Sequence& s) {
  const ColaConfig& c = model_.config();
  const int64_t d = c.latent_dim(), block = c.dit.block;
  s.position = s.first + s.block * block;
  s.x.resize(static_cast<size_t>(block * d));
  if (params_.noise) {
    const auto noise = params_.noise->get(params_.first_noise + s.index, s.block, block, d);
    std::copy(noise.begin(), noise.end(), s.x.begin());
  } else {
    fill_noise(s.request.sampling.seed, static_cast<uint64_t>(s.block), s.x);
  }
  s.denoises = false;
  for (int64_t i = 0; i < block; ++i) {
    if (s.is_known(s.position + i))
      std::copy_n(s.z.begin() + (s.position + i) * d, d, s.x.begin() + i * d);
    else
      s.denoises = true;
  }
  // Without history both branches are one, and their difference is rounding alone.
  s.guided = params_.guidance != 1.0f && s.position > 0;
}

// Step k of every live sequence, in one pass over the DiT's weights.
void BlockDiffusionGenerator::step(std::span<Sequence* const> live, int k) {
  const ColaConfig& c = model_.config();
  const int64_t d = c.latent_dim(), block = c.dit.block;
  const size_t size = static_cast<size_t>(block * d);
  std::vector<float> x;
  std::vector<int32_t> timestep;
  std::vector<LatentRows> rows;
  std::vector<size_t> cond, uncond;  // where each sequence's block begins in x
  const auto add_block = [&](Sequence& s) {
    x.insert(x.end(), s.x.begin(), s.x.end());
    for (int64_t i = 0; i < block; ++i) timestep.push_back(s.is_known(s.position + i) ? params_.steps : k);
  };
  for (Sequence* s : live) {
    // The block before it, now clean, is committed on the way.
    const auto commit = static_cast<int64_t>(s->pending.size()) / d;
    x.insert(x.end(), s->pending.begin(), s->pending.end());
    timestep.insert(timestep.end(), static_cast<size_t>(commit), params_.steps);
    cond.push_back(x.size());
    add_block(*s);
    rows.push_back({&*s->state, commit + block, commit});
  }
  for (Sequence* s : live) {
    uncond.push_back(x.size());
    if (!s->guided) continue;
    add_block(*s);
    rows.push_back({nullptr, block});
  }
  std::vector<float> v(x.size());
  model_.velocity(ctx_, *table_, timestep, x.data(), rows, v.data());
  const auto all = static_cast<int64_t>(timestep.size());
  const int64_t sweeps = ceil_div(all, ColaModel::kChunkRows);
  stats_.diffusion->sweeps += sweeps;
  stats_.diffusion->rows += all;
  stats_.decode_steps += sweeps;

  const float t = t_[static_cast<size_t>(k)];
  const auto delta = static_cast<float>((static_cast<double>(t) - t_[static_cast<size_t>(k) + 1]) / 1000.0);
  const float to_clean = t / 1000.0f;
  for (size_t i = 0; i < live.size(); ++i) {
    Sequence& s = *live[i];
    s.pending.clear();
    s.v.resize(size);
    s.guess.resize(size);
    const float *v_cond = v.data() + cond[i], *v_uncond = v.data() + uncond[i];
    std::vector<float> before;
    if (observer_) before = s.x;
    for (size_t j = 0; j < size; ++j) {
      s.v[j] = s.guided ? v_uncond[j] + params_.guidance * (v_cond[j] - v_uncond[j]) : v_cond[j];
      if (s.is_known(s.position + static_cast<int64_t>(j) / d)) {
        s.guess[j] = s.x[j];
        continue;
      }
      s.guess[j] = s.x[j] - to_clean * s.v[j];
      s.x[j] -= delta * s.v[j];
    }
    if (observer_)
      observer_->on_step({s.index, s.block, k, before, {v_cond, size}, {v_uncond, s.guided ? size : 0}, s.v, s.x});
  }
}

// The callback's text: the likeliest tokens of the clean latents that each block is heading for.
void BlockDiffusionGenerator::show(std::span<Sequence* const> live, int k, const GenerateCallbacks& callbacks) {
  const ColaConfig& c = model_.config();
  const int64_t tokens = c.block_tokens(), vocab = c.vae.vocab;
  const size_t group = static_cast<size_t>(std::max<int64_t>(1, kLogitRows / tokens));
  for (size_t at = 0; at < live.size(); at += group) {
    const auto part = live.subspan(at, std::min(group, live.size() - at));
    std::vector<float> z;
    std::vector<LatentRows> rows;
    for (Sequence* s : part) {
      z.insert(z.end(), s->guess.begin(), s->guess.end());
      rows.push_back({&*s->state, c.dit.block});
    }
    float* logits = ctx_.activation(ActivationSlot::kLogits, part.size() * static_cast<size_t>(tokens * vocab));
    model_.decode(ctx_, z.data(), rows, logits);
    for (size_t i = 0; i < part.size(); ++i) {
      const Sequence& s = *part[i];
      std::vector<int32_t> ids;
      for (int64_t j = 0; j < tokens; ++j) {
        const int64_t at_token = s.position * c.vae.patch + j - s.tokens();
        if (at_token < 0) continue;
        const bool given = at_token < static_cast<int64_t>(s.request.infill.size()) && s.request.infill[static_cast<size_t>(at_token)] >= 0;
        const float* row = logits + (static_cast<int64_t>(i) * tokens + j) * vocab;
        ids.push_back(given ? s.request.infill[static_cast<size_t>(at_token)] : static_cast<int32_t>(std::max_element(row, row + vocab) - row));
      }
      callbacks.on_denoise(s.index, s.block, k, tokenizer_ ? tokenizer_->decode(ids, !params_.official) : "");
    }
  }
}

void BlockDiffusionGenerator::finish(Sequence& s, FinishReason reason, const GenerateCallbacks& callbacks) {
  if (s.stream) {
    const std::string tail = s.stream->finish();
    if (callbacks.on_text && !tail.empty()) callbacks.on_text(s.index, tail);
    s.result.text = s.stream->text();
  }
  s.result.finish = reason;
  s.result.kv_bytes = s.state->dit.allocated_bytes() + s.state->vae.allocated_bytes();
  s.result.kv_slots = s.state->dit.total_slots() + s.state->vae.total_slots();
  s.state.reset();
  s.done = true;
}

// One token of the result.
void BlockDiffusionGenerator::push(Sequence& s, int32_t id, const GenerateCallbacks& callbacks) {
  s.result.ids.push_back(id);
  ++stats_.decode_tokens;
  if (!s.stream) return;
  const std::string text = s.stream->push(id);
  if (callbacks.on_text && !text.empty()) callbacks.on_text(s.index, text);
}

// Draws a block's tokens from left to right, each with all before it as the penalty's history, as an autoregressive
// model's sampler does. logits: empty if every latent is given.
void BlockDiffusionGenerator::emit(Sequence& s, std::span<float> logits, const GenerateCallbacks& callbacks) {
  const ColaConfig& c = model_.config();
  const auto vocab = static_cast<size_t>(c.vae.vocab);
  const SamplingParams& p = s.request.sampling;
  const auto& infill = s.request.infill;
  for (int64_t j = 0; j < c.block_tokens(); ++j) {
    const int64_t at = s.position * c.vae.patch + j - s.tokens();
    if (at < 0) continue;  // the prompt's
    const bool given = at < static_cast<int64_t>(infill.size()) && infill[static_cast<size_t>(at)] >= 0;
    const int32_t id = given ? infill[static_cast<size_t>(at)] : s.sampler.sample(logits.subspan(static_cast<size_t>(j) * vocab, vocab), s.history);
    if (infill.empty() && !p.ignore_eos && std::find(end_ids_.begin(), end_ids_.end(), id) != end_ids_.end())
      return finish(s, FinishReason::kEndOfText, callbacks);
    s.history.push_back(id);
    push(s, id, callbacks);
    if (s.stream && s.stream->stopped()) return finish(s, FinishReason::kStopString, callbacks);
    if (at + 1 == (infill.empty() ? p.max_new_tokens : static_cast<int64_t>(infill.size())))
      return finish(s, FinishReason::kLength, callbacks);
  }
}

// Every position of the block, the prompt's own among them, is drawn with the same history: the blocks before. What
// stands on the prompt's positions is left out of the result, not of the history.
void BlockDiffusionGenerator::emit_official(Sequence& s, std::span<float> logits, const GenerateCallbacks& callbacks) {
  const ColaConfig& c = model_.config();
  const auto vocab = static_cast<size_t>(c.vae.vocab);
  std::vector<int32_t> ids;
  for (int64_t j = 0; j < c.block_tokens(); ++j)
    ids.push_back(s.sampler.sample(logits.subspan(static_cast<size_t>(j) * vocab, vocab), s.history));
  s.history.insert(s.history.end(), ids.begin(), ids.end());
  for (size_t j = 0; j < ids.size(); ++j) {
    if (!s.request.sampling.ignore_eos && std::find(end_ids_.begin(), end_ids_.end(), ids[j]) != end_ids_.end()) s.ended = true;
    if (s.position * c.vae.patch + static_cast<int64_t>(j) >= s.tokens()) push(s, ids[j], callbacks);
  }
}

// After a block: all have met an end-of-text id, or have enough, or one prompt's open block alone is enough for it.
bool BlockDiffusionGenerator::official_end(std::span<const std::unique_ptr<Sequence>> all) const {
  const ColaConfig& c = model_.config();
  bool ended = true, enough = true;
  for (const auto& s : all) {
    const int64_t latents = ceil_div(s->tokens(), c.vae.patch), open = c.dit.block - latents % c.dit.block;
    if (latents % c.dit.block != 0 && s->request.sampling.max_new_tokens < open) return true;
    ended &= s->ended;
    enough &= s->block * c.block_tokens() >= s->request.sampling.max_new_tokens;
  }
  return ended || enough;
}

// Names the tokens of finished blocks, and remembers their latents.
void BlockDiffusionGenerator::decode(std::span<Sequence* const> live, const GenerateCallbacks& callbacks) {
  const ColaConfig& c = model_.config();
  const int64_t tokens = c.block_tokens();
  const size_t size = static_cast<size_t>(tokens * c.vae.vocab), block = static_cast<size_t>(c.dit.block * c.latent_dim());
  const size_t most = static_cast<size_t>(std::max<int64_t>(1, kLogitRows / tokens));
  for (size_t at = 0; at < live.size();) {
    // A run of sequences that need logits, or that need none.
    size_t end = at + 1;
    while (end < live.size() && end - at < most && live[end]->denoises == live[at]->denoises) ++end;
    const auto group = live.subspan(at, end - at);
    at = end;
    std::vector<float> z;
    std::vector<LatentRows> rows;
    for (Sequence* s : group) {
      z.insert(z.end(), s->x.begin(), s->x.end());
      rows.push_back({&*s->state, c.dit.block, c.dit.block});
    }
    const bool draws = group[0]->denoises;
    float* logits = draws ? ctx_.activation(ActivationSlot::kLogits, group.size() * size) : nullptr;
    model_.decode(ctx_, z.data(), rows, logits);
    for (size_t i = 0; i < group.size(); ++i) {
      Sequence& s = *group[i];
      const std::span<float> own = draws ? std::span<float>(logits + i * size, size) : std::span<float>();
      if (observer_) observer_->on_block(s.index, s.block, {z.data() + i * block, block}, own);
      s.pending.insert(s.pending.end(), s.x.begin(), s.x.end());
      if (params_.official) emit_official(s, own, callbacks);
      else emit(s, own, callbacks);
      ++s.block;
    }
  }
}

std::vector<GenerateResult> BlockDiffusionGenerator::generate(std::span<const GenerateRequest> requests,
                                                              const GenerateCallbacks& callbacks) {
  stats_ = {};
  stats_.diffusion.emplace();
  DiffusionStats& stats = *stats_.diffusion;
  for (const auto& r : requests) check(r, callbacks);
  const auto poll = [&] {
    if (callbacks.cancelled && callbacks.cancelled()) throw Cancelled("stopped after {} tokens", stats_.decode_tokens);
  };
  ctx_.memory.reset_peak(MemoryTag::kKv);
  make_timesteps();
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<Sequence*> group;
  int64_t grouped = 0;
  const auto read = [&] {
    poll();
    if (!group.empty()) read_prompts(group, callbacks);
    group.clear();
    grouped = 0;
  };
  for (size_t i = 0; i < requests.size(); ++i) {
    sequences.push_back(std::make_unique<Sequence>(requests[i], i, model_.new_state(ctx_.memory, kv_), tokenizer_, params_.official));
    Sequence& s = *sequences.back();
    if (!params_.official) s.history = requests[i].prompt;
    s.read = encoder_ids(requests[i]);
    const auto latents = static_cast<int64_t>(s.read.size()) / model_.config().vae.patch;
    if (grouped + latents > ColaModel::kChunkRows) read();
    group.push_back(&s);
    grouped += latents;
  }
  read();

  Ledger ledger(ctx_);
  const auto start = Clock::now();
  std::vector<Sequence*> live, noisy;
  for (;;) {
    live.clear();
    for (auto& s : sequences)
      if (!s->done) live.push_back(s.get());
    if (live.empty()) break;
    noisy.clear();
    for (Sequence* s : live) {
      start_block(*s);
      if (s->denoises) noisy.push_back(s);
    }
    stats.blocks += static_cast<int64_t>(noisy.size());
    for (int k = 0; k < params_.steps && !noisy.empty(); ++k) {
      poll();
      auto from = Clock::now();
      ledger.part = &stats.denoise_ops;
      step(noisy, k);
      stats.denoise_seconds += seconds_since(from);
      from = Clock::now();
      ledger.part = &stats.vae_ops;
      if (callbacks.on_denoise) show(noisy, k, callbacks);
      stats.decode_seconds += seconds_since(from);
    }
    poll();
    const auto from = Clock::now();
    ledger.part = &stats.vae_ops;
    decode(live, callbacks);
    stats.decode_seconds += seconds_since(from);
    if (params_.official && official_end(sequences))
      for (auto& s : sequences) finish(*s, s->ended ? FinishReason::kEndOfText : FinishReason::kLength, callbacks);
  }
  stats_.decode_seconds = seconds_since(start);
  stats_.decode_ops = stats.denoise_ops;
  stats_.decode_ops += stats.vae_ops;
  stats_.kv_peak_bytes = ctx_.memory.peak(MemoryTag::kKv);
  stats_.kv_now_bytes = ctx_.memory.now(MemoryTag::kKv);
  std::vector<GenerateResult> results;
  for (auto& s : sequences) results.push_back(std::move(s->result));
  return results;
}

}  // namespace lacuna

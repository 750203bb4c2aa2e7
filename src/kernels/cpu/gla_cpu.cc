#include "kernels/cpu/gla_cpu.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/gla_ops.h"

namespace lacuna::cpu {
namespace {

// Pieces that a call is cut into if its heads alone are fewer: a few for each core of the machines this is
// run on.
constexpr int64_t kWantedPieces = 16;
// Runs of neighbouring sequences that a batch's steps are cut into at most.
constexpr int64_t kMostRuns = 64;
// Value columns that a cut-off piece of a step has at least: two cache lines of each state row.
constexpr int64_t kStepColumns = 32;
// Prepared query rows of one sequence and KV head, which the panels read one after the other: half of a 1 MB L2.
// Longer segments load and store the state less often, but not beyond so many tokens.
constexpr int64_t kSegmentBytes = 512 << 10;
constexpr int64_t kSegmentTokens = 512;
// Tokens of all sequences prepared together: enough chunks for every core, little enough to stay in L3.
constexpr int64_t kWaveTokens = 512;

int64_t segment_tokens(int group, int dk) {
  const int64_t chunks = kSegmentBytes / (int64_t{4} * kGlaChunk * group * dk);
  return std::clamp<int64_t>(chunks, 1, kSegmentTokens / kGlaChunk) * kGlaChunk;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t floats(int64_t n) { return GlaRecord::round_up(n); }

bool is_step(const GlaSequence& s) { return s.tokens <= kGlaStepTokens; }

[[noreturn]] void refuse_decay(const GlaShape& shape, const GlaSequence& s, int64_t index, int64_t first, int64_t tokens,
                               int head) {
  const int64_t row = int64_t{shape.kv_heads} * shape.key_dim;
  for (int64_t t = first; t < first + tokens; ++t)
    for (int c = 0; c < shape.key_dim; ++c) {
      const float g = s.log_decay[t * row + int64_t{head} * shape.key_dim + c];
      if (!(g <= 0))
        throw BadInput("gated_linear_attention: the log decay of sequence {}, token {}, KV head {}, channel {} is {}; "
                       "expected 0 or less",
                       index, t, head, c, g);
    }
  throw InternalError("gated_linear_attention: a decay was refused, but all are in range");
}

// The sequences of a call that go token by token.
class Steps {
 public:
  Steps(Context& ctx, const GlaOps& ops, const GlaShape& shape, std::span<const GlaSequence> seqs)
      : ctx_(ctx), ops_(ops), shape_(shape), seqs_(seqs), decay_floats_(floats(kGlaStepTokens * shape.key_dim)) {}

  void run() {
    for (int t = 0; t < ctx_.pool.size(); ++t) ctx_.workspace<float>(t, static_cast<size_t>(2 * decay_floats_));
    const int64_t count = static_cast<int64_t>(seqs_.size()), heads = shape_.kv_heads, dv = shape_.value_dim;
    if (count >= kWantedPieces) {
      // Neighbouring states go to one thread, which asks for the next one while it works through this one.
      const int64_t run = ceil_div(count, kMostRuns);
      const auto body = [&](int64_t index, int thread) {
        for (int64_t i = index * run, end = std::min(count, i + run); i < end; ++i)
          for (int64_t h = 0; h < heads; ++h) step(i, h, 0, dv, h + 1 < heads || i + 1 < end, thread);
      };
      ctx_.pool.parallel_for(ceil_div(count, run), std::ref(body));
      return;
    }
    // Columns of a state do not touch each other, so that cutting them changes no bit.
    const int64_t cuts = std::clamp<int64_t>(ceil_div(kWantedPieces, count * heads), 1, std::max<int64_t>(1, dv / kStepColumns));
    const int64_t width = ceil_div(ceil_div(dv, cuts), kStepColumns) * kStepColumns, blocks = ceil_div(dv, width);
    const auto body = [&](int64_t index, int thread) {
      const int64_t first = index % blocks * width;
      step(index / (heads * blocks), index / blocks % heads, first, std::min(width, dv - first), false, thread);
    };
    ctx_.pool.parallel_for(count * heads * blocks, std::ref(body));
  }

 private:
  // The state that follows head `head` of sequence `index` in a run.
  const float* after(int64_t index, int64_t head) const {
    if (head + 1 < shape_.kv_heads)
      return seqs_[static_cast<size_t>(index)].state + (head + 1) * shape_.key_dim * shape_.value_dim;
    const GlaSequence& s = seqs_[static_cast<size_t>(index + 1)];
    return s.tokens > 0 && is_step(s) ? s.state : nullptr;
  }

  void step(int64_t index, int64_t head, int64_t first, int64_t width, bool more, int thread) {
    const GlaSequence& s = seqs_[static_cast<size_t>(index)];
    if (s.tokens == 0 || !is_step(s)) return;
    const int group = shape_.query_heads / shape_.kv_heads, dk = shape_.key_dim;
    const int64_t dv = shape_.value_dim, heads = shape_.kv_heads, ks = heads * dk;
    float* hi = ctx_.workspace<float>(thread, static_cast<size_t>(2 * decay_floats_));
    float* lo = hi + decay_floats_;
    for (int64_t t = 0; t < s.tokens; ++t)
      if (!ops_.decays(s.log_decay + t * ks + head * dk, dk, hi + t * dk, lo + t * dk))
        refuse_decay(shape_, s, index, t, 1, static_cast<int>(head));
    GlaStep step;
    step.q = s.q + head * group * dk;
    step.k = s.k + head * dk;
    step.decay = hi;
    step.decay_rest = lo;
    step.v = s.v + head * dv + first;
    step.out = s.out + head * group * dv + first;
    step.q_stride = int64_t{shape_.query_heads} * dk;
    step.k_stride = ks;
    step.v_stride = heads * dv;
    step.out_stride = int64_t{shape_.query_heads} * dv;
    step.head_stride = dv;
    step.tokens = static_cast<int>(s.tokens);
    step.group = group;
    step.dk = dk;
    step.scale = shape_.scale;
    step.width = width;
    step.state = s.state + head * dk * dv + first;
    step.state_stride = dv;
    step.next = more ? after(index, head) : nullptr;
    ops_.step(step);
  }

  Context& ctx_;
  const GlaOps& ops_;
  const GlaShape& shape_;
  std::span<const GlaSequence> seqs_;
  int64_t decay_floats_;
};

// A part of one sequence: a whole number of chunks, but for the sequence's last.
struct Segment {
  int64_t sequence = 0;
  int64_t first = 0, tokens = 0;
  int64_t chunk = 0;  // index of its first chunk among the wave's
};

int64_t chunks_of(int64_t tokens) { return ceil_div(tokens, kGlaChunk); }

struct Wave {
  std::vector<Segment> segments;
  std::vector<int64_t> owner;  // [chunks] the segment of each
};

// One segment of as many unfinished sequences as make a wave, in order.
Wave next_wave(std::span<const GlaSequence> seqs, int64_t segment, std::vector<int64_t>& done) {
  Wave wave;
  int64_t tokens = 0;
  for (size_t i = 0; i < seqs.size() && tokens < kWaveTokens; ++i) {
    if (is_step(seqs[i]) || done[i] == seqs[i].tokens) continue;
    const int64_t take = std::min(segment, seqs[i].tokens - done[i]);
    wave.segments.push_back({static_cast<int64_t>(i), done[i], take, static_cast<int64_t>(wave.owner.size())});
    wave.owner.resize(wave.owner.size() + static_cast<size_t>(chunks_of(take)),
                      static_cast<int64_t>(wave.segments.size()) - 1);
    done[i] += take;
    tokens += take;
  }
  return wave;
}

class Chunked {
 public:
  Chunked(Context& ctx, const GlaOps& ops, const GlaShape& shape, std::span<const GlaSequence> seqs)
      : ctx_(ctx), ops_(ops), shape_(shape), seqs_(seqs) {
    record_.group = shape.query_heads / shape.kv_heads;
    record_.dk = shape.key_dim;
  }

  void run() {
    std::vector<int64_t> done(seqs_.size(), 0);
    const int64_t segment = segment_tokens(record_.group, record_.dk);
    const int64_t work = std::max(record_.workspace(), panel_floats());
    for (;;) {
      const Wave wave = next_wave(seqs_, segment, done);
      if (wave.segments.empty()) return;
      const int64_t heads = shape_.kv_heads, chunks = static_cast<int64_t>(wave.owner.size());
      records_ = ctx_.workspace<float>(ctx_.shared_slot(), static_cast<size_t>(chunks * heads * record_.size()));
      for (int t = 0; t < ctx_.pool.size(); ++t) ctx_.workspace<float>(t, static_cast<size_t>(work));
      ctx_.pool.parallel_for(chunks * heads, [&](int64_t index, int thread) {
        prepare(wave, index / heads, index % heads, ctx_.workspace<float>(thread, static_cast<size_t>(work)));
      });
      const int64_t panels = ceil_div(shape_.value_dim, ops_.panel);
      ctx_.pool.parallel_for(static_cast<int64_t>(wave.segments.size()) * heads * panels, [&](int64_t index, int thread) {
        run_panel(wave.segments[static_cast<size_t>(index / (heads * panels))], index / panels % heads,
                  index % panels * ops_.panel, ctx_.workspace<float>(thread, static_cast<size_t>(work)));
      });
    }
  }

 private:
  int64_t panel_floats() const { return int64_t{shape_.key_dim + kGlaChunk} * ops_.panel; }
  float* record(int64_t chunk, int64_t head) const { return records_ + (chunk * shape_.kv_heads + head) * record_.size(); }

  void prepare(const Wave& wave, int64_t index, int64_t head, float* workspace) {
    const Segment& segment = wave.segments[static_cast<size_t>(wave.owner[static_cast<size_t>(index)])];
    const GlaSequence& s = seqs_[static_cast<size_t>(segment.sequence)];
    const int64_t dk = shape_.key_dim, qs = shape_.query_heads * dk, ks = shape_.kv_heads * dk;
    const int64_t first = segment.first + (index - segment.chunk) * kGlaChunk;
    GlaChunk c;
    c.q = s.q + first * qs + head * record_.group * dk;
    c.k = s.k + first * ks + head * dk;
    c.log_decay = s.log_decay + first * ks + head * dk;
    c.q_stride = qs;
    c.k_stride = ks;
    c.tokens = static_cast<int>(std::min<int64_t>(kGlaChunk, segment.first + segment.tokens - first));
    c.scale = shape_.scale;
    c.shape = record_;
    if (!ops_.prepare(c, record(index, head), workspace))
      refuse_decay(shape_, s, segment.sequence, first, c.tokens, static_cast<int>(head));
  }

  // All chunks of a segment against columns [first, first + panel) of one head's state, which stay in L1.
  void run_panel(const Segment& segment, int64_t head, int64_t first, float* workspace) {
    const GlaSequence& s = seqs_[static_cast<size_t>(segment.sequence)];
    const int64_t dk = shape_.key_dim, dv = shape_.value_dim, vs = shape_.kv_heads * dv, os = shape_.query_heads * dv;
    const int64_t width = std::min<int64_t>(ops_.panel, dv - first);
    float* state = s.state + head * dk * dv + first;
    GlaPanel p;
    p.shape = record_;
    p.v_stride = vs;
    p.out_stride = os;
    p.head_stride = dv;
    p.width = static_cast<int>(width);
    p.state = workspace;
    p.values = workspace + dk * ops_.panel;
    for (int64_t c = 0; c < dk; ++c) {
      std::copy_n(state + c * dv, width, p.state + c * ops_.panel);
      std::fill(p.state + c * ops_.panel + width, p.state + (c + 1) * ops_.panel, 0.0f);
    }
    for (int64_t i = 0; i < chunks_of(segment.tokens); ++i) {
      const int64_t token = segment.first + i * kGlaChunk;
      p.record = record(segment.chunk + i, head);
      p.tokens = static_cast<int>(std::min<int64_t>(kGlaChunk, segment.first + segment.tokens - token));
      p.v = s.v + token * vs + head * dv + first;
      p.out = s.out + token * os + head * record_.group * dv + first;
      ops_.panel_chunk(p);
    }
    for (int64_t c = 0; c < dk; ++c) std::copy_n(p.state + c * ops_.panel, width, state + c * dv);
  }

  Context& ctx_;
  const GlaOps& ops_;
  const GlaShape& shape_;
  std::span<const GlaSequence> seqs_;
  GlaRecord record_;
  float* records_ = nullptr;
};

}  // namespace

void gated_linear_attention(Context& ctx, const GlaShape& shape, std::span<const GlaSequence> seqs) {
  const GlaOps& ops = gla_ops(cpu_isa());
  bool any_step = false, any_chunk = false;
  for (const GlaSequence& s : seqs) {
    any_step = any_step || (s.tokens > 0 && is_step(s));
    any_chunk = any_chunk || !is_step(s);
  }
  if (any_step) Steps(ctx, ops, shape, seqs).run();
  if (any_chunk) Chunked(ctx, ops, shape, seqs).run();
}

int64_t gla_macs(const GlaShape& shape, int64_t tokens) {
  const int64_t dk = shape.key_dim, dv = shape.value_dim;
  int64_t macs = tokens * (shape.kv_heads + shape.query_heads) * dk * dv;
  if (tokens <= kGlaStepTokens) return macs;
  const auto triangle = [](int64_t n) { return n * (n + 1) / 2; };
  const int64_t pairs = tokens / kGlaChunk * triangle(kGlaChunk) + triangle(tokens % kGlaChunk);
  return macs + pairs * shape.query_heads * (dk + dv);
}

}  // namespace lacuna::cpu

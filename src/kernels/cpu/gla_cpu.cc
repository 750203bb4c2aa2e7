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
  // What follows head `head` of sequence `index` in a run.
  void ask_after(GlaStep& step, int64_t index, int64_t head) const {
    if (++head == shape_.kv_heads) {
      head = 0;
      ++index;
    }
    const GlaSequence& s = seqs_[static_cast<size_t>(index)];
    if (s.tokens == 0 || !is_step(s)) return;
    const int64_t dk = shape_.key_dim, dv = shape_.value_dim, group = shape_.query_heads / shape_.kv_heads;
    step.next = s.state + head * dk * dv;
    step.next_rows[0] = {s.log_decay + head * dk, dk};
    step.next_rows[1] = {s.k + head * dk, dk};
    step.next_rows[2] = {s.v + head * dv, dv};
    step.next_rows[3] = {s.q + head * group * dk, group * dk};
    step.next_rows[4] = {s.out + head * group * dv, group * dv};
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
    if (more) ask_after(step, index, head);
    ops_.step(step);
  }

  Context& ctx_;
  const GlaOps& ops_;
  const GlaShape& shape_;
  std::span<const GlaSequence> seqs_;
  int64_t decay_floats_;
};

// The sequences of a call that go in chunks. A piece of work is one sequence, one KV head and some columns of its
// state: what a thread prepares it uses up at once, and the state stays with it from the first token to the last.
class Chunked {
 public:
  Chunked(Context& ctx, const GlaOps& ops, const GlaShape& shape, std::span<const GlaSequence> seqs)
      : ctx_(ctx), ops_(ops), shape_(shape), seqs_(seqs) {
    for (size_t i = 0; i < seqs.size(); ++i)
      if (!is_step(seqs[i])) chunked_.push_back(i);
    record_.group = shape.query_heads / shape.kv_heads;
    record_.dk = shape.key_dim;
  }

  void run() {
    // Columns of a state do not touch each other, so that cutting them changes no bit. Each cut prepares the chunks
    // again: only where heads alone would not keep the threads evenly busy.
    const int64_t panels = ceil_div(shape_.value_dim, ops_.panel), threads = ctx_.pool.size();
    const int64_t heads = static_cast<int64_t>(chunked_.size()) * shape_.kv_heads;
    int64_t cuts = 1;
    while (cuts < panels && heads * cuts % threads != 0 && heads * cuts < 4 * threads) cuts *= 2;
    columns_ = ceil_div(panels, cuts) * ops_.panel;
    cuts_ = ceil_div(shape_.value_dim, columns_);
    pieces_ = heads * cuts_;
    for (int t = 0; t < threads; ++t) workspace(t);
    const auto body = [&](int64_t index, int thread) { run_piece(index, workspace(thread)); };
    ctx_.pool.parallel_runs(pieces_, std::ref(body));
  }

 private:
  struct Piece {
    size_t sequence = 0;
    int64_t head = 0, first = 0, width = 0;  // value columns [first, first + width)
  };

  Piece piece(int64_t index) const {
    Piece p;
    p.sequence = chunked_[static_cast<size_t>(index / (shape_.kv_heads * cuts_))];
    p.head = index / cuts_ % shape_.kv_heads;
    p.first = index % cuts_ * columns_;
    p.width = std::min(columns_, shape_.value_dim - p.first);
    return p;
  }

  GlaChunk chunk_of(const Piece& p, int64_t token) const {
    const GlaSequence& s = seqs_[p.sequence];
    const int64_t dk = shape_.key_dim, dv = shape_.value_dim, heads = shape_.kv_heads;
    GlaChunk c;
    c.q_stride = shape_.query_heads * dk;
    c.k_stride = heads * dk;
    c.v_stride = heads * dv;
    c.out_stride = shape_.query_heads * dv;
    c.head_stride = dv;
    c.q = s.q + token * c.q_stride + p.head * record_.group * dk;
    c.k = s.k + token * c.k_stride + p.head * dk;
    c.log_decay = s.log_decay + token * c.k_stride + p.head * dk;
    c.v = s.v + token * c.v_stride + p.head * dv + p.first;
    c.out = s.out + token * c.out_stride + p.head * record_.group * dv + p.first;
    c.width = p.width;
    c.tokens = static_cast<int>(std::min<int64_t>(kGlaChunk, s.tokens - token));
    c.scale = shape_.scale;
    c.shape = record_;
    return c;
  }

  int64_t state_floats() const { return floats(shape_.key_dim * columns_); }
  // A piece's state, a prepared chunk, and room for what the bodies need.
  float* workspace(int thread) {
    const int64_t body = std::max(record_.workspace(), int64_t{kGlaChunk} * ops_.panel);
    return ctx_.workspace<float>(thread, static_cast<size_t>(state_floats() + record_.size() + body));
  }

  void run_piece(int64_t index, float* state) {
    const Piece p = piece(index);
    const GlaSequence& s = seqs_[p.sequence];
    const int64_t dk = shape_.key_dim, dv = shape_.value_dim, panel = ops_.panel;
    float* record = state + state_floats();
    float* room = record + record_.size();
    float* from = s.state + p.head * dk * dv + p.first;
    for (int64_t c = 0; c < dk; ++c)
      for (int64_t column = 0; column < p.width; column += panel) {
        float* to = state + column * dk + c * panel;
        const int64_t width = std::min(panel, p.width - column);
        std::copy_n(from + c * dv + column, width, to);
        std::fill(to + width, to + panel, 0.0f);
      }

    GlaChunk chunk = chunk_of(p, 0), next = chunk;
    for (int64_t token = 0; token < s.tokens; token += kGlaChunk, chunk = next) {
      if (token + kGlaChunk < s.tokens)
        next = chunk_of(p, token + kGlaChunk);
      else if (index + 1 < pieces_)
        next = chunk_of(piece(index + 1), 0);
      if (!ops_.prepare(chunk, record, room))
        refuse_decay(shape_, s, static_cast<int64_t>(p.sequence), token, chunk.tokens, static_cast<int>(p.head));
      ops_.use(chunk, record, next, state, room);
    }

    for (int64_t c = 0; c < dk; ++c)
      for (int64_t column = 0; column < p.width; column += panel)
        std::copy_n(state + column * dk + c * panel, std::min(panel, p.width - column), from + c * dv + column);
  }

  Context& ctx_;
  const GlaOps& ops_;
  const GlaShape& shape_;
  std::span<const GlaSequence> seqs_;
  std::vector<size_t> chunked_;  // the sequences' indices
  GlaRecord record_;
  int64_t columns_ = 0, cuts_ = 0, pieces_ = 0;
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

// The vector bodies of gated linear attention, one table for each ISA level. The driver (gla_cpu.cc)
// holds the loops over sequences, heads, chunks and value panels and is compiled once.
//
// The chunked form works on chunks of kGlaChunk tokens. With P_i the product of the decays of tokens
// 0 … i of the chunk and P_ij that of tokens j + 1 … i, for each KV head
//   out_i = (scale * q_i P_i)^T S + sum over j <= i of A_ij v_j,  A_ij = scale * sum over c of q_ic P_ij,c k_jc
//   S     = P_last S + sum over j of (k_j P_last,j) v_j^T
// Only products of decays occur, each in [0, 1]: nothing overflows however fast a channel forgets, and a
// decay of 0 is as good as any. Sixteen tokens are one vector of keys, so that A comes from one pass that
// decays the keys in place, with no exponential a pair. Longer chunks would only add to A: at d = 128 and
// 7 query heads a token costs 145, 160, 188 thousand multiply-adds with chunks of 16, 32, 64.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"

namespace lacuna::cpu {

inline constexpr int kGlaChunk = 16;

// Where the prepared operands of one chunk and KV head lie, in floats from the start of its record.
struct GlaRecord {
  int group = 1, dk = 0;
  int64_t q() const { return 0; }                                             // [16 * group, dk], token-major
  int64_t a() const { return round_up(int64_t{kGlaChunk} * group * dk); }     // [16 * group, 16]
  int64_t k() const { return a() + int64_t{kGlaChunk} * group * kGlaChunk; }  // [dk, 16]
  int64_t decay() const { return k() + round_up(int64_t{kGlaChunk} * dk); }   // [dk], and what f32 drops of it
  int64_t decay_rest() const { return decay() + round_up(dk); }               // [dk]
  int64_t size() const { return decay_rest() + round_up(dk); }
  // Room for alpha [16, dk] and the sum of the log decays [dk].
  int64_t workspace() const { return round_up(int64_t{kGlaChunk} * dk) + round_up(dk); }
  static int64_t round_up(int64_t x) { return (x + 15) / 16 * 16; }
};

// One chunk of one KV head, as the caller holds it.
struct GlaChunk {
  const float* q = nullptr;          // [tokens] rows q_stride apart; heads of the group dk apart
  const float* k = nullptr;          // [tokens, dk] rows k_stride apart
  const float* log_decay = nullptr;  // as k
  const float* v = nullptr;          // [tokens] rows v_stride apart
  float* out = nullptr;              // [tokens] rows out_stride apart; heads of the group head_stride apart
  int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0, head_stride = 0;
  int tokens = 0;     // 1 … kGlaChunk
  int64_t width = 0;  // value columns
  float scale = 0;
  GlaRecord shape;
};

// A few tokens of one KV head, token by token, over value columns [0, width).
struct GlaStep {
  const float* q = nullptr;           // [tokens] rows q_stride apart; heads of the group dk apart
  const float* k = nullptr;           // [tokens] rows k_stride apart
  const float* decay = nullptr;       // [tokens, dk] dense, from decays()
  const float* decay_rest = nullptr;  // as decay
  const float* v = nullptr;
  float* out = nullptr;
  int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0, head_stride = 0;
  int tokens = 0, group = 1, dk = 0;
  float scale = 0;
  int64_t width = 0;
  float* state = nullptr;  // rows state_stride apart, updated in place
  int64_t state_stride = 0;
  // As much memory as this state's columns take, which will be read next (null: unknown), and the rows of its first
  // token: asked for evenly while this state is worked through.
  const float* next = nullptr;
  struct Rows {
    const float* at = nullptr;
    int64_t floats = 0;
  };
  Rows next_rows[5];
};

struct GlaOps {
  int panel;  // value columns of a panel
  // exp(x) of n log decays as decay + rest: what f32 drops of a decay near 1 adds up over a long memory. False if
  // one is not <= 0.
  bool (*decays)(const float* x, int64_t n, float* decay, float* rest);
  // Fills the chunk's record. False if a log decay is not <= 0.
  bool (*prepare)(const GlaChunk& chunk, float* record, float* workspace);
  // Outputs and state of a prepared chunk. state: [width / panel, dk, panel], 64-byte aligned, zero beyond width.
  // values: room for [kGlaChunk, panel]. The rows of `next` are asked for meanwhile.
  void (*use)(const GlaChunk& chunk, const float* record, const GlaChunk& next, float* state, float* values);
  void (*step)(const GlaStep& step);
};

const GlaOps& gla_ops_portable();
#if defined(__x86_64__)
const GlaOps& gla_ops_avx2();
const GlaOps& gla_ops_avx512();
#endif
const GlaOps& gla_ops(Isa isa);

}  // namespace lacuna::cpu

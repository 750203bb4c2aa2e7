#pragma once

#include <span>

#include "kernels/context.h"

namespace lacuna {

// Gated linear attention (Yang et al. 2023, arXiv 2312.06635, with a state for each KV head):
//   S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t
// decay first, then the token's own outer product, then the read. Query heads h of a group share k, v,
// g and therefore the state of KV head h / (H / G).
struct GlaShape {
  int query_heads = 0;  // H
  int kv_heads = 0;     // G, divides H
  int key_dim = 0;      // dk
  int value_dim = 0;    // dv
  float scale = 0;      // usually 1/sqrt(dk)
};

// One sequence's share of a call: T new tokens, dense rows.
struct GlaSequence {
  const float* q = nullptr;         // [T, H, dk]
  const float* k = nullptr;         // [T, G, dk]
  const float* v = nullptr;         // [T, G, dv]
  const float* log_decay = nullptr;  // g [T, G, dk], each <= 0; -inf forgets the channel
  float* out = nullptr;             // [T, H, dv]
  int64_t tokens = 0;               // T
  float* state = nullptr;           // S [G, dk, dv], rows are key channels; read, and left as after the last token
};

// One call serves prefill chunks (large T: chunked form on matrix products), decode (T = 1, many
// sequences: recurrent form at memory speed) and continuation. State and accumulation in f32. Splitting
// a sequence over calls changes results by rounding only; other sequences and the number of threads
// change nothing. out must not overlap the inputs. Throws BadInput for a log decay that is NaN or above 0,
// naming it; the states of that call are then undefined.
void gated_linear_attention(Context& ctx, const GlaShape& shape, std::span<const GlaSequence> sequences);

}  // namespace lacuna

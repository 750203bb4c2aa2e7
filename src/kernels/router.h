#pragma once

#include "kernels/context.h"

namespace lacuna {

// How a mixture-of-experts layer turns router logits into weights.
enum class RouterGate : uint8_t { kSoftmax, kSigmoid };

struct RouterShape {
  int64_t hidden = 0;  // D
  int experts = 0;     // E
  int top_k = 0;       // 1 … E
  RouterGate gate = RouterGate::kSoftmax;
};

// The experts of each token: expert [m, k], highest logit first, equal logits by lower index, and their
// weights p [m, k] = gate(W x) of those experts, softmax over all E; never renormalised over the chosen k.
// W [E, D] is f32 and x [m, D] is used as it is, whatever ctx.activations says: which expert runs is a
// decision, and half a unit of bf16 can turn it (Fedus et al. 2021, arXiv 2101.03961, 2.4, keep the router
// in f32 for the same reason). Products are summed in double, so a token's choice does not depend on the
// other tokens, the number of threads or the instruction set. A NaN logit counts as the lowest.
void route(Context& ctx, const RouterShape& shape, const float* weight, const float* x, int64_t m, int32_t* expert,
           float* p);

// out[i, :] = x[token[i], :] for the `count` tokens of expert `expert`: the start of an expert's body, reported
// as OpKind::kExpert with m = count, n = expert. x [rows, D], out [count, D].
void gather_expert(Context& ctx, int expert, const float* x, int64_t rows, int64_t d, const int32_t* token,
                   int64_t count, float* out);

// out[token[i], :] += p[i] * y[i, :]. y [count, D], out [rows, D]; no token may occur twice.
void scatter_expert(Context& ctx, const float* y, int64_t count, int64_t d, const int32_t* token, const float* p,
                    int64_t rows, float* out);

}  // namespace lacuna

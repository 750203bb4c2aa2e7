// Gated linear attention on the CPU: what gla.cc calls once it has checked the operands.
#pragma once

#include "kernels/gla.h"

namespace lacuna::cpu {

// A sequence of up to so many tokens goes through its state token by token, more go in chunks.
// The two take the same time at 7 tokens, from memory at 6 or 7 (bench/NOTES-gla.md).
inline constexpr int64_t kGlaStepTokens = 6;

void gated_linear_attention(Context& ctx, const GlaShape& shape, std::span<const GlaSequence> seqs);

// Multiply-adds that the form chosen for T tokens executes: outer products, reads, and attention inside
// chunks (its lower triangles).
int64_t gla_macs(const GlaShape& shape, int64_t tokens);

}  // namespace lacuna::cpu

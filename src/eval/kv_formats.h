#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "cache/kv_cache.h"

namespace lacuna {

// Quantised KV caches to set beside eviction at the same bytes. They are simulated: the values of an
// f32 or bf16 cache are replaced by what the format could represent, and the bytes are those the
// format would need. Tokens generated afterwards stay as they are.
//   int8        a scale per token and head, as the engine's own --kv-dtype int8 (bit for bit the same values)
//   int4, int3, int2   asymmetric, scale and minimum in f16, groups of 32: keys along 32 tokens of one
//               channel, values along 32 channels of one token (KIVI, Liu et al. 2024, arXiv 2402.02750)
enum class KvFormat : uint8_t { kNative, kInt8, kInt4, kInt3, kInt2 };

KvFormat parse_kv_format(std::string_view name);  // BadInput that lists the names
std::string_view kv_format_name(KvFormat format);  // "" for kNative

// Rounds every cached key and value to what `format` can hold. Needs an f32 or bf16 cache.
void round_to_format(KvCache& cache, KvFormat format);

// Bytes the cache's slots need in this format: codes, scales and minima, positions; no padding.
size_t format_bytes(const KvCache& cache, KvFormat format);

}  // namespace lacuna

#include "models/rope_table.h"

#include <algorithm>
#include <cmath>

namespace lacuna {

RopeTable::RopeTable(const RopeConfig& config, int head_dim, int64_t max_position)
    : config_(config),
      head_dim_(head_dim),
      max_position_(max_position),
      base_(rope_frequencies(config, head_dim, max_position, 0)) {}

void RopeTable::fill(const RopeFrequencies& f, int64_t first, int64_t count, float* cos, float* sin) {
  const size_t half = f.inv_freq.size();
  for (int64_t i = 0; i < count; ++i)
    for (size_t j = 0; j < half; ++j) {
      const float angle = static_cast<float>(first + i) * f.inv_freq[j];
      cos[static_cast<size_t>(i) * half + j] = static_cast<float>(std::cos(static_cast<double>(angle))) * f.attention_factor;
      sin[static_cast<size_t>(i) * half + j] = static_cast<float>(std::sin(static_cast<double>(angle))) * f.attention_factor;
    }
}

const float* RopeTable::block(Context& ctx, int64_t index) {
  const auto found = blocks_.find(index);
  if (found != blocks_.end()) return found->second.as<float>();
  const int64_t half = head_dim_ / 2;
  Buffer made(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(2 * kBlock * half) * sizeof(float));
  float *cos = made.as<float>(), *sin = cos + kBlock * half;
  constexpr int64_t kPiece = 64;
  ctx.pool.parallel_for(kBlock / kPiece, [&](int64_t piece, int) {
    const int64_t at = piece * kPiece;
    fill(base_, index * kBlock + at, kPiece, cos + at * half, sin + at * half);
  });
  return blocks_.emplace(index, std::move(made)).first->second.as<float>();
}

RopeTable::Rows RopeTable::rows(Context& ctx, int64_t first, int64_t count, int64_t sequence_length) {
  const int64_t half = head_dim_ / 2;
  const bool scaled = config_.type == RopeType::kDynamic && sequence_length > max_position_;
  if (!scaled && first % kBlock + count <= kBlock) {
    const float* cos = block(ctx, first / kBlock) + first % kBlock * half;
    return {cos, cos + kBlock * half};
  }
  gathered_.ensure(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(2 * count * half) * sizeof(float));
  float *cos = gathered_.as<float>(), *sin = cos + count * half;
  const Rows all{cos, sin};
  if (scaled) {
    fill(rope_frequencies(config_, head_dim_, max_position_, sequence_length), first, count, cos, sin);
    return all;
  }
  for (const int64_t end = first + count; first < end;) {
    const int64_t offset = first % kBlock, rows = std::min(kBlock - offset, end - first);
    const float* from = block(ctx, first / kBlock) + offset * half;
    cos = std::copy_n(from, rows * half, cos);
    sin = std::copy_n(from + kBlock * half, rows * half, sin);
    first += rows;
  }
  return all;
}

}  // namespace lacuna

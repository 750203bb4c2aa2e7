#include "models/rope_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

void RopeTable::grow(Context& ctx, int64_t positions) {
  // Doubling keeps the work per new position constant.
  const int64_t size = std::max<int64_t>({positions, 2 * filled_, 1024});
  const size_t half = static_cast<size_t>(head_dim_) / 2;
  Buffer cos(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(size) * half * sizeof(float));
  Buffer sin(ctx.memory, MemoryTag::kActivations, static_cast<size_t>(size) * half * sizeof(float));
  const size_t have = static_cast<size_t>(filled_) * half;
  if (have) {
    std::memcpy(cos.as<float>(), cos_.as<float>(), have * sizeof(float));
    std::memcpy(sin.as<float>(), sin_.as<float>(), have * sizeof(float));
  }
  constexpr int64_t kPiece = 256;
  const int64_t fresh = size - filled_;
  ctx.pool.parallel_for((fresh + kPiece - 1) / kPiece, [&](int64_t piece, int) {
    const int64_t first = filled_ + piece * kPiece;
    const size_t at = static_cast<size_t>(first) * half;
    fill(base_, first, std::min(kPiece, size - first), cos.as<float>() + at, sin.as<float>() + at);
  });
  cos_ = std::move(cos);
  sin_ = std::move(sin);
  filled_ = size;
}

RopeTable::Rows RopeTable::rows(Context& ctx, int64_t first, int64_t count, int64_t sequence_length) {
  const size_t half = static_cast<size_t>(head_dim_) / 2;
  if (config_.type == RopeType::kDynamic && sequence_length > max_position_) {
    const RopeFrequencies scaled = rope_frequencies(config_, head_dim_, max_position_, sequence_length);
    const size_t elements = static_cast<size_t>(count) * half;
    far_.ensure(ctx.memory, MemoryTag::kActivations, 2 * elements * sizeof(float));
    fill(scaled, first, count, far_.as<float>(), far_.as<float>() + elements);
    return {far_.as<float>(), far_.as<float>() + elements};
  }
  if (first + count > filled_) grow(ctx, first + count);
  const size_t at = static_cast<size_t>(first) * half;
  return {cos_.as<float>() + at, sin_.as<float>() + at};
}

}  // namespace lacuna

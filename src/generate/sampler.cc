#include "generate/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace lacuna {
namespace {

// The first of the largest logits; NaNs are none. Sixteen maxima side by side, since one would be a chain of as many
// comparisons as there are logits, and the place is looked for in one stretch only.
size_t argmax(std::span<const float> logits) {
  constexpr size_t kSide = 16, kStretch = 256;
  size_t best = 0, end = logits.size();
  float top = -INFINITY;
  for (size_t at = 0; at + kStretch <= logits.size(); at += kStretch) {
    float most[kSide];
    std::fill_n(most, kSide, -INFINITY);
    for (size_t i = 0; i < kStretch; i += kSide)
      for (size_t j = 0; j < kSide; ++j) most[j] = logits[at + i + j] > most[j] ? logits[at + i + j] : most[j];
    for (const float x : most)
      if (x > top) {
        top = x;
        best = at;
      }
  }
  if (top > -INFINITY) {
    const size_t rest = logits.size() / kStretch * kStretch;
    const auto larger = [top](float x) { return x > top; };
    if (std::any_of(logits.begin() + static_cast<std::ptrdiff_t>(rest), logits.end(), larger))
      best = rest;
    else
      end = best + kStretch;
  }
  while (best + 1 < end && std::isnan(logits[best])) ++best;
  for (size_t i = best + 1; i < end; ++i)
    if (logits[i] > logits[best]) best = i;
  return best;
}

}  // namespace

Sampler::Sampler(const SamplingParams& params) : params_(params), rng_(params.seed) { validate(params); }

// SplitMix64 (Steele, Lea, Flood 2014): tiny, and the same on every platform, unlike std::
// distributions.
double Sampler::uniform() {
  uint64_t z = (rng_ += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

void Sampler::penalise(std::span<float> logits, std::span<const int32_t> history) {
  if (params_.repetition_penalty == 1.0f) return;
  seen_.assign(logits.size(), 0);
  for (int32_t id : history) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size() || seen_[static_cast<size_t>(id)]) continue;
    seen_[static_cast<size_t>(id)] = 1;
    float& x = logits[static_cast<size_t>(id)];
    x = x > 0 ? x / params_.repetition_penalty : x * params_.repetition_penalty;
  }
}

void Sampler::filter(std::span<const float> logits) {
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if (!std::isnan(logits[i]) && logits[i] > -INFINITY)
      candidates_.push_back({logits[i] / params_.temperature, static_cast<int32_t>(i)});
  if (candidates_.empty()) throw InternalError("sampling: no finite logit among {}", logits.size());
  const auto greater = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  };
  if (params_.top_k > 0 && static_cast<size_t>(params_.top_k) < candidates_.size()) {
    std::partial_sort(candidates_.begin(), candidates_.begin() + params_.top_k, candidates_.end(), greater);
    candidates_.resize(static_cast<size_t>(params_.top_k));
  } else {
    std::sort(candidates_.begin(), candidates_.end(), greater);
  }
  const double top = candidates_.front().logit;
  weights_.resize(candidates_.size());
  double total = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) total += weights_[i] = std::exp(candidates_[i].logit - top);
  size_t keep = candidates_.size();
  if (params_.top_p < 1.0f) {
    // The smallest set whose mass reaches top_p; at least one.
    double mass = 0;
    for (keep = 0; keep < weights_.size() && mass < params_.top_p * total;) mass += weights_[keep++];
    keep = std::max<size_t>(keep, 1);
  }
  if (params_.min_p > 0)
    while (keep > 1 && weights_[keep - 1] < params_.min_p * weights_[0]) --keep;
  candidates_.resize(keep);
  weights_.resize(keep);
}

int32_t Sampler::sample(std::span<float> logits, std::span<const int32_t> history) {
  penalise(logits, history);
  if (params_.temperature == 0) return static_cast<int32_t>(argmax(logits));
  filter(logits);
  double total = 0;
  for (double w : weights_) total += w;
  double draw = uniform() * total;
  for (size_t i = 0; i < weights_.size(); ++i)
    if ((draw -= weights_[i]) < 0) return candidates_[i].id;
  return candidates_.back().id;
}

std::vector<double> Sampler::probabilities(std::span<float> logits, std::span<const int32_t> history) {
  penalise(logits, history);
  std::vector<double> p(logits.size(), 0.0);
  if (params_.temperature == 0) {
    p[argmax(logits)] = 1.0;
    return p;
  }
  filter(logits);
  double total = 0;
  for (double w : weights_) total += w;
  for (size_t i = 0; i < weights_.size(); ++i) p[static_cast<size_t>(candidates_[i].id)] = weights_[i] / total;
  return p;
}

}  // namespace lacuna

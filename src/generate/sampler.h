// generate: one Generator interface; sampling and the loops behind it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "formats/sampling_params.h"

namespace lacuna {

// Draws token ids from logits. The order of the steps is Hugging Face's: repetition penalty,
// temperature, top-k, top-p, min-p, then one draw. Temperature 0 is greedy (lowest id among ties).
// Same seed and same logits give the same ids on every machine.
class Sampler {
 public:
  // Throws BadInput for parameters out of range.
  explicit Sampler(const SamplingParams& params);

  // history: prompt and generated ids, for the repetition penalty. logits [V] are changed in place.
  int32_t sample(std::span<float> logits, std::span<const int32_t> history);

  // The probabilities the next draw would use, over all V entries (0 where filtered out).
  std::vector<double> probabilities(std::span<float> logits, std::span<const int32_t> history);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  void penalise(std::span<float> logits, std::span<const int32_t> history);
  void filter(std::span<const float> logits);  // fills candidates_ and weights_
  double uniform();                            // [0, 1)

  SamplingParams params_;
  uint64_t rng_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
  std::vector<uint8_t> seen_;
};

}  // namespace lacuna

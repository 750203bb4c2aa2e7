#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

#include "formats/safetensors.h"

namespace lacuna {

// Standard normal values by number, not by turn: Philox 4x32-10 (Salmon et al., SC 2011; key = seed, counter =
// (element / 4, block)) and Box–Muller. So a block's noise depends on nothing but (seed, block): not on the batch, the
// threads or what was drawn before.
void fill_noise(uint64_t seed, uint64_t block, std::span<float> out);

// Noise made elsewhere: tensor `noise` F32 [sequences, blocks, block, latent_dim] of a safetensors file, values finite.
// CorruptData names file and tensor.
class NoiseFile {
 public:
  explicit NoiseFile(const std::filesystem::path& path);
  // [block, latent_dim] of one sequence's block. BadInput for what the file does not hold, or another shape.
  std::span<const float> get(size_t sequence, int64_t block, int64_t rows, int64_t latent_dim) const;

 private:
  SafetensorsFile file_;
  Tensor noise_;
};

}  // namespace lacuna

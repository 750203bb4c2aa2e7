#include "generate/noise.h"

#include <array>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace lacuna {
namespace {

using Counter = std::array<uint32_t, 4>;

Counter philox(Counter c, uint64_t seed) {
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

}  // namespace

void fill_noise(uint64_t seed, uint64_t block, std::span<float> out) {
  for (size_t i = 0; i < out.size(); i += 4) {
    const uint64_t group = i / 4;
    const Counter bits = philox({static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), static_cast<uint32_t>(block),
                                 static_cast<uint32_t>(block >> 32)}, seed);
    for (size_t pair = 0; pair < 2; ++pair) {
      // (0, 1], so that the logarithm is finite.
      const double radius = std::sqrt(-2 * std::log((bits[2 * pair] + 1.0) * 0x1p-32));
      const double angle = 2 * std::numbers::pi * (bits[2 * pair + 1] * 0x1p-32);
      const size_t at = i + 2 * pair;
      if (at < out.size()) out[at] = static_cast<float>(radius * std::cos(angle));
      if (at + 1 < out.size()) out[at + 1] = static_cast<float>(radius * std::sin(angle));
    }
  }
}

NoiseFile::NoiseFile(const std::filesystem::path& path) : file_(path), noise_(file_.get("noise")) {
  if (noise_.dtype != DType::kF32 || noise_.rank != 4)
    throw CorruptData("{}: tensor noise: found {} with {} dimensions, expected F32 [sequences, blocks, block, latent_dim]",
                      file_.name(), dtype_name(noise_.dtype), noise_.rank);
  check_finite(noise_, "noise", path);
}

std::span<const float> NoiseFile::get(size_t sequence, int64_t block, int64_t rows, int64_t latent_dim) const {
  const auto& shape = noise_.shape;
  if (shape[2] != rows || shape[3] != latent_dim)
    throw BadInput("{}: tensor noise: found blocks of [{}, {}], expected [{}, {}]", file_.name(), shape[2], shape[3], rows, latent_dim);
  if (sequence >= static_cast<size_t>(shape[0]) || block < 0 || block >= shape[1])
    throw BadInput("{}: tensor noise holds {} sequences of {} blocks; sequence {} needs block {}", file_.name(), shape[0], shape[1],
                   sequence, block);
  const auto size = static_cast<size_t>(rows * latent_dim);
  return {noise_.as<float>() + (sequence * static_cast<size_t>(shape[1]) + static_cast<size_t>(block)) * size, size};
}

}  // namespace lacuna

#include "formats/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace lacuna {
namespace {

// 1 / theta^(2i/d) [d/2]: exponent, power and quotient each rounded to f32, as torch does.
std::vector<float> plain(double theta, int head_dim) {
  std::vector<float> inv_freq(static_cast<size_t>(head_dim) / 2);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const double power = std::pow(static_cast<double>(static_cast<float>(theta)), static_cast<double>(exponent));
    inv_freq[i] = 1.0f / static_cast<float>(power);
  }
  return inv_freq;
}

// Long wavelengths are divided by the factor, short ones kept, those between interpolated.
void scale_llama3(const RopeConfig& c, std::vector<float>& inv_freq) {
  const float low_wavelength = static_cast<float>(c.original_max_position / c.low_freq_factor);
  const float high_wavelength = static_cast<float>(c.original_max_position / c.high_freq_factor);
  const float low = static_cast<float>(c.low_freq_factor), factor = static_cast<float>(c.factor);
  const float span = static_cast<float>(c.high_freq_factor - c.low_freq_factor);
  for (float& f : inv_freq) {
    const float wavelength = static_cast<float>(2 * std::numbers::pi) / f;
    if (wavelength > low_wavelength) {
      f /= factor;
    } else if (wavelength >= high_wavelength) {
      const float smooth = (static_cast<float>(c.original_max_position) / wavelength - low) / span;
      f = (1 - smooth) * f / factor + smooth * f;
    }
  }
}

// YaRN (arXiv 2309.00071, section 3.2): dimensions that turn more than beta_fast times within the
// original context keep their frequency, those below beta_slow turns are divided by the factor,
// a linear ramp over the dimensions lies between.
void scale_yarn(const RopeConfig& c, int head_dim, RopeFrequencies& out) {
  const auto correction = [&](double rotations) {
    return head_dim * std::log(c.original_max_position / (rotations * 2 * std::numbers::pi)) / (2 * std::log(c.theta));
  };
  double low = correction(c.beta_fast), high = correction(c.beta_slow);
  if (c.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;  // the reference's guard against an empty ramp
  for (size_t i = 0; i < out.inv_freq.size(); ++i) {
    const float ramp = std::clamp((static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f, 1.0f);
    const float keep = 1 - ramp;
    const float kept = out.inv_freq[i];
    // The reference divides by factor · theta^(2i/d), so the power is formed again, not its inverse.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const auto power = static_cast<float>(
        std::pow(static_cast<double>(static_cast<float>(c.theta)), static_cast<double>(exponent)));
    const float scaled = 1.0f / (static_cast<float>(c.factor) * power);
    out.inv_freq[i] = scaled * (1 - keep) + kept * keep;
  }
  const auto magnitude = [&](double mscale) { return c.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(c.factor) + 1.0; };
  if (c.attention_factor) {
    out.attention_factor = static_cast<float>(*c.attention_factor);
  } else if (c.mscale.value_or(0) != 0 && c.mscale_all_dim.value_or(0) != 0) {
    out.attention_factor = static_cast<float>(magnitude(*c.mscale) / magnitude(*c.mscale_all_dim));
  } else {
    out.attention_factor = static_cast<float>(magnitude(1));
  }
}

}  // namespace

RopeFrequencies rope_frequencies(const RopeConfig& config, int head_dim, int64_t max_position,
                                 int64_t sequence_length) {
  double theta = config.theta;
  if (config.type == RopeType::kDynamic && sequence_length > max_position && head_dim > 2) {
    // NTK-aware scaling: the base grows so that the slowest dimension just spans the sequence.
    const double stretch =
        config.factor * static_cast<double>(sequence_length) / static_cast<double>(max_position) - (config.factor - 1);
    theta *= std::pow(stretch, static_cast<double>(head_dim) / (head_dim - 2));
  }
  RopeFrequencies out{plain(theta, head_dim), 1};
  switch (config.type) {
    case RopeType::kDefault:
    case RopeType::kDynamic: break;
    case RopeType::kLinear:
      for (float& f : out.inv_freq) f /= static_cast<float>(config.factor);
      break;
    case RopeType::kLlama3: scale_llama3(config, out.inv_freq); break;
    case RopeType::kYarn: scale_yarn(config, head_dim, out); break;
  }
  return out;
}

}  // namespace lacuna

#include "formats/sampling_params.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"
#include "formats/config_file.h"

namespace lacuna {
namespace {

constexpr int kMaxTopK = 1 << 24;
constexpr int64_t kMaxNewTokens = std::numeric_limits<int32_t>::max();
constexpr size_t kMaxStops = 64, kMaxStopBytes = 4096;

// NaN is outside every range.
void check(const char* name, double value, double min, double max) {
  if (!(value >= min && value <= max)) throw BadInput("{}: found {}, expected {} to {}", name, value, min, max);
}

}  // namespace

void validate(const SamplingParams& p) {
  check("temperature", p.temperature, 0, 100);
  check("top_k", p.top_k, 0, kMaxTopK);
  check("top_p", p.top_p, std::numeric_limits<float>::min(), 1);
  check("min_p", p.min_p, 0, 1);
  check("repetition_penalty", p.repetition_penalty, 0.01f, 100);
  if (p.max_new_tokens < 1 || p.max_new_tokens > kMaxNewTokens)
    throw BadInput("max_new_tokens: found {}, expected 1 to {}", p.max_new_tokens, kMaxNewTokens);
  if (p.stop.size() > kMaxStops)
    throw BadInput("stop: found {} texts, expected at most {}", p.stop.size(), kMaxStops);
  for (const auto& text : p.stop)
    if (text.empty() || text.size() > kMaxStopBytes)
      throw BadInput("stop: found a text of {} bytes, expected 1 to {}", text.size(), kMaxStopBytes);
}

SamplingParams parse_sampling_params(std::string_view json, std::string_view name, const SamplingParams& defaults) {
  static constexpr std::array<std::string_view, 9> kFields{
      "temperature", "top_k",          "top_p", "min_p",     "repetition_penalty",
      "seed",        "max_new_tokens", "stop",  "ignore_eos"};
  const ConfigFile config = ConfigFile::parse(json, std::string(name), ErrorKind::kBadInput);
  for (const auto& field : config.fields())
    if (std::find(kFields.begin(), kFields.end(), field) == kFields.end())
      config.wrong(field, "temperature, top_k, top_p, min_p, repetition_penalty, seed, max_new_tokens, stop or "
                          "ignore_eos as field names");
  constexpr double kAny = std::numeric_limits<float>::max();  // validate() knows the ranges
  SamplingParams p = defaults;
  const auto number = [&](std::string_view field, float fallback) {
    return static_cast<float>(config.number(field, -kAny, kAny, fallback));
  };
  p.temperature = number("temperature", p.temperature);
  p.top_k = static_cast<int>(config.integer("top_k", 0, kMaxTopK, p.top_k));
  p.top_p = number("top_p", p.top_p);
  p.min_p = number("min_p", p.min_p);
  p.repetition_penalty = number("repetition_penalty", p.repetition_penalty);
  p.seed = config.unsigned_integer("seed", p.seed);
  p.max_new_tokens = config.integer("max_new_tokens", 1, kMaxNewTokens, p.max_new_tokens);
  if (config.has("stop")) p.stop = config.texts("stop");
  p.ignore_eos = config.boolean("ignore_eos", p.ignore_eos);
  try {
    validate(p);
  } catch (const BadInput& error) {
    throw BadInput("{}: {}", name, error.what());
  }
  return p;
}

}  // namespace lacuna

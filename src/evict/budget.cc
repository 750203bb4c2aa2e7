#include "evict/budget.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"

namespace lacuna {
namespace {

constexpr std::string_view kForms =
    "a budget is entries a KV head (256), a part of the prompt (5% or 0.05), bytes (64MiB) or retained mass (mass:0.99)";

// A decimal number in plain notation; nothing else may stand before or after it.
bool parse_number(std::string_view text, double& value) {
  if (text.empty() || text.size() > 32) return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(value);
}

struct Unit {
  std::string_view name;
  double bytes;
};
constexpr Unit kUnits[] = {{"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"kB", 1e3},
                           {"KB", 1e3},     {"MB", 1e6},        {"GB", 1e9},           {"B", 1.0}};

int64_t candidates(int64_t length, int window) { return std::max<int64_t>(0, length - window); }

int64_t forced_slots(const CacheSizes& sizes, const SelectionRule& rule) {
  int64_t n = sizes.protected_slots(rule.window);
  for (const auto& layer : sizes.length)
    for (int64_t length : layer) n += std::min<int64_t>(rule.sinks, candidates(length, rule.window));
  return n;
}

CacheSizes grown(const CacheSizes& sizes, int64_t tokens) {
  CacheSizes out = sizes;
  for (auto& layer : out.length)
    for (int64_t& length : layer) length += tokens;
  return out;
}

// Bound on the bytes held at any moment when `total` entries stay.
size_t peak_bound(const SelectionRule& rule, const KvCacheShape& shape, const CacheSizes& sizes, const KvLimit& limit,
                  int64_t total) {
  const CacheSizes& stored = limit.stored.length.empty() ? sizes : limit.stored;
  const size_t dense = bytes_of(shape, stored);
  if (total >= sizes.slots()) return std::max(dense, bytes_of(shape, grown(stored, limit.growth)));
  // Budgets measured layer by layer are rounded up until the last layer is known.
  const int64_t rounding = rule.share == LayerShare::kMeasured ? sizes.heads() : 0;
  size_t reading = dense;
  if (limit.streaming) {
    size_t widest = 0;
    for (size_t l = 0; l < stored.length.size(); ++l) {
      CacheSizes one;
      one.length.resize(stored.length.size());
      one.length[l] = stored.length[l];
      widest = std::max(widest, bytes_of(shape, one));
    }
    reading = std::min(dense, bytes_bound(shape, total + rounding) + widest);
  }
  return std::max(reading, bytes_bound(shape, total + limit.growth * sizes.heads()));
}

}  // namespace

int64_t CacheSizes::heads() const {
  int64_t n = 0;
  for (const auto& layer : length) n += static_cast<int64_t>(layer.size());
  return n;
}

int64_t CacheSizes::slots() const {
  int64_t n = 0;
  for (const auto& layer : length)
    for (int64_t slots : layer) n += slots;
  return n;
}

int64_t CacheSizes::protected_slots(int window) const {
  int64_t n = 0;
  for (const auto& layer : length)
    for (int64_t slots : layer) n += std::min<int64_t>(slots, window);
  return n;
}

Budget parse_budget(std::string_view text) {
  Budget budget;
  budget.text = std::string(text);
  const auto refuse = [&](std::string_view why) -> BadInput { return BadInput("budget \"{}\": {}; {}", text, why, kForms); };
  double value = 0;
  if (text.starts_with("mass:")) {
    if (!parse_number(text.substr(5), value)) throw refuse("what follows \"mass:\" is not a number");
    if (!(value > 0 && value <= 1)) throw refuse("a mass lies above 0 and is at most 1");
    budget.kind = Budget::Kind::kMass;
    budget.value = value;
    return budget;
  }
  if (text.ends_with('%')) {
    if (!parse_number(text.substr(0, text.size() - 1), value)) throw refuse("what stands before % is not a number");
    if (!(value > 0 && value <= 100)) throw refuse("a percentage lies above 0 and is at most 100");
    budget.kind = Budget::Kind::kFraction;
    budget.value = value / 100;
    return budget;
  }
  for (const Unit& unit : kUnits) {
    if (!text.ends_with(unit.name)) continue;
    std::string_view number = text.substr(0, text.size() - unit.name.size());
    while (number.ends_with(' ')) number.remove_suffix(1);
    if (!parse_number(number, value)) throw refuse("what stands before the unit is not a number");
    value *= unit.bytes;
    if (!(value >= 1 && value < 9e15)) throw refuse("a size in bytes lies between 1 B and 8 PiB");
    budget.kind = Budget::Kind::kBytes;
    budget.value = std::floor(value);
    return budget;
  }
  if (!parse_number(text, value)) throw refuse("it is not a number and has no known unit");
  if (text.find('.') != std::string_view::npos) {
    if (!(value > 0 && value <= 1)) throw refuse("a part of the prompt lies above 0 and is at most 1");
    budget.kind = Budget::Kind::kFraction;
    budget.value = value;
    return budget;
  }
  if (!(value >= 1 && value <= 1e12)) throw refuse("a number of entries is at least 1");
  budget.kind = Budget::Kind::kTokens;
  budget.value = value;
  return budget;
}

size_t bytes_bound(const KvCacheShape& shape, int64_t slots) {
  // ceil(x_i / P) summed over H heads is at most floor((sum x_i + H (P - 1)) / P). Layers may differ in
  // page size, so the widest page stands for all.
  size_t page = 0;
  int64_t heads = 0;
  for (const auto& layer : shape.layers) {
    heads += layer.kv_heads;
    if (layer.kv_heads > 0) page = std::max(page, KvLayout{shape.dtype, layer.head_dim, shape.page_slots}.page_bytes());
  }
  const int64_t pages = slots <= 0 ? 0 : (slots + heads * (shape.page_slots - 1)) / shape.page_slots;
  return static_cast<size_t>(pages) * page;
}

size_t bytes_of(const KvCacheShape& shape, const CacheSizes& sizes) {
  size_t bytes = 0;
  for (size_t l = 0; l < sizes.length.size(); ++l) {
    const size_t page = KvLayout{shape.dtype, shape.layers[l].head_dim, shape.page_slots}.page_bytes();
    for (int64_t length : sizes.length[l])
      bytes += static_cast<size_t>((length + shape.page_slots - 1) / shape.page_slots) * page;
  }
  return bytes;
}

BudgetPlan plan_budget(const Budget& budget, const SelectionRule& rule, const KvCacheShape& shape,
                       const CacheSizes& sizes, const KvLimit& limit) {
  BudgetPlan plan;
  const int64_t all = sizes.slots(), heads = sizes.heads();
  const int64_t windows = sizes.protected_slots(rule.window), forced = forced_slots(sizes, rule);
  const size_t available = limit.bytes > limit.used_elsewhere ? limit.bytes - limit.used_elsewhere : 0;
  const auto fits_limit = [&](int64_t total) {
    return limit.bytes == 0 || peak_bound(rule, shape, sizes, limit, total) <= available;
  };

  if (budget.kind == Budget::Kind::kMass) {
    if (!rule.non_negative)
      throw BadInput("budget \"{}\": this policy's scores are no parts of a whole, so there is no mass to retain; use a "
                     "number of entries, a percentage or bytes", budget.text);
    if (limit.bytes != 0 && (limit.sustained || !fits_limit(all)))
      throw BadInput("budget \"{}\": a retained mass cannot promise the hard limit of {} bytes on the cache; use a number "
                     "of entries, a percentage or bytes", budget.text, limit.bytes);
    plan.by_mass = true;
    plan.mass = budget.value;
    plan.evict = windows < all && budget.value < 1;
    plan.target = all;
    plan.keep = all - windows;
    return plan;
  }

  double total = 0;
  switch (budget.kind) {
    case Budget::Kind::kTokens:
      total = (budget.value + (rule.counts_window ? 0 : rule.window)) * static_cast<double>(heads);
      break;
    case Budget::Kind::kFraction:
      // The small term keeps 0.05 * 100 from becoming 4.999….
      total = std::floor(budget.value * static_cast<double>(all) + 1e-6) + static_cast<double>(rule.counts_window ? 0 : windows);
      break;
    default: {
      int64_t low = 0, high = std::max<int64_t>(1, static_cast<int64_t>(budget.value));  // a slot needs more than a byte
      while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (static_cast<double>(bytes_bound(shape, middle)) <= budget.value)
          low = middle;
        else
          high = middle - 1;
      }
      total = static_cast<double>(low);
      if (static_cast<double>(bytes_of(shape, grown(sizes, limit.growth))) <= budget.value) total = std::max(total, static_cast<double>(all));
    }
  }
  plan.target = static_cast<int64_t>(std::min(total, 9e15));
  const auto lasts = [&](int64_t target) {
    return limit.bytes == 0 || !limit.sustained || bytes_bound(shape, target + limit.growth * heads) <= available;
  };
  if (budget.kind == Budget::Kind::kBytes && !lasts(plan.target)) {
    int64_t low = 0, high = plan.target;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (lasts(middle))
        low = middle;
      else
        high = middle - 1;
    }
    plan.target = low;
  }
  // Heads that are shorter than their share (sliding windows) leave entries unused under a budget by tokens.
  int64_t usable = plan.target;
  if (budget.kind == Budget::Kind::kTokens) {
    const int64_t each = plan.target / std::max<int64_t>(1, heads);
    usable = 0;
    for (const auto& layer : sizes.length)
      for (int64_t length : layer) usable += std::min(length, each);
  }
  usable = std::min(usable, all);
  // A prompt no longer than the window is kept whole under any budget.
  if (windows == all) usable = all;

  if (usable < forced && usable < all) {
    if (budget.kind == Budget::Kind::kBytes)
      throw BadInput("budget \"{}\": the window of {} tokens and {} sinks alone need up to {} bytes over {} KV heads", budget.text,
                     rule.window, rule.sinks, bytes_bound(shape, forced), heads);
    throw BadInput("budget \"{}\" is {:.1f} entries a KV head of {:.0f}, fewer than the policy always keeps: a window of {} "
                   "and {} sinks", budget.text, static_cast<double>(usable) / static_cast<double>(heads),
                   static_cast<double>(all) / static_cast<double>(heads), rule.window, rule.sinks);
  }
  if (!fits_limit(usable) || !lasts(plan.target)) {
    int64_t low = forced - 1;  // the largest total below `usable` that keeps the limit, if any
    if (budget.kind == Budget::Kind::kBytes) {
      int64_t high = usable - 1;
      while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (fits_limit(middle))
          low = middle;
        else
          high = middle - 1;
      }
    }
    if (low < forced || !fits_limit(low)) {
      const int64_t least = budget.kind == Budget::Kind::kBytes ? forced : std::max(usable, limit.sustained ? plan.target : 0);
      throw OutOfMemory("the hard limit of {} bytes on the KV cache ({} held by other sequences) cannot be kept: reading "
                        "{:.0f} tokens and keeping {} entries under budget \"{}\" needs up to {} bytes", limit.bytes,
                        limit.used_elsewhere, static_cast<double>(all) / static_cast<double>(std::max<int64_t>(1, heads)),
                        least, budget.text, peak_bound(rule, shape, sizes, limit, least));
    }
    usable = low;
    plan.target = std::min(plan.target, low);
  }
  plan.evict = usable < all;
  plan.keep = usable - windows;
  if (limit.bytes != 0) plan.peak_bytes = peak_bound(rule, shape, sizes, limit, usable);
  return plan;
}

}  // namespace lacuna

#include "evict/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace lacuna {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The `count` largest of a list: everything above `value`, and the first `ties` that equal it.
struct Cut {
  float value = -kInfinity;
  int64_t ties = std::numeric_limits<int64_t>::max();
  bool takes(float x) { return x > value || (x == value && ties-- > 0); }
};

// Reorders `values`.
Cut cut_after(std::vector<float>& values, int64_t count) {
  const int64_t n = static_cast<int64_t>(values.size());
  if (count >= n) return {};
  if (count <= 0) return {kInfinity, 0};
  std::nth_element(values.begin(), values.begin() + (count - 1), values.end(), std::greater<float>());
  Cut cut{values[static_cast<size_t>(count - 1)], count};
  for (int64_t i = 0; i < count; ++i)
    if (values[static_cast<size_t>(i)] > cut.value) --cut.ties;
  return cut;
}

template <typename Takes>
void filter(HeadScores& head, std::vector<float>& effective, const Takes& takes) {
  size_t kept = 0;
  for (size_t i = 0; i < head.score.size(); ++i) {
    if (!takes(i)) continue;
    head.slot[kept] = head.slot[i];
    head.position[kept] = head.position[i];
    head.score[kept] = head.score[i];
    if (!head.second.empty()) head.second[kept] = head.second[i];
    effective[kept] = effective[i];
    ++kept;
  }
  head.slot.resize(kept);
  head.position.resize(kept);
  head.score.resize(kept);
  if (!head.second.empty()) head.second.resize(kept);
  effective.resize(kept);
}

// Shares min(cap, level * weight) that add up to `total`.
std::vector<double> water_fill(std::vector<double> weights, const std::vector<double>& caps, double total) {
  std::vector<double> share(weights.size(), 0.0);
  std::vector<bool> full(weights.size(), false);
  for (size_t round = 0; round <= weights.size(); ++round) {
    double left = total, weight = 0;
    size_t open = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (full[i])
        left -= caps[i];
      else {
        weight += weights[i];
        ++open;
      }
    }
    if (open == 0) break;
    if (!(weight > 0)) {  // nothing to tell the rest apart
      for (size_t i = 0; i < weights.size(); ++i) weights[i] = 1;
      weight = static_cast<double>(open);
    }
    bool again = false;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (full[i]) continue;
      share[i] = std::max(0.0, left) * weights[i] / weight;
      if (share[i] >= caps[i]) {
        share[i] = caps[i];
        full[i] = again = true;
      }
    }
    if (!again) break;
  }
  return share;
}

// Whole numbers that add up to `total` where the caps allow: the largest remainders are rounded up.
std::vector<int64_t> round_shares(const std::vector<double>& shares, const std::vector<double>& caps, int64_t total) {
  std::vector<int64_t> out(shares.size());
  std::vector<size_t> order(shares.size());
  std::iota(order.begin(), order.end(), size_t{0});
  int64_t left = total;
  std::vector<double> rest(shares.size());
  for (size_t i = 0; i < shares.size(); ++i) {
    const double whole = std::floor(shares[i] + 1e-9);
    rest[i] = shares[i] - whole;
    out[i] = static_cast<int64_t>(whole);
    left -= out[i];
  }
  // Remainders that differ by rounding only count as equal; the lower index goes first.
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return std::floor(rest[a] * 1e7 + 0.5) > std::floor(rest[b] * 1e7 + 0.5); });
  for (size_t pass = 0; pass < 2 && left > 0; ++pass)
    for (size_t i : order)
      if (left > 0 && static_cast<double>(out[i]) < caps[i]) {
        ++out[i];
        --left;
      }
  return out;
}

}  // namespace

Selection::Selection(const SelectionRule& rule, const BudgetPlan& plan, const CacheSizes& sizes)
    : rule_(rule), plan_(plan), sizes_(sizes), heads_(sizes.heads()), layers_(sizes.length.size()),
      effective_(sizes.length.size()), threshold_(-kInfinity) {}

void Selection::add_layer(int layer, LayerScores scores) {
  LACUNA_CHECK(seen_.empty() || seen_.back() < layer);
  scores.total = 0;
  for (HeadScores& head : scores.heads) {
    LACUNA_CHECK(head.slot.size() == head.score.size() && head.position.size() == head.score.size());
    for (float& s : head.score) {
      if (std::isnan(s)) s = std::numeric_limits<float>::lowest();  // a NaN has no place in an order: it goes first
      scores.total += s;
    }
    for (float& s : head.second)
      if (std::isnan(s)) s = std::numeric_limits<float>::lowest();
  }
  layers_[static_cast<size_t>(layer)] = std::move(scores);
  seen_.push_back(layer);
  waiting_.push_back(layer);
}

double Selection::kept_share(int layer) const {
  const LayerScores& scores = layers_[static_cast<size_t>(layer)];
  if (!(scores.total > 0)) return 1;
  double kept = 0;
  for (const HeadScores& head : scores.heads)
    for (float s : head.score) kept += s;
  return kept / scores.total;
}

void Selection::shrink(bool last) {
  const bool settled = plan_.by_mass || (rule_.scope != Scope::kModel && rule_.share != LayerShare::kMeasured);
  if (plan_.by_mass) {
    for (int layer : waiting_) shrink_by_mass(layer);
  } else if (rule_.scope == Scope::kModel) {
    shrink_model(last);
  } else {
    const auto quota = quotas(last);
    for (int layer : settled ? waiting_ : seen_) {
      const auto& q = quota[static_cast<size_t>(layer)];
      if (rule_.scope == Scope::kHead)
        shrink_heads(layer, q);
      else
        shrink_layer(layer, q[0]);
    }
  }
  waiting_.clear();
}

// Scores with infinity for the sinks and for each head's guaranteed entries.
void Selection::effective_scores(int layer, int64_t guaranteed) {
  auto& heads = layers_[static_cast<size_t>(layer)].heads;
  auto& effective = effective_[static_cast<size_t>(layer)];
  effective.resize(heads.size());
  for (size_t h = 0; h < heads.size(); ++h) {
    effective[h] = heads[h].score;
    for (size_t i = 0; i < heads[h].slot.size() && heads[h].slot[i] < rule_.sinks; ++i) effective[h][i] = kInfinity;
    if (guaranteed > 0) {
      scratch_ = effective[h];
      Cut cut = cut_after(scratch_, guaranteed);
      for (float& s : effective[h])
        if (cut.takes(s)) s = kInfinity;
    }
  }
}

void Selection::shrink_model(bool last) {
  const int64_t guaranteed = heads_ > 0 ? static_cast<int64_t>(rule_.guarantee * static_cast<double>(plan_.keep) / static_cast<double>(heads_)) : 0;
  int64_t capacity = plan_.keep;
  std::vector<bool> seen(sizes_.length.size(), false);
  for (int layer : seen_) seen[static_cast<size_t>(layer)] = true;
  for (size_t l = 0; l < seen.size(); ++l)
    if (!seen[l])
      for (int64_t length : sizes_.length[l])
        capacity -= std::min(guaranteed, std::max<int64_t>(0, length - rule_.window));

  for (int layer : waiting_) effective_scores(layer, guaranteed);
  if (guaranteed == 0 && threshold_ > -kInfinity) {
    // The set is full: what does not beat its lowest entry can never join it, ties included, because
    // earlier layers come first.
    for (int layer : waiting_) {
      auto& heads = layers_[static_cast<size_t>(layer)].heads;
      for (size_t h = 0; h < heads.size(); ++h) {
        auto& effective = effective_[static_cast<size_t>(layer)][h];
        filter(heads[h], effective, [&](size_t i) { return effective[i] > threshold_; });
      }
    }
  }
  std::vector<float>& all = scratch_;
  all.clear();
  for (int layer : seen_)
    for (const auto& head : effective_[static_cast<size_t>(layer)]) all.insert(all.end(), head.begin(), head.end());
  if (static_cast<int64_t>(all.size()) > capacity || (static_cast<int64_t>(all.size()) == capacity && !all.empty())) {
    const bool full = static_cast<int64_t>(all.size()) == capacity;
    Cut cut = full ? Cut{*std::min_element(all.begin(), all.end())} : cut_after(all, capacity);
    threshold_ = cut.value;
    if (!full && rule_.first_stage < 1 && last) {
      for (int layer : seen_) {
        std::vector<int64_t> counts;
        for (auto& head : effective_[static_cast<size_t>(layer)])
          counts.push_back(std::count_if(head.begin(), head.end(), [&](float s) { return cut.takes(s); }));
        second_stage(layer, counts);
      }
    } else if (!full) {
      for (int layer : seen_) {
        auto& heads = layers_[static_cast<size_t>(layer)].heads;
        for (size_t h = 0; h < heads.size(); ++h) {
          auto& effective = effective_[static_cast<size_t>(layer)][h];
          filter(heads[h], effective, [&](size_t i) { return cut.takes(effective[i]); });
        }
      }
    }
  }
}

void Selection::shrink_layer(int layer, int64_t quota) {
  auto& heads = layers_[static_cast<size_t>(layer)].heads;
  auto& effective = effective_[static_cast<size_t>(layer)];
  effective_scores(layer, static_cast<int64_t>(rule_.guarantee * static_cast<double>(quota) / static_cast<double>(std::max<size_t>(1, heads.size()))));
  scratch_.clear();
  for (const auto& head : effective) scratch_.insert(scratch_.end(), head.begin(), head.end());
  Cut cut = cut_after(scratch_, quota);
  std::vector<int64_t> counts(heads.size(), 0);
  for (size_t h = 0; h < heads.size(); ++h) {
    if (rule_.first_stage < 1)
      counts[h] = std::count_if(effective[h].begin(), effective[h].end(), [&](float s) { return cut.takes(s); });
    else
      filter(heads[h], effective[h], [&](size_t i) { return cut.takes(effective[h][i]); });
  }
  if (rule_.first_stage < 1) second_stage(layer, counts);
}

void Selection::shrink_heads(int layer, const std::vector<int64_t>& quotas) {
  effective_scores(layer, 0);
  if (rule_.first_stage < 1) return second_stage(layer, quotas);
  auto& heads = layers_[static_cast<size_t>(layer)].heads;
  for (size_t h = 0; h < heads.size(); ++h) {
    auto& effective = effective_[static_cast<size_t>(layer)][h];
    scratch_ = effective;
    Cut cut = cut_after(scratch_, quotas[h]);
    filter(heads[h], effective, [&](size_t i) { return cut.takes(effective[i]); });
  }
}

// Each head keeps counts[h] entries: the first part by score, the rest by the second score.
void Selection::second_stage(int layer, const std::vector<int64_t>& counts) {
  auto& heads = layers_[static_cast<size_t>(layer)].heads;
  for (size_t h = 0; h < heads.size(); ++h) {
    auto& effective = effective_[static_cast<size_t>(layer)][h];
    LACUNA_CHECK(heads[h].second.size() == heads[h].score.size());
    scratch_ = effective;
    Cut first = cut_after(scratch_, static_cast<int64_t>(rule_.first_stage * static_cast<double>(counts[h])));
    std::vector<float> order = heads[h].second;
    for (size_t i = 0; i < order.size(); ++i)
      if (effective[i] == kInfinity || first.takes(effective[i])) order[i] = kInfinity;
    scratch_ = order;
    Cut cut = cut_after(scratch_, counts[h]);
    filter(heads[h], effective, [&](size_t i) { return cut.takes(order[i]); });
  }
}

void Selection::shrink_by_mass(int layer) {
  effective_scores(layer, 0);
  auto& heads = layers_[static_cast<size_t>(layer)].heads;
  auto& effective = effective_[static_cast<size_t>(layer)];
  struct Entry {
    float effective, score;
  };
  std::vector<Entry> entries;
  for (size_t h = 0; h < heads.size(); ++h)
    for (size_t i = 0; i < heads[h].score.size(); ++i) entries.push_back({effective[h][i], heads[h].score[i]});
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.effective > b.effective; });
  const double enough = plan_.mass * layers_[static_cast<size_t>(layer)].total;
  double mass = 0;
  size_t count = 0;
  while (count < entries.size() && (mass < enough || entries[count].effective == kInfinity)) mass += entries[count++].score;
  if (count == entries.size()) return;
  Cut cut{count > 0 ? entries[count - 1].effective : kInfinity, 0};
  for (size_t i = 0; i < count; ++i) cut.ties += entries[i].effective == cut.value;
  for (size_t h = 0; h < heads.size(); ++h)
    filter(heads[h], effective[h], [&](size_t i) { return cut.takes(effective[h][i]); });
}

// Entries for each head (kHead) or, as the only number, for each layer (kLayer). Measured shares are
// known for the layers seen so far only; what they are given then is never less than in the end.
std::vector<std::vector<int64_t>> Selection::quotas(bool last) const {
  const size_t layers = sizes_.length.size();
  const bool by_head = rule_.scope == Scope::kHead, measured = rule_.share == LayerShare::kMeasured;
  std::vector<int> counted;
  if (measured)
    counted = seen_;
  else
    for (size_t l = 0; l < layers; ++l)
      if (!sizes_.length[l].empty()) counted.push_back(static_cast<int>(l));
  int64_t heads = 0, longest = 0;
  for (int l : counted)
    for (int64_t length : sizes_.length[static_cast<size_t>(l)]) {
      ++heads;
      longest = std::max(longest, length - rule_.window);
    }

  // Pyramid: from `most` in the first layer down to `least` in the last, `mean` on average.
  const double mean = heads > 0 ? static_cast<double>(plan_.keep) / static_cast<double>(heads) : 0;
  const double held = rule_.pyramid_holds_window ? rule_.window : 0;
  double least = (mean + held) / rule_.pyramid_beta, most = 2 * (mean + held) - least;
  if (most > static_cast<double>(longest)) {
    most = static_cast<double>(longest);
    least = 2 * (mean + held) - most;
  }
  // kvpress gives up the pyramid where its last layer would not hold the window, or its first falls short of it.
  if (rule_.pyramid_holds_window && (least < held || most < least)) least = most = mean + held;
  least -= held;
  most -= held;
  std::vector<double> weights, caps;
  for (size_t i = 0; i < counted.size(); ++i) {
    const size_t l = static_cast<size_t>(counted[i]);
    double weight = 1;
    if (rule_.share == LayerShare::kPyramid && counted.size() > 1)
      weight = most - (most - least) * static_cast<double>(i) / static_cast<double>(counted.size() - 1);
    if (measured) weight = layers_[l].preference;
    if (!(weight >= 0) || !std::isfinite(weight)) weight = 0;
    double layer_cap = 0;
    for (int64_t length : sizes_.length[l]) {
      const double cap = static_cast<double>(std::max<int64_t>(0, length - rule_.window));
      layer_cap += cap;
      if (by_head) {
        weights.push_back(weight);
        caps.push_back(cap);
      }
    }
    if (!by_head) {
      weights.push_back(weight * static_cast<double>(sizes_.length[l].size()));
      caps.push_back(layer_cap);
    }
  }
  const std::vector<double> shares = water_fill(weights, caps, static_cast<double>(plan_.keep));
  std::vector<int64_t> whole;
  if (last || !measured) {
    whole = round_shares(shares, caps, plan_.keep);
  } else {
    for (size_t i = 0; i < shares.size(); ++i)
      whole.push_back(static_cast<int64_t>(std::min(caps[i], std::floor(shares[i]) + 1)));
  }
  std::vector<std::vector<int64_t>> out(layers);
  size_t next = 0;
  for (int l : counted)
    for (size_t h = 0; h < (by_head ? sizes_.length[static_cast<size_t>(l)].size() : 1); ++h)
      out[static_cast<size_t>(l)].push_back(whole[next++]);
  return out;
}

}  // namespace lacuna

#include "spike/spike_stats.h"

#include <algorithm>
#include <bit>
#include <cstdlib>

namespace lacuna {

void SpikeStats::add(const SpikeBatch& x, int64_t fan_out) {
  SpikeStats s;
  s.rows = x.m;
  s.inputs = x.m * x.k;
  for (int64_t r = 0; r < x.m; ++r) {
    s.zero += x.rows[r].silent;
    s.total += x.rows[r].total;
    s.spikes += x.rows[r].spikes;
    s.most = std::max(s.most, x.rows[r].most);
  }
  for (int64_t i = 0; i < s.inputs; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(std::abs(x.counts[i]));
    s.within_7 += magnitude <= 7;
    s.above_16 += magnitude > 16;
    s.low_spikes += std::popcount(magnitude & 7u);
    s.beyond_slots += magnitude >> kSlots != 0;
    for (int w = 0; w < kWindows; ++w) {
      // Counts of more than nine digits have no tenth slot of their own: their topmost window is not silent.
      const uint32_t window = magnitude >> (w * kWindowSteps) & (w + 1 < kWindows ? 7u : ~0u);
      ++s.windows[static_cast<size_t>(std::min(std::popcount(window), kWindowSteps))];
    }
  }
  s.dense_macs = s.inputs * fan_out;
  s.synaptic_ops = s.spikes * fan_out;
  *this += s;
}

SpikeStats& SpikeStats::operator+=(const SpikeStats& o) {
  rows += o.rows;
  inputs += o.inputs;
  zero += o.zero;
  total += o.total;
  spikes += o.spikes;
  within_7 += o.within_7;
  above_16 += o.above_16;
  low_spikes += o.low_spikes;
  beyond_slots += o.beyond_slots;
  most = std::max(most, o.most);
  for (size_t i = 0; i < windows.size(); ++i) windows[i] += o.windows[i];
  dense_macs += o.dense_macs;
  synaptic_ops += o.synaptic_ops;
  return *this;
}

int SpikeStats::steps() const { return std::max(1, static_cast<int>(std::bit_width(static_cast<uint32_t>(most)))); }

SpikeEnergy compute_energy(const SpikeStats& stats) {
  const double macs = static_cast<double>(stats.dense_macs) * 1e-12;
  return {macs * SpikeEnergy::kFp16Mac, macs * SpikeEnergy::kInt8Mac,
          static_cast<double>(stats.synaptic_ops) * 1e-12 * SpikeEnergy::kInt8Add};
}

}  // namespace lacuna

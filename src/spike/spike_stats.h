#pragma once

#include <array>
#include <cstdint>

#include "kernels/spike_neuron.h"

namespace lacuna {

// What spike counts of one place of a model looked like, under every definition of "sparse" in use: the
// SpikingBrain report does not say which is its own. Sums over all inputs of all rows shown.
struct SpikeStats {
  // Windows of three time steps among nine, most significant first: how many spikes each holds.
  static constexpr int kWindowSteps = 3, kWindows = 3, kSlots = kWindowSteps * kWindows;

  int64_t rows = 0, inputs = 0;
  int64_t zero = 0;                                 // s = 0: silent inputs
  int64_t total = 0;                                // sum of |s|
  int64_t spikes = 0;                               // ones in the binary digits of |s|: spikes of a bidirectional code
  int64_t within_7 = 0;                             // |s| <= 7: what three steps can hold
  int64_t above_16 = 0;                             // |s| > 16
  int64_t low_spikes = 0;                           // ones in the lowest three digits: spikes of a code cut to T = 3
  int64_t beyond_slots = 0;                         // |s| >= 2^9, whose higher digits count in the topmost window
  int32_t most = 0;                                 // max |s|
  std::array<int64_t, kWindowSteps + 1> windows{};  // by spikes in the window, the last: 3 or more
  // Products of the layers that these inputs feed: dense multiply-accumulates, and additions if every
  // spike is one.
  int64_t dense_macs = 0;
  int64_t synaptic_ops = 0;

  // fan_out: outputs of all layers that read these inputs.
  void add(const SpikeBatch& x, int64_t fan_out);
  SpikeStats& operator+=(const SpikeStats& other);

  double zero_count_share() const { return share(zero, inputs); }
  double mean_count() const { return share(total, inputs); }
  double mean_popcount() const { return share(spikes, inputs); }
  double within_7_share() const { return share(within_7, inputs); }
  double above_16_share() const { return share(above_16, inputs); }
  // Empty slots of a bidirectional code of T = 3 steps (higher digits dropped).
  double zero_slot_share_3() const { return 1 - share(low_spikes, 3 * inputs); }
  // … of as many steps as the largest count here needs.
  int steps() const;
  double zero_slot_share_max() const { return 1 - share(spikes, steps() * inputs); }
  // Windows of three steps without a spike, of nine slots an input: the reading under which Gaussian inputs
  // give the 69 % that the report quotes.
  double silent_window_share() const { return share(windows[0], kWindows * inputs); }
  double window_share(int spikes_in_window) const {
    return share(windows[static_cast<size_t>(spikes_in_window)], kWindows * inputs);
  }
  double silent_channels_per_row() const { return share(zero, rows); }
  // Additions a dense multiply-accumulate.
  double ops_per_mac() const { return share(synaptic_ops, dense_macs); }

 private:
  static double share(int64_t part, int64_t whole) {
    return whole ? static_cast<double>(part) / static_cast<double>(whole) : 0;
  }
};

// Energy of the products alone at 45 nm, in picojoules an operation (Yao et al. 2024, Nature Communications,
// as the SpikingBrain report cites it). Not in it: weight fetches, thresholds, shifts, and everything that
// is not a spike-coded product.
struct SpikeEnergy {
  static constexpr double kFp16Mac = 1.5, kInt8Mac = 0.23, kInt8Add = 0.03;
  double fp16_joules = 0, int8_joules = 0, spike_joules = 0;
};
SpikeEnergy compute_energy(const SpikeStats& stats);

}  // namespace lacuna

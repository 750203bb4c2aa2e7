#include "kernels/spike_linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>

#include "base/error.h"
#include "kernels/cpu/isa.h"

namespace lacuna {
namespace {

std::vector<Isa> reachable_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16})
    if (isa <= detected_isa()) isas.push_back(isa);
  return isas;
}

struct Counts {
  std::vector<int32_t> s;
  std::vector<SpikeRow> rows;
  SpikeBatch view;
  Counts(std::vector<int32_t> counts, int64_t m, int64_t k, std::mt19937& random) : s(std::move(counts)) {
    std::uniform_real_distribution<float> threshold(0.01f, 2.0f);
    for (int64_t r = 0; r < m; ++r) {
      SpikeRow row;
      row.threshold = threshold(random);
      for (int64_t i = r * k; i < (r + 1) * k; ++i) {
        const int32_t magnitude = std::abs(s[i]);
        row.most = std::max(row.most, magnitude);
        row.total += magnitude;
        row.spikes += std::popcount(static_cast<uint32_t>(magnitude));
        row.silent += magnitude == 0;
      }
      rows.push_back(row);
    }
    view = {s.data(), rows.data(), m, k};
  }
};

// Laplace-like counts as activations give them, with outliers, or sparse ones.
std::vector<int32_t> random_counts(int64_t count, double mean, double silent, int32_t outlier, std::mt19937& random) {
  std::exponential_distribution<double> size(1 / mean);
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<int32_t> s(static_cast<size_t>(count));
  for (int32_t& v : s) {
    if (unit(random) < silent) continue;
    v = static_cast<int32_t>(std::nearbyint(size(random))) * (unit(random) < 0.5 ? -1 : 1);
    if (outlier > 0 && unit(random) < 0.02) v = std::uniform_int_distribution<int32_t>(-outlier, outlier)(random);
  }
  return s;
}

struct Weights {
  std::vector<int16_t> wide;
  std::vector<int8_t> narrow;
  std::vector<float> scales, bias;
  int64_t n, k, group;
  Tensor codes;
  Weights(int64_t out, int64_t in, int64_t g, bool overflow, bool with_bias, std::mt19937& random)
      : n(out), k(in), group(g) {
    std::uniform_int_distribution<int> code(-127, 127), beyond(-194, 200), one(0, 49);
    std::uniform_real_distribution<float> scale(0.001f, 0.02f);
    for (int64_t i = 0; i < n * k; ++i) {
      const int c = overflow && one(random) == 0 ? beyond(random) : code(random);
      wide.push_back(static_cast<int16_t>(c));
      narrow.push_back(static_cast<int8_t>(std::clamp(c, -127, 127)));
    }
    const int64_t groups = (k + group - 1) / group;
    for (int64_t i = 0; i < n * groups; ++i) scales.push_back(scale(random));
    for (int64_t i = 0; with_bias && i < n; ++i) bias.push_back(scale(random));
    codes = overflow ? Tensor(wide.data(), DType::kI16, {n, k}) : Tensor(narrow.data(), DType::kI8, {n, k});
  }
  int32_t code(int64_t i) const { return codes.dtype == DType::kI16 ? wide[i] : narrow[i]; }
  PackedSpikeWeight pack(Context& ctx, SpikeArithmetic a) const {
    return pack_spike_weight(ctx, codes, scales.data(), group, bias.empty() ? nullptr : bias.data(), a);
  }
};

// In doubles, and the unit of its rounding.
void reference(const Weights& w, const Counts& x, std::vector<double>& y, std::vector<double>& unit) {
  const int64_t groups = (w.k + w.group - 1) / w.group;
  for (int64_t r = 0; r < x.view.m; ++r)
    for (int64_t o = 0; o < w.n; ++o) {
      double sum = 0, size = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t exact = 0;
        for (int64_t i = g * w.group; i < std::min(w.k, (g + 1) * w.group); ++i)
          exact += static_cast<int64_t>(x.s[r * w.k + i]) * w.code(o * w.k + i);
        sum += static_cast<double>(exact) * w.scales[o * groups + g];
        size += std::fabs(static_cast<double>(exact)) * w.scales[o * groups + g];
      }
      y.push_back(sum * x.rows[r].threshold + (w.bias.empty() ? 0 : w.bias[o]));
      unit.push_back(size * x.rows[r].threshold + 1e-6);
    }
}

std::vector<float> run(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float start = 0,
                       LinearMode mode = LinearMode::kStore) {
  std::vector<float> y(static_cast<size_t>(x.m * w.out), start);
  spike_linear(ctx, w, x, y.data(), mode);
  return y;
}

struct Case {
  int64_t n, k, group;
};
// One scale an output and many; below, at and past tile, quad, block and group edges.
constexpr Case kCases[] = {{1, 1, 1},       {5, 7, 7},       {64, 128, 128},   {67, 130, 128},
                           {129, 515, 515}, {200, 300, 128}, {24, 1100, 1100}, {130, 1030, 8}};

// Integer and event products: the same bits, right to rounding, for every shape, ISA and number of threads.
TEST(SpikeLinear, IntegerAndEventAgreeExactly) {
  std::mt19937 random(1);
  for (const Case& c : kCases)
    for (const bool overflow : {false, true})
      for (const int64_t m : {1, 2, 5, 70}) {
        const Weights w(c.n, c.k, c.group, overflow, overflow, random);
        const int kind = static_cast<int>(m % 3);
        const Counts x(
            random_counts(m * c.k, kind == 0 ? 40 : 3, kind == 1 ? 0.7 : 0.1, kind == 2 ? 60000 : 200, random), m, c.k,
            random);
        std::vector<double> exact, unit;
        reference(w, x, exact, unit);
        for (const Isa isa : reachable_isas()) {
          const ScopedIsa scoped(isa);
          MemoryAccount memory;
          Context one(memory, 1), many(memory, 3);
          const PackedSpikeWeight dense = w.pack(one, SpikeArithmetic::kInteger),
                                  event = w.pack(many, SpikeArithmetic::kEvent);
          const std::vector<float> y = run(one, dense.view, x.view);
          EXPECT_EQ(y, run(one, event.view, x.view)) << c.n << "x" << c.k << " m " << m << " " << isa_name(isa);
          EXPECT_EQ(y, run(many, dense.view, x.view)) << isa_name(isa);
          EXPECT_EQ(y, run(many, event.view, x.view)) << isa_name(isa);
          // Groups are summed one after another.
          const double eps = 4e-7 + 6e-8 * std::sqrt(static_cast<double>((c.k + c.group - 1) / c.group));
          for (size_t i = 0; i < y.size(); ++i)
            ASSERT_NEAR(y[i], exact[i], eps * unit[i]) << isa_name(isa) << " at " << i;
          // A row does not depend on its neighbours.
          const SpikeBatch last = {x.view.counts + (m - 1) * c.k, x.view.rows + m - 1, 1, c.k};
          EXPECT_EQ(run(one, event.view, last), std::vector<float>(y.end() - c.n, y.end()));
          EXPECT_EQ(run(one, dense.view, last), std::vector<float>(y.end() - c.n, y.end()));
        }
      }
}

// Integer sums by themselves: scales and thresholds of 1 and sums below 2^24 are exact in f32.
TEST(SpikeLinear, SumsAreExact) {
  std::mt19937 random(2);
  for (const Case& c : kCases) {
    Weights w(c.n, c.k, c.group, true, false, random);
    std::fill(w.scales.begin(), w.scales.end(), 1.0f);
    Counts x(random_counts(3 * c.k, 5, 0.2, 300, random), 3, c.k, random);
    for (SpikeRow& row : x.rows) row.threshold = 1;
    std::vector<double> exact, unit;
    reference(w, x, exact, unit);
    for (const Isa isa : reachable_isas()) {
      const ScopedIsa scoped(isa);
      MemoryAccount memory;
      Context ctx(memory, 2);
      for (SpikeArithmetic a : {SpikeArithmetic::kInteger, SpikeArithmetic::kEvent}) {
        const PackedSpikeWeight packed = w.pack(ctx, a);
        const std::vector<float> y = run(ctx, packed.view, x.view);
        for (size_t i = 0; i < y.size(); ++i)
          ASSERT_EQ(static_cast<double>(y[i]), exact[i]) << spike_arithmetic_name(a);
      }
    }
  }
}

// Counts so large that sums need 64 bits; silent and all-extreme rows between them.
TEST(SpikeLinear, HugeCounts) {
  std::mt19937 random(3);
  const int64_t n = 70, k = 260, m = 5;
  for (const int64_t group : {int64_t{128}, k}) {
    const Weights w(n, k, group, true, true, random);
    std::vector<int32_t> s(static_cast<size_t>(m * k), 0);
    std::uniform_int_distribution<int32_t> any(-2147483647, 2147483647);
    for (int64_t i = 0; i < k; ++i) {
      s[static_cast<size_t>(i)] = any(random);
      s[static_cast<size_t>(2 * k + i)] = i % 9 == 0 ? 259 : -258;
      s[static_cast<size_t>(3 * k + i)] = i == 77 ? -2147483647 : 0;
      s[static_cast<size_t>(4 * k + i)] = i == 3 ? 7000000 : 0;
    }
    const Counts x(s, m, k, random);
    std::vector<double> exact, unit;
    reference(w, x, exact, unit);
    for (const Isa isa : reachable_isas()) {
      const ScopedIsa scoped(isa);
      MemoryAccount memory;
      Context ctx(memory, 2);
      const std::vector<float> y = run(ctx, w.pack(ctx, SpikeArithmetic::kInteger).view, x.view);
      EXPECT_EQ(y, run(ctx, w.pack(ctx, SpikeArithmetic::kEvent).view, x.view));
      for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], exact[i], 4e-7 * unit[i]) << i;
      for (int64_t o = 0; o < n; ++o)
        EXPECT_EQ(y[static_cast<size_t>(n + o)], w.bias[static_cast<size_t>(o)]) << "a silent row";
    }
  }
}

TEST(SpikeLinear, FakeQuantisationIsTheSameToRounding) {
  std::mt19937 random(4);
  for (const Case& c : kCases)
    for (const bool overflow : {false, true}) {
      const Weights w(c.n, c.k, c.group, overflow, true, random);
      const Counts x(random_counts(3 * c.k, 3, 0.2, 500, random), 3, c.k, random);
      std::vector<double> exact, unit;
      reference(w, x, exact, unit);
      MemoryAccount memory;
      Context ctx(memory, 2);
      ctx.activations = ActivationType::kBF16;  // must not touch x̂
      const std::vector<float> y = run(ctx, w.pack(ctx, SpikeArithmetic::kFake).view, x.view);
      EXPECT_EQ(ctx.activations, ActivationType::kBF16);
      for (int64_t r = 0; r < 3; ++r) {
        double most = 0;
        for (int64_t o = 0; o < c.n; ++o)
          most = std::max(most,
                          std::fabs(exact[static_cast<size_t>(r * c.n + o)]) + unit[static_cast<size_t>(r * c.n + o)]);
        for (int64_t o = 0; o < c.n; ++o)
          EXPECT_NEAR(y[static_cast<size_t>(r * c.n + o)], exact[static_cast<size_t>(r * c.n + o)], 1e-5 * most);
      }
    }
}

TEST(SpikeLinear, AccumulatesAndStrides) {
  std::mt19937 random(5);
  const Weights w(67, 130, 128, true, true, random);
  const Counts x(random_counts(3 * 130, 3, 0.2, 0, random), 3, 130, random);
  MemoryAccount memory;
  Context ctx(memory, 2);
  for (SpikeArithmetic a : {SpikeArithmetic::kFake, SpikeArithmetic::kInteger, SpikeArithmetic::kEvent}) {
    const PackedSpikeWeight packed = w.pack(ctx, a);
    const std::vector<float> y = run(ctx, packed.view, x.view),
                             added = run(ctx, packed.view, x.view, 2.0f, LinearMode::kAccumulate);
    std::vector<float> strided(3 * 80, -1.0f);
    spike_linear(ctx, packed.view, x.view, strided.data(), LinearMode::kStore, 80);
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t o = 0; o < 80; ++o) {
        EXPECT_EQ(strided[static_cast<size_t>(r * 80 + o)], o < 67 ? y[static_cast<size_t>(r * 67 + o)] : -1.0f);
        if (o < 67) {
          EXPECT_NEAR(added[static_cast<size_t>(r * 67 + o)], y[static_cast<size_t>(r * 67 + o)] + 2.0f, 1e-5);
        }
      }
  }
}

class LastRecord : public TraceSink {
 public:
  void record(const OpRecord& r) override {
    last = r;
    ++calls;
  }
  OpRecord last;
  int calls = 0;
};

// The ledger holds what was executed: counted here from the counts themselves.
TEST(SpikeLinear, Ledger) {
  std::mt19937 random(6);
  const int64_t n = 130, k = 300, m = 3;
  const Weights w(n, k, 128, true, false, random);
  const Counts x(random_counts(m * k, 1.5, 0.8, 0, random), m, k, random);
  int64_t spikes = 0, silent = 0, overflow = 0, overflow_macs = 0, overflow_read = 0;
  std::set<int64_t> columns;
  for (int64_t i = 0; i < m * k; ++i) {
    spikes += std::popcount(static_cast<uint32_t>(std::abs(x.s[i])));
    silent += x.s[i] == 0;
    if (x.s[i]) columns.insert(i % k);
  }
  for (int64_t i = 0; i < n * k; ++i) {
    if (std::abs(w.code(i)) <= 127) continue;
    ++overflow;
    overflow_read += columns.count(i % k);
    for (int64_t r = 0; r < m; ++r) overflow_macs += x.s[r * k + i % k] != 0;
  }
  ASSERT_GT(overflow, 0);
  ASSERT_LT(static_cast<int64_t>(columns.size()), k);
  MemoryAccount memory;
  Context ctx(memory, 1);
  const PackedSpikeWeight packed[] = {w.pack(ctx, SpikeArithmetic::kFake), w.pack(ctx, SpikeArithmetic::kInteger),
                                      w.pack(ctx, SpikeArithmetic::kEvent)};
  for (const PackedSpikeWeight& p : packed) {
    LastRecord ledger;
    ctx.trace = &ledger;
    run(ctx, p.view, x.view);
    const OpRecord& r = ledger.last;
    EXPECT_EQ(ledger.calls, 1);
    EXPECT_EQ(r.kind, OpKind::kSpike);
    EXPECT_EQ(r.inputs, m * k);
    EXPECT_EQ(r.silent_inputs, silent);
    EXPECT_EQ(r.spikes, spikes);
    EXPECT_EQ(r.activation_bytes, 4 * m * (k + n));
    const bool event = p.view.arithmetic == SpikeArithmetic::kEvent, fake = p.view.arithmetic == SpikeArithmetic::kFake;
    EXPECT_EQ(r.synaptic_ops, event ? n * spikes : 0);
    EXPECT_EQ(r.macs, event ? overflow_macs : fake ? m * n * k : m * (n * k + overflow));
    const int64_t columns_read = event ? static_cast<int64_t>(columns.size()) : k;
    EXPECT_EQ(r.weight_bytes, fake ? 4 * n * k : n * columns_read + 4 * n * 3 + 8 * (event ? overflow_read : overflow));
  }
}

TEST(SpikeLinear, Refusals) {
  std::mt19937 random(7);
  const Weights w(5, 300, 128, false, false, random);
  MemoryAccount memory;
  Context ctx(memory, 1);
  EXPECT_THROW(pack_spike_weight(ctx, w.codes, w.scales.data(), 6, nullptr, SpikeArithmetic::kInteger), BadInput);
  EXPECT_THROW(pack_spike_weight(ctx, w.codes, w.scales.data(), 0, nullptr, SpikeArithmetic::kInteger), BadInput);
  EXPECT_THROW(pack_spike_weight(ctx, w.codes, nullptr, 128, nullptr, SpikeArithmetic::kInteger), BadInput);
  EXPECT_THROW(pack_spike_weight(ctx, Tensor(w.scales.data(), DType::kF32, {5, 3}), w.scales.data(), 128, nullptr,
                                 SpikeArithmetic::kInteger),
               BadInput);
  const PackedSpikeWeight packed = w.pack(ctx, SpikeArithmetic::kInteger);
  const Counts x(random_counts(299, 2, 0, 0, random), 1, 299, random);
  std::vector<float> y(5);
  EXPECT_THROW(spike_linear(ctx, packed.view, x.view, y.data()), BadInput);
  EXPECT_THROW(spike_linear(ctx, packed.view, {x.s.data(), x.rows.data(), 2, 300}, y.data(), LinearMode::kStore, 4),
               BadInput);
  EXPECT_THROW(spike_linear(ctx, packed.view, {nullptr, x.rows.data(), 1, 300}, y.data()), BadInput);
  EXPECT_THROW(spike_linear(ctx, SpikeWeight{}, x.view, y.data()), BadInput);
}

TEST(QuantizeGroups, RoundsToEvenAndNeverClips) {
  const float w[] = {0.5f, 1.5f, -2.5f, 300.0f, -0.75f, 0.25f, -0.25f, 100.0f};
  const float scales[] = {1.0f, 0.5f};
  int16_t codes[8];
  MemoryAccount memory;
  Context ctx(memory, 1);
  for (const Isa isa : reachable_isas()) {
    const ScopedIsa scoped(isa);
    quantize_groups(ctx, Tensor(w, DType::kF32, {1, 8}), scales, 4, codes);
    const int16_t expected[] = {0, 2, -2, 300, -2, 0, 0, 200};
    EXPECT_TRUE(std::equal(codes, codes + 8, expected)) << isa_name(isa);
  }
  const float zero[] = {1.0f, 0.0f}, tiny[] = {1.0f, 1e-4f};
  EXPECT_THROW(quantize_groups(ctx, Tensor(w, DType::kF32, {1, 8}), zero, 4, codes), BadInput);
  EXPECT_THROW(quantize_groups(ctx, Tensor(w, DType::kF32, {1, 8}), tiny, 4, codes), BadInput);
  const float bad[] = {1.0f, std::numeric_limits<float>::quiet_NaN(), 0, 0};
  EXPECT_THROW(quantize_groups(ctx, Tensor(bad, DType::kF32, {1, 4}), scales, 4, codes), BadInput);
}

}  // namespace
}  // namespace lacuna

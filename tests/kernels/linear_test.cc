#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/isa.h"
#include "kernels/elementwise.h"

namespace lacuna {
namespace {

constexpr DType kWeightTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kI8};
constexpr ActivationType kActivationTypes[] = {ActivationType::kF32, ActivationType::kBF16};

std::vector<Isa> reachable_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16})
    if (isa <= detected_isa()) isas.push_back(isa);
  return isas;
}

// Rounds to nearest even, for normal f16 values only: what the tests draw.
F16 to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude < 0x38800000u) return F16{static_cast<uint16_t>(sign)};
  const uint32_t near = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return F16{static_cast<uint16_t>(sign | ((near - 0x38000000u) >> 13))};
}

// A weight of every dtype with the exact values that it stands for.
struct Weight {
  std::vector<std::byte> data;
  std::vector<float> scale, bias;
  std::vector<double> exact;  // [N, K]
  LinearWeight view;

  Weight(DType dtype, int64_t n, int64_t k, bool with_bias, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> code(-127, 127);
    data.resize(static_cast<size_t>(n * k) * dtype_size(dtype));
    exact.resize(static_cast<size_t>(n * k));
    if (dtype == DType::kI8)
      for (int64_t i = 0; i < n; ++i) scale.push_back(0.01f + 0.02f * std::fabs(normal(random)));
    if (with_bias)
      for (int64_t i = 0; i < n; ++i) bias.push_back(normal(random));
    for (int64_t i = 0; i < n * k; ++i) {
      const float w = normal(random);
      switch (dtype) {
        case DType::kF32: set(i, w), exact[i] = w; break;
        case DType::kF16: set(i, to_f16(w)), exact[i] = to_float(to_f16(w)); break;
        case DType::kBF16: set(i, to_bf16(w)), exact[i] = to_float(to_bf16(w)); break;
        default: {
          const int c = code(random);
          set(i, static_cast<int8_t>(c)), exact[i] = static_cast<double>(c) * scale[i / k];
        }
      }
    }
    view.weight = Tensor(data.data(), dtype, {n, k});
    if (!scale.empty()) view.row_scale = scale.data();
    if (with_bias) view.bias = bias.data();
  }
  template <class T>
  void set(int64_t i, T value) { std::memcpy(data.data() + i * sizeof(T), &value, sizeof(T)); }
};

std::vector<float> normal_floats(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = normal(random);
  return v;
}

struct Reference {
  std::vector<double> y, unit;  // [M, N]: the product, and ||x|| ||w|| + |bias|, the unit of its error
};

Reference reference(const Weight& w, const std::vector<float>& x, int64_t m, ActivationType activations) {
  const int64_t n = w.view.out(), k = w.view.in();
  std::vector<double> xe(x.begin(), x.begin() + m * k);
  if (activations == ActivationType::kBF16)
    for (int64_t i = 0; i < m * k; ++i) xe[i] = to_float(to_bf16(x[i]));
  const auto norm = [k](const double* v) {
    double s = 0;
    for (int64_t i = 0; i < k; ++i) s += v[i] * v[i];
    return std::sqrt(s);
  };
  std::vector<double> w_norm;
  for (int64_t j = 0; j < n; ++j) w_norm.push_back(norm(&w.exact[j * k]));
  Reference r;
  for (int64_t i = 0; i < m; ++i) {
    const double x_norm = norm(&xe[i * k]);
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += xe[i * k + l] * w.exact[j * k + l];
      const double bias = w.bias.empty() ? 0 : w.bias[j];
      r.y.push_back(sum + bias);
      r.unit.push_back(x_norm * w_norm[j] + std::fabs(bias));
    }
  }
  return r;
}

// f32 sums of K products err by about eps * sqrt(K) / 4 of the partial sums, which themselves are about
// ||x|| ||w|| / sqrt(K): a few eps (6e-8) at most, wherever K lies.
constexpr double kMaxError = 3e-7, kRmsError = 6e-8;

struct Case {
  int64_t n, k;
};
// Below, at and past vector, panel, piece and k-block edges.
constexpr Case kCases[] = {{1, 1}, {5, 7}, {17, 33}, {67, 129}, {130, 515}, {24, 1100}};
constexpr int64_t kRows[] = {1, 2, 3, 7, 8, 9, 16, 33, 64, 130};

TEST(Linear, MatchesDoubleReference) {
  std::mt19937 random(1);
  MemoryAccount memory;
  Context ctx(memory, 2);
  for (const Case& c : kCases) {
    const std::vector<float> x = normal_floats(130 * c.k, random);
    for (DType dtype : kWeightTypes) {
      const Weight w(dtype, c.n, c.k, c.n % 2 == 1, random);
      for (ActivationType activations : kActivationTypes) {
        const Reference want = reference(w, x, 130, activations);
        ctx.activations = activations;
        for (Isa isa : reachable_isas()) {
          ScopedIsa scoped(isa);
          for (int64_t m : kRows) {
            SCOPED_TRACE(fmt::format("{} {} m {} n {} k {} bf16 {}", isa_name(isa), dtype_name(dtype), m, c.n, c.k,
                                     activations == ActivationType::kBF16));
            std::vector<float> y(static_cast<size_t>(m * c.n), NAN);
            linear(ctx, w.view, x.data(), m, y.data());
            double worst = 0, squares = 0;
            for (size_t i = 0; i < y.size(); ++i) {
              const double error = std::fabs(y[i] - want.y[i]) / want.unit[i];
              worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
              squares += error * error;
            }
            ASSERT_LT(worst, kMaxError);
            if (y.size() >= 32) {
              ASSERT_LT(std::sqrt(squares / static_cast<double>(y.size())), kRmsError);
            }
          }
        }
      }
    }
  }
}

std::vector<float> product(const Weight& w, const std::vector<float>& x, int64_t m, int threads,
                           ActivationType activations) {
  MemoryAccount memory;
  Context ctx(memory, threads);
  ctx.activations = activations;
  std::vector<float> y(static_cast<size_t>(m * w.view.out()));
  linear(ctx, w.view, x.data(), m, y.data());
  return y;
}

TEST(Linear, BitsDoNotDependOnThreads) {
  std::mt19937 random(2);
  const int64_t n = 300, k = 700;
  const std::vector<float> x = normal_floats(600 * k, random);
  for (DType dtype : kWeightTypes) {
    const Weight w(dtype, n, k, true, random);
    for (Isa isa : reachable_isas()) {
      ScopedIsa scoped(isa);
      for (ActivationType activations : kActivationTypes)
        for (int64_t m : {int64_t{1}, int64_t{5}, int64_t{40}, int64_t{600}}) {
          if (isa == Isa::kScalar && m == 600) continue;
          const std::vector<float> one = product(w, x, m, 1, activations);
          EXPECT_EQ(one, product(w, x, m, 2, activations)) << isa_name(isa) << " " << dtype_name(dtype) << " m " << m;
          EXPECT_EQ(one, product(w, x, m, 3, activations)) << isa_name(isa) << " " << dtype_name(dtype) << " m " << m;
        }
    }
  }
}

TEST(Linear, RowsDoNotDependOnEachOther) {
  std::mt19937 random(3);
  const int64_t n = 83, k = 611, rows = 270;
  const std::vector<float> x = normal_floats(rows * k, random);
  for (DType dtype : kWeightTypes) {
    const Weight w(dtype, n, k, true, random);
    for (Isa isa : reachable_isas()) {
      ScopedIsa scoped(isa);
      for (ActivationType activations : kActivationTypes) {
        MemoryAccount memory;
        Context ctx(memory, 2);
        ctx.activations = activations;
        // A path's rows have the same bits however many rows go with them and wherever they start.
        const auto check = [&](int64_t all, std::initializer_list<std::pair<int64_t, int64_t>> splits) {
          std::vector<float> together(static_cast<size_t>(all * n)), part(static_cast<size_t>(all * n));
          linear(ctx, w.view, x.data(), all, together.data());
          for (auto [first, count] : splits) {
            linear(ctx, w.view, x.data() + first * k, count, part.data());
            ASSERT_TRUE(std::equal(part.begin(), part.begin() + count * n, together.begin() + first * n))
                << isa_name(isa) << " " << dtype_name(dtype) << " rows " << first << " + " << count << " of " << all;
          }
        };
        check(8, {{0, 1}, {7, 1}, {2, 2}, {1, 3}, {3, 4}, {1, 5}, {0, 6}, {1, 7}});
        check(rows, {{100, 33}, {17, 64}, {1, 257}});
        // Codes times bf16 pairs change their path at 24 rows, the others at 8.
        if (dtype == DType::kI8 && activations == ActivationType::kBF16 && isa == Isa::kAvx512Bf16)
          check(24, {{0, 9}, {5, 17}, {1, 23}, {8, 16}});
        else
          check(rows, {{0, 9}, {5, 17}});
      }
    }
  }
}

// Every ISA, and where there are pairs, with fast and with slow ones.
std::vector<std::pair<Isa, bool>> isas_with_pairs() {
  std::vector<std::pair<Isa, bool>> all;
  for (const Isa isa : reachable_isas()) {
    all.push_back({isa, true});
    if (isa == Isa::kAvx512Bf16) all.push_back({isa, false});
  }
  return all;
}

// Packed weights: the products of few rows within the error of f32 sums, and of any number of rows with the bits that
// the large-M body gives them without.
TEST(Linear, PanelsChangeNoBits) {
  std::mt19937 random(11);
  for (const Case& c : {Case{1, 1}, Case{17, 33}, Case{48, 192}, Case{83, 611}, Case{200, 128}}) {
    const int64_t n = c.n, k = c.k, x_stride = k + 3, y_stride = n + 5;
    for (DType dtype : kWeightTypes) {
      const Weight w(dtype, n, k, n % 2 == 1, random);
      for (const auto& [isa, fast] : isas_with_pairs()) {
        ScopedIsa scoped(isa, fast);
        MemoryAccount memory;
        Context ctx(memory, 2);
        LinearWeight packed = w.view;
        LinearWeight* const list[] = {&packed};
        const Buffer panels = pack_panels(ctx, list, size_t{1} << 20);
        const bool has = isa == Isa::kAvx512Bf16;
        ASSERT_EQ(packed.panels != nullptr, has);
        ASSERT_EQ(panels.bytes(), has ? panel_bytes(ctx, packed) : 0);
        if (!has) continue;
        const int64_t most = 150;
        const std::vector<float> x = normal_floats(most * x_stride, random),
                                 before = normal_floats(most * y_stride, random);
        for (LinearMode mode : {LinearMode::kStore, LinearMode::kAccumulate}) {
          std::vector<float> want = before;
          linear(ctx, w.view, x.data(), most, want.data(), mode, x_stride, y_stride);
          for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 29, 64, 65, 150}) {
            std::vector<float> y = before;
            linear(ctx, packed, x.data(), m, y.data(), mode, x_stride, y_stride);
            ASSERT_TRUE(std::equal(y.begin(), y.begin() + m * y_stride, want.begin()))
                << n << " x " << k << ", " << m << " rows";
            ASSERT_TRUE(std::equal(y.begin() + m * y_stride, y.end(), before.begin() + m * y_stride));
          }
        }
        ctx.activations = ActivationType::kF32;  // pairs are none for these: the weights themselves
        std::vector<float> y(static_cast<size_t>(9 * n)), want(y.size());
        linear(ctx, packed, x.data(), 9, y.data());
        linear(ctx, w.view, x.data(), 9, want.data());
        ASSERT_EQ(y, want);
      }
    }
  }
  MemoryAccount memory;
  Context ctx(memory, 1);
  const Weight w(DType::kBF16, 16, 16, false, random);
  LinearWeight one = w.view, other = w.view;
  LinearWeight* const both[] = {&one, &other};
  EXPECT_FALSE(pack_panels(ctx, both, 16 * 16 * 2 * 2 - 1));  // too many bytes
  EXPECT_FALSE(one.panels);
}

// Two products with GELU between them: without panels the three ops' bits, with panels (whose GELU is less exact than
// f32) within what bf16 rounds off, and a row's bits whatever the number of rows and threads.
// Between identities, where each value shows alone: rounded to bf16, and off by no more than 2e-4 of itself before that.
TEST(Linear, GeluBetweenIdentities) {
  std::mt19937 random(13);
  const int64_t n = 64, m = 70;
  Weight identity(DType::kBF16, n, n, false, random);
  for (int64_t i = 0; i < n * n; ++i) identity.set(i, to_bf16(i % (n + 1) == 0 ? 1.0f : 0.0f));
  std::vector<float> x(static_cast<size_t>(m * n)), wide(x.size()), y(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = to_float(to_bf16(-4 + 8 * static_cast<float>(i) / static_cast<float>(x.size())));
  for (const auto& [isa, fast] : isas_with_pairs()) {
    ScopedIsa scoped(isa, fast);
    MemoryAccount memory;
    Context one(memory, 1);
    LinearWeight in = identity.view, out = identity.view;
    LinearWeight* const list[] = {&in, &out};
    const Buffer panels = pack_panels(one, list, size_t{1} << 20);
    gelu_mlp(one, in, out, x.data(), m, wide.data(), y.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i], exact = v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
      ASSERT_NEAR(y[i], exact, std::fabs(exact) * (1 / 256.0 + 2e-4)) << v;
    }
  }
}

TEST(Linear, GeluBetweenTwoProducts) {
  std::mt19937 random(12);
  const int64_t k = 45, n = 23, most = 70;
  for (const int64_t f : {224, 100})
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
      const Weight in(dtype, f, k, true, random), out(dtype, n, f, true, random);
      std::vector<float> x = normal_floats(most * k, random);
      for (float& value : x) value = to_float(to_bf16(value * 0.5f));
      x[3] = 1e20f;  // far from where its cube fits
      for (const auto& [isa, fast] : isas_with_pairs()) {
        ScopedIsa scoped(isa, fast);
        MemoryAccount memory;
        Context one(memory, 1), two(memory, 2);
        LinearWeight first = in.view, second = out.view;
        std::vector<float> wide(static_cast<size_t>(most * f)), hidden(wide.size()), y(static_cast<size_t>(most * n)), ops(y.size());
        gelu_mlp(one, first, second, x.data(), most, wide.data(), y.data());
        linear(one, first, x.data(), most, hidden.data());
        gelu_tanh(one, hidden.data(), most * f);
        linear(one, second, hidden.data(), most, ops.data());
        ASSERT_EQ(y, ops);
        LinearWeight* const list[] = {&first, &second};
        const Buffer panels = pack_panels(one, list, size_t{1} << 20);
        if (!panels) continue;
        gelu_mlp(two, first, second, x.data(), most, wide.data(), y.data());
        for (int64_t i = 1; i < most; ++i)
          for (int64_t c = 0; c < n; ++c) {
            double exact = out.view.bias[c], size = 0;
            for (int64_t j = 0; j < f; ++j) {
              double h = in.view.bias[j];
              for (int64_t a = 0; a < k; ++a) h += x[static_cast<size_t>(i * k + a)] * in.exact[static_cast<size_t>(j * k + a)];
              h /= 1 + std::exp(-2 * std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h));
              const double term = h * out.exact[static_cast<size_t>(c * f + j)];
              exact += term;
              size += term * term;
            }
            // Each term is off by up to 2^-9 of itself, either way.
            ASSERT_NEAR(y[static_cast<size_t>(i * n + c)], exact, 4 * std::sqrt(size) / 512 + 1e-5) << i << " " << c;
          }
        for (int64_t c = 0; c < n; ++c) ASSERT_TRUE(std::isfinite(y[static_cast<size_t>(c)]));
        for (int64_t m : {1, 8, 16, 65}) {
          std::vector<float> part(y.size());
          gelu_mlp(one, first, second, x.data(), m, wide.data(), part.data());
          ASSERT_TRUE(std::equal(part.begin(), part.begin() + m * n, y.begin())) << m;
        }
      }
    }
  MemoryAccount memory;
  Context ctx(memory, 1);
  const Weight w(DType::kBF16, 8, 4, false, random);
  float x[4] = {}, y[8] = {}, wide[8] = {};
  EXPECT_THROW(gelu_mlp(ctx, w.view, w.view, x, 1, wide, y), BadInput);
}

TEST(Linear, AccumulatesWithStridesAndAddsBiasOnce) {
  std::mt19937 random(4);
  const int64_t n = 37, k = 45, x_stride = 51, y_stride = 44;
  for (DType dtype : kWeightTypes) {
    const Weight w(dtype, n, k, true, random);
    for (Isa isa : reachable_isas()) {
      ScopedIsa scoped(isa);
      for (int64_t m : {int64_t{1}, int64_t{4}, int64_t{21}}) {
        MemoryAccount memory;
        Context ctx(memory, 2);
        ctx.activations = ActivationType::kF32;
        const std::vector<float> strided = normal_floats(m * x_stride, random);
        std::vector<float> dense;
        for (int64_t i = 0; i < m; ++i)
          dense.insert(dense.end(), strided.begin() + i * x_stride, strided.begin() + i * x_stride + k);
        const Reference want = reference(w, dense, m, ActivationType::kF32);
        const std::vector<float> before = normal_floats(m * y_stride, random);
        std::vector<float> y = before;
        linear(ctx, w.view, strided.data(), m, y.data(), LinearMode::kAccumulate, x_stride, y_stride);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            const double old = before[i * y_stride + j];
            ASSERT_NEAR(y[i * y_stride + j], want.y[i * n + j] + old, 4e-7 * (want.unit[i * n + j] + std::fabs(old)));
          }
          for (int64_t j = n; j < y_stride; ++j) ASSERT_EQ(y[i * y_stride + j], before[i * y_stride + j]);
        }
      }
    }
  }
}

// NaN and infinity go to the rows and columns they belong to, and nowhere else.
TEST(Linear, KeepsNonFiniteValuesInTheirRow) {
  std::mt19937 random(5);
  const int64_t n = 19, k = 70;
  const Weight w(DType::kBF16, n, k, false, random);
  for (Isa isa : reachable_isas()) {
    ScopedIsa scoped(isa);
    for (ActivationType activations : kActivationTypes) {
      for (int64_t m : {int64_t{3}, int64_t{20}}) {
        std::vector<float> x = normal_floats(m * k, random);
        x[1 * k + 69] = NAN;
        x[2 * k + 3] = HUGE_VALF;
        const std::vector<float> y = product(w, x, m, 1, activations);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            const float v = y[i * n + j];
            ASSERT_EQ(std::isnan(v), i == 1) << i;
            ASSERT_EQ(std::isinf(v), i == 2) << i;
          }
      }
    }
  }
}

// int8 weights of few rows: NaN stands for whatever is not finite, in its row only.
TEST(Linear, CodesKeepNonFiniteValuesInTheirRow) {
  std::mt19937 random(9);
  const int64_t n = 19, k = 70;
  const Weight w(DType::kI8, n, k, false, random);
  for (Isa isa : reachable_isas()) {
    ScopedIsa scoped(isa);
    for (ActivationType activations : kActivationTypes)
      for (const float bad : {NAN, HUGE_VALF, -HUGE_VALF}) {
        std::vector<float> x = normal_floats(3 * k, random);
        x[1 * k + 69] = bad;
        const std::vector<float> y = product(w, x, 3, 1, activations);
        for (int64_t i = 0; i < 3; ++i)
          for (int64_t j = 0; j < n; ++j)
            ASSERT_EQ(std::isfinite(y[i * n + j]), i != 1) << isa_name(isa) << i;
      }
  }
}

// One value that dwarfs the others, rows of zeros, of the smallest and of the largest floats, and a k so long
// that sums of digits would not fit: all within the error of f32 sums.
TEST(Linear, CodesTimesRowsOfEveryScale) {
  std::mt19937 random(10);
  for (const int64_t k : {int64_t{129}, int64_t{4864}, int64_t{65535}, int64_t{70001}}) {
    const Weight w(DType::kI8, 9, k, false, random);
    const int64_t m = 5;
    std::vector<float> x = normal_floats(m * k, random);
    x[k / 2] = 3e4f;
    std::fill(x.begin() + k, x.begin() + 2 * k, 0.0f);
    for (int64_t i = 2 * k; i < 3 * k; ++i) x[i] *= 1e-37f;
    for (int64_t i = 3 * k; i < 4 * k; ++i) x[i] *= 1e33f;
    std::fill(x.begin() + 4 * k, x.end(), 1.0f);
    for (ActivationType activations : kActivationTypes) {
      const Reference want = reference(w, x, m, activations);
      for (Isa isa : reachable_isas()) {
        ScopedIsa scoped(isa);
        const std::vector<float> y = product(w, x, m, 2, activations);
        for (size_t i = 0; i < y.size(); ++i)
          ASSERT_LE(std::fabs(y[i] - want.y[i]), 1e-6 * want.unit[i] + 1e-30) << isa_name(isa) << " k " << k << " at " << i;
      }
    }
  }
}

struct Records : TraceSink {
  std::vector<OpRecord> all;
  void record(const OpRecord& r) override { all.push_back(r); }
};

TEST(Linear, ReportsWhatItDid) {
  std::mt19937 random(6);
  const int64_t m = 3, n = 10, k = 20;
  const Weight w(DType::kI8, n, k, true, random);
  const std::vector<float> x = normal_floats(m * k, random);
  std::vector<float> y(static_cast<size_t>(m * n));
  MemoryAccount memory;
  Context ctx(memory, 1);
  Records records;
  ctx.trace = &records;
  ctx.layer = 7;
  linear(ctx, w.view, x.data(), m, y.data());
  linear(ctx, w.view, x.data(), m, y.data(), LinearMode::kAccumulate);
  ASSERT_EQ(records.all.size(), 2u);
  const OpRecord& r = records.all[0];
  EXPECT_EQ(r.kind, OpKind::kGemm);
  EXPECT_EQ(r.layer, 7);
  EXPECT_EQ(r.m, m);
  EXPECT_EQ(r.n, n);
  EXPECT_EQ(r.k, k);
  EXPECT_EQ(r.macs, m * n * k);
  EXPECT_EQ(r.weight_bytes, n * k + 4 * n + 4 * n);
  EXPECT_EQ(r.activation_bytes, 4 * (m * k + m * n));
  EXPECT_EQ(records.all[1].activation_bytes, 4 * (m * k + 2 * m * n));
}

TEST(Linear, AllocatesNothingOnceWarm) {
  std::mt19937 random(7);
  const Weight w(DType::kBF16, 200, 300, false, random);
  const std::vector<float> x = normal_floats(100 * 300, random);
  std::vector<float> y(100 * 200);
  MemoryAccount memory;
  Context ctx(memory, 2);
  linear(ctx, w.view, x.data(), 100, y.data());
  const size_t warm = memory.now(MemoryTag::kScratch);
  memory.set_limit(MemoryTag::kScratch, warm);
  for (int64_t m : {100, 1, 40, 8}) linear(ctx, w.view, x.data(), m, y.data());
  EXPECT_EQ(memory.now(MemoryTag::kScratch), warm);
}

template <class Call>
void expect_bad_input(Call call, const std::string& words) {
  try {
    call();
    ADD_FAILURE() << "expected an error with: " << words;
  } catch (const BadInput& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

TEST(Linear, RefusesWrongOperands) {
  std::mt19937 random(8);
  MemoryAccount memory;
  Context ctx(memory, 1);
  float x[64] = {}, y[64] = {};
  const Weight good(DType::kF32, 4, 8, false, random);
  LinearWeight w = good.view;
  w.weight.rank = 1;
  expect_bad_input([&] { linear(ctx, w, x, 1, y); }, "shape [4]");
  w = good.view;
  w.weight.shape[1] = 0;
  expect_bad_input([&] { linear(ctx, w, x, 1, y); }, "shape [4, 0]");
  w = good.view;
  w.weight.dtype = DType::kI32;
  expect_bad_input([&] { linear(ctx, w, x, 1, y); }, "dtype i32");
  w = good.view;
  w.weight.dtype = DType::kI8;
  expect_bad_input([&] { linear(ctx, w, x, 1, y); }, "no row scales");
  expect_bad_input([&] { linear(ctx, LinearWeight{}, x, 1, y); }, "no data");
  expect_bad_input([&] { linear(ctx, good.view, nullptr, 1, y); }, "x has no data");
  expect_bad_input([&] { linear(ctx, good.view, x, 1, nullptr); }, "y has no data");
  expect_bad_input([&] { linear(ctx, good.view, x, -1, y); }, "-1 rows");
  expect_bad_input([&] { linear(ctx, good.view, x, 2, y, LinearMode::kStore, 0, 3); }, "3 floats apart");
  expect_bad_input([&] { linear(ctx, good.view, x, 2, y, LinearMode::kStore, -8); }, "-8 floats apart");
  linear(ctx, good.view, nullptr, 0, nullptr);  // nothing to do is no error
}

TEST(QuantizeRows, RoundsHalfToEven) {
  std::mt19937 random(9);
  const int64_t n = 21, k = 65;
  MemoryAccount memory;
  Context ctx(memory, 2);
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Weight w(dtype, n, k, false, random);
    for (Isa isa : reachable_isas()) {
      ScopedIsa scoped(isa);
      std::vector<int8_t> codes(n * k);
      std::vector<float> scales(n);
      quantize_rows(ctx, w.view.weight, codes.data(), scales.data());
      for (int64_t i = 0; i < n; ++i) {
        double amax = 0;
        for (int64_t j = 0; j < k; ++j) amax = std::max(amax, std::fabs(w.exact[i * k + j]));
        ASSERT_FLOAT_EQ(scales[i], static_cast<float>(amax / 127));
        for (int64_t j = 0; j < k; ++j)
          ASSERT_EQ(codes[i * k + j], std::nearbyint(static_cast<float>(w.exact[i * k + j]) / scales[i]));
      }
    }
  }
  // Scale 1: 0.5, 1.5, 2.5 go to the even neighbour.
  const float row[] = {127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -127.0f};
  for (Isa isa : reachable_isas()) {
    ScopedIsa scoped(isa);
    int8_t codes[7];
    float scale;
    quantize_rows(ctx, Tensor(row, DType::kF32, {1, 7}), codes, &scale);
    EXPECT_EQ(scale, 1.0f);
    EXPECT_EQ(std::vector<int>(codes, codes + 7), (std::vector<int>{127, 0, 2, 2, 0, -2, -127}));
  }
}

TEST(QuantizeRows, ServesZeroTinyAndNonFiniteRows) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  const float tiny = std::numeric_limits<float>::denorm_min();
  float rows[3][2] = {{0, 0}, {tiny, -tiny}, {200 * tiny, -300 * tiny}};
  int8_t codes[6];
  float scales[3];
  quantize_rows(ctx, Tensor(rows, DType::kF32, {3, 2}), codes, scales);
  EXPECT_EQ(scales[0], 0.0f);
  EXPECT_EQ(scales[1], 0.0f);
  EXPECT_GT(scales[2], 0.0f);
  EXPECT_EQ(codes[0] | codes[1] | codes[2] | codes[3], 0);
  EXPECT_EQ(codes[5], -127);
  for (float bad : {NAN, HUGE_VALF}) {
    rows[1][1] = bad;
    expect_bad_input([&] { quantize_rows(ctx, Tensor(rows, DType::kF32, {3, 2}), codes, scales); }, "row 1");
  }
  expect_bad_input([&] { quantize_rows(ctx, Tensor(rows, DType::kI8, {3, 2}), codes, scales); }, "dtype int8");
}

TEST(EmbedRows, CopiesRowsOfEveryDtype) {
  std::mt19937 random(10);
  const int64_t v = 11, d = 29;
  MemoryAccount memory;
  Context ctx(memory, 2);
  std::vector<int32_t> ids = {3, 0, 10, 3};
  for (int32_t i = 0; i < 60; ++i) ids.push_back(i * 7 % 11);
  for (DType dtype : kWeightTypes) {
    const Weight w(dtype, v, d, false, random);
    for (Isa isa : reachable_isas()) {
      ScopedIsa scoped(isa);
      std::vector<float> out(ids.size() * d);
      embed_rows(ctx, w.view, ids.data(), static_cast<int64_t>(ids.size()), out.data());
      for (size_t i = 0; i < ids.size(); ++i)
        for (int64_t j = 0; j < d; ++j) ASSERT_EQ(out[i * d + j], static_cast<float>(w.exact[ids[i] * d + j]));
    }
  }
  const Weight w(DType::kF32, v, d, false, random);
  std::vector<float> out(4 * d);
  const int32_t high[] = {1, 11}, low[] = {-1};
  expect_bad_input([&] { embed_rows(ctx, w.view, high, 2, out.data()); }, "id 11 at index 1");
  expect_bad_input([&] { embed_rows(ctx, w.view, low, 1, out.data()); }, "id -1 at index 0");
}

}  // namespace
}  // namespace lacuna

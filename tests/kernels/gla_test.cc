#include "kernels/gla.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::isa_levels;
using testing::normals;

#define FOR_EACH_ISA(level)                                               \
  for (const Isa level : isa_levels())                                    \
    if (const ScopedIsa held(level); true)                                \
      if (const ::testing::ScopedTrace where(__FILE__, __LINE__, isa_name(level)); true)

constexpr float kInf = std::numeric_limits<float>::infinity();

GlaShape shape_of(int kv_heads, int group, int dk, int dv) {
  return {kv_heads * group, kv_heads, dk, dv, 1.0f / std::sqrt(static_cast<float>(dk))};
}

// How fast channels forget. Mixed: every channel and token its own, from 1 - 1e-6 to 0.
enum class Gates { kUsual, kNearOne, kNearZero, kMixed };

struct Sequence {
  GlaShape shape;
  int64_t tokens = 0;
  std::vector<float> q, k, v, g, state, out;

  Sequence(const GlaShape& s, int64_t n, Gates gates, uint32_t seed) : shape(s), tokens(n) {
    const auto count = [n](int64_t heads, int64_t d) { return static_cast<size_t>(n * heads * d); };
    q = normals(count(s.query_heads, s.key_dim), seed);
    k = normals(count(s.kv_heads, s.key_dim), seed + 1);
    v = normals(count(s.kv_heads, s.value_dim), seed + 2);
    const auto z = normals(k.size(), seed + 3);
    state = normals(static_cast<size_t>(s.kv_heads) * static_cast<size_t>(s.key_dim * s.value_dim), seed + 4);
    out.assign(count(s.query_heads, s.value_dim), -7.0f);
    for (size_t i = 0; i < z.size(); ++i) {
      const float a = std::fabs(z[i]);
      float x = -std::log1p(std::exp(-z[i])) / 16;
      if (gates == Gates::kNearOne) x = -1e-6f * a;
      if (gates == Gates::kNearZero) x = a > 1.5f ? -kInf : -30 * a;
      if (gates == Gates::kMixed) x = a > 2.3f ? -kInf : -std::exp(6 * z[i] - 6);
      g.push_back(x);
    }
  }

  GlaSequence part(int64_t first, int64_t n) {
    const auto at = [first](std::vector<float>& x, int64_t row) { return x.data() + first * row; };
    return {at(q, int64_t{shape.query_heads} * shape.key_dim), at(k, int64_t{shape.kv_heads} * shape.key_dim),
            at(v, int64_t{shape.kv_heads} * shape.value_dim),  at(g, int64_t{shape.kv_heads} * shape.key_dim),
            at(out, int64_t{shape.query_heads} * shape.value_dim), n, state.data()};
  }
};

// The recurrence as it is written, in double; state is left after the last token.
std::vector<double> exact(const Sequence& s, std::vector<double>& state) {
  const int64_t H = s.shape.query_heads, G = s.shape.kv_heads, dk = s.shape.key_dim, dv = s.shape.value_dim;
  std::vector<double> out(s.out.size(), 0.0);
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t c = 0; c < dk; ++c) {
        const auto at = static_cast<size_t>((t * G + g) * dk + c);
        const double decay = std::exp(static_cast<double>(s.g[at])), k = s.k[at];
        double* row = &state[static_cast<size_t>((g * dk + c) * dv)];
        for (int64_t j = 0; j < dv; ++j) row[j] = decay * row[j] + k * s.v[static_cast<size_t>((t * G + g) * dv + j)];
        for (int64_t h = g * H / G; h < (g + 1) * H / G; ++h) {
          const double q = static_cast<double>(s.q[static_cast<size_t>((t * H + h) * dk + c)]) * s.shape.scale;
          for (int64_t j = 0; j < dv; ++j) out[static_cast<size_t>((t * H + h) * dv + j)] += q * row[j];
        }
      }
    }
  return out;
}

// The largest difference over `size`, or over the largest value.
template <typename A, typename B>
double relative(const A& found, const B& expected, double size = 1e-30) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = std::fabs(static_cast<double>(found[i]) - static_cast<double>(expected[i]));
    if (!(d <= worst)) worst = d;
    size = std::max(size, std::fabs(static_cast<double>(expected[i])));
  }
  return worst / size;
}

// In pieces of the given lengths (the last one serves what is left).
void run(Engine& e, Sequence& s, std::vector<int64_t> pieces) {
  for (int64_t at = 0, i = 0; at < s.tokens; ++i) {
    const int64_t n = std::min(pieces[std::min(static_cast<size_t>(i), pieces.size() - 1)], s.tokens - at);
    const GlaSequence call = s.part(at, n);
    gated_linear_attention(e.ctx, s.shape, {&call, 1});
    at += n;
  }
}

// Against the recurrence. Results count for at least a fortieth of what their terms come to: of one token and one
// channel, decay * state + k * v may be 0.
double error_of(Engine& e, Sequence s, std::vector<int64_t> pieces) {
  std::vector<double> state(s.state.begin(), s.state.end());
  const auto out = exact(s, state);
  Sequence terms = s;
  for (auto* x : {&terms.q, &terms.k, &terms.v, &terms.state})
    for (float& value : *x) value = std::fabs(value);
  std::vector<double> state_terms(terms.state.begin(), terms.state.end());
  const auto out_terms = exact(terms, state_terms);
  const auto fortieth = [](const std::vector<double>& x) { return *std::max_element(x.begin(), x.end()) / 40; };
  run(e, s, std::move(pieces));
  return std::max(relative(s.out, out, fortieth(out_terms)), relative(s.state, state, fortieth(state_terms)));
}

const std::vector<int> kDims = {1, 3, 8, 16, 24, 40, 64, 100, 128};
const std::vector<Gates> kGates = {Gates::kUsual, Gates::kNearOne, Gates::kNearZero, Gates::kMixed};

TEST(GatedLinearAttention, MatchesDoubleForRandomShapes) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      const int dk = *rc::gen::elementOf(kDims), dv = *rc::gen::elementOf(kDims);
      const int group = *rc::gen::inRange(1, 13), heads = *rc::gen::inRange(1, 4);
      const int64_t tokens = *rc::gen::inRange(1, 90);
      const std::vector<int64_t> pieces = {*rc::gen::inRange(1, 40), *rc::gen::inRange(1, 20), *rc::gen::inRange(1, 60)};
      Engine e;
      const Sequence s(shape_of(heads, group, dk, dv), tokens, *rc::gen::elementOf(kGates), *rc::gen::arbitrary<uint32_t>());
      RC_ASSERT(error_of(e, s, pieces) < 1e-5);
    }));
  }
}

TEST(GatedLinearAttention, ChunkedEqualsTokenByToken) {
  FOR_EACH_ISA(isa) {
    Engine e;
    for (const Gates gates : kGates)
      for (const int64_t tokens : {7, 16, 17, 63, 64, 256, 300, 777}) {
        Sequence a(shape_of(2, 3, 32, 48), tokens, gates, 5), b = a;
        run(e, a, {tokens});
        run(e, b, {1});
        EXPECT_LT(relative(a.out, b.out), 1e-5) << tokens;
        EXPECT_LT(relative(a.state, b.state), 1e-5) << tokens;
      }
  }
}

TEST(GatedLinearAttention, LongSequencesAtFullWidth) {
  Engine e;
  for (const Gates gates : kGates) {
    const Sequence s(shape_of(1, 7, 128, 128), 600, gates, 9);
    EXPECT_LT(error_of(e, s, {600}), 1e-5);
    EXPECT_LT(error_of(e, s, {1}), 1e-5);
    EXPECT_LT(error_of(e, s, {5, 40, 3, 300}), 1e-5);
  }
}

TEST(GatedLinearAttention, ThreadsAndNeighboursChangeNoBit) {
  FOR_EACH_ISA(isa) {
    for (const int64_t first : {1, 3, 500}) {
      const std::vector<int64_t> lengths = {first, 1, 40, 0, 290, 6};
      std::vector<Sequence> alone, together, threads;
      for (size_t i = 0; i < lengths.size(); ++i)
        alone.emplace_back(shape_of(2, 3, 40, 72), lengths[i], Gates::kMixed, static_cast<uint32_t>(i));
      together = alone;
      threads = alone;
      Engine one(1), three(3);
      for (Sequence& s : alone)
        if (s.tokens) run(one, s, {s.tokens});
      const auto all = [](Engine& e, std::vector<Sequence>& list) {
        std::vector<GlaSequence> calls;
        for (Sequence& s : list) calls.push_back(s.part(0, s.tokens));
        gated_linear_attention(e.ctx, list[0].shape, calls);
      };
      all(one, together);
      all(three, threads);
      for (size_t i = 0; i < lengths.size(); ++i) {
        EXPECT_EQ(alone[i].out, together[i].out) << i;
        EXPECT_EQ(alone[i].state, together[i].state) << i;
        EXPECT_EQ(alone[i].out, threads[i].out) << i;
        EXPECT_EQ(alone[i].state, threads[i].state) << i;
      }
    }
  }
}

// A decay of 1 - 1e-6 rounded to f32 is wrong by up to 3 % of what it forgets: over a memory of a million
// tokens that would be the error of the state. What is left is the sum's own rounding: 2^20 additions to a sum
// of one sign, each within 2^-25 of it (6e-2 if all erred one way), or a sixteenth of them in chunks.
TEST(GatedLinearAttention, AMillionTokens) {
  constexpr int64_t kTokens = 1 << 20;
  for (const bool chunked : {true, false}) {
    Engine e;
    const GlaShape shape = shape_of(1, 1, 8, 8);
    Sequence s(shape, kTokens, Gates::kUsual, 11);
    // Channel 0 hardly forgets, channel 1 not at all, channel 2 everything at every token; keys and values of
    // one sign let the sums grow.
    for (int64_t t = 0; t < kTokens; ++t) {
      s.g[static_cast<size_t>(t * 8)] = -1.3e-6f;
      s.g[static_cast<size_t>(t * 8 + 1)] = 0;
      s.g[static_cast<size_t>(t * 8 + 2)] = -kInf;
    }
    for (float& x : s.k) x = std::fabs(x);
    for (float& x : s.v) x = std::fabs(x);
    std::vector<double> state(s.state.begin(), s.state.end());
    const auto out = exact(s, state);
    run(e, s, {chunked ? kTokens : 1});
    for (const float x : s.out) ASSERT_TRUE(std::isfinite(x));
    for (size_t c = 0; c < 8; ++c) {
      const std::span<float> found(&s.state[c * 8], 8);
      const std::span<double> expected(&state[c * 8], 8);
      EXPECT_LT(relative(found, expected), chunked ? 5e-5 : 1e-3) << c << (chunked ? " chunked" : " token by token");
    }
    EXPECT_LT(relative(std::vector<float>(s.out.end() - 800, s.out.end()), std::vector<double>(out.end() - 800, out.end())),
              chunked ? 5e-5 : 1e-3);
  }
}

TEST(GatedLinearAttention, ForgettingEverythingLeavesTheTokenAlone) {
  for (const int64_t tokens : {1, 20}) {
    Engine e;
    Sequence s(shape_of(1, 2, 16, 16), tokens, Gates::kUsual, 3);
    s.g.assign(s.g.size(), -kInf);
    run(e, s, {tokens});
    for (size_t c = 0; c < 16; ++c)
      for (size_t j = 0; j < 16; ++j)
        EXPECT_EQ(s.state[c * 16 + j], s.k[static_cast<size_t>(tokens - 1) * 16 + c] * s.v[static_cast<size_t>(tokens - 1) * 16 + j]);
  }
}

// Tokens to come are not seen: keys of any kind, values as long as 0 times them is 0.
TEST(GatedLinearAttention, IsCausal) {
  FOR_EACH_ISA(isa) {
    Engine e;
    Sequence a(shape_of(1, 3, 24, 24), 48, Gates::kUsual, 21), b = a;
    for (size_t i = 37 * 24; i < b.k.size(); ++i) b.k[i] = kInf;
    for (size_t i = 37 * 24; i < b.v.size(); ++i) b.v[i] = 1e30f;
    run(e, a, {48});
    run(e, b, {48});
    EXPECT_TRUE(std::equal(a.out.begin(), a.out.begin() + 37 * 72, b.out.begin()));
    EXPECT_FALSE(std::isfinite(b.out[37 * 72]));
  }
}

TEST(GatedLinearAttention, RefusesDecaysThatAreNone) {
  FOR_EACH_ISA(isa) {
    for (const int64_t tokens : {2, 100})
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), 1e-3f, kInf}) {
        Engine e;
        Sequence s(shape_of(2, 1, 20, 8), tokens, Gates::kUsual, 1);
        s.g[static_cast<size_t>(((tokens - 1) * 2 + 1) * 20 + 13)] = bad;
        try {
          run(e, s, {tokens});
          ADD_FAILURE() << "a log decay of " << bad << " went through";
        } catch (const BadInput& error) {
          const std::string expected = "token " + std::to_string(tokens - 1) + ", KV head 1, channel 13";
          EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
        }
      }
  }
}

TEST(GatedLinearAttention, RefusesShapesThatAreNone) {
  Engine e;
  Sequence s(shape_of(2, 2, 8, 8), 3, Gates::kUsual, 1);
  GlaSequence call = s.part(0, 3);
  for (const GlaShape& bad : {GlaShape{3, 2, 8, 8, 1}, GlaShape{4, 0, 8, 8, 1}, GlaShape{4, 2, 0, 8, 1},
                              GlaShape{4, 2, 8, -1, 1}, GlaShape{4, 2, 8, 8, 0}, GlaShape{4, 2, 8, 8, NAN}})
    EXPECT_THROW(gated_linear_attention(e.ctx, bad, {&call, 1}), BadInput);
  call.tokens = -1;
  EXPECT_THROW(gated_linear_attention(e.ctx, s.shape, {&call, 1}), BadInput);
  call.tokens = 3;
  call.state = nullptr;
  EXPECT_THROW(gated_linear_attention(e.ctx, s.shape, {&call, 1}), BadInput);
}

struct Last : TraceSink {
  void record(const OpRecord& r) override { last = r; }
  OpRecord last;
};

TEST(GatedLinearAttention, ReportsWhatItDid) {
  Engine e;
  Last trace;
  e.ctx.trace = &trace;
  Sequence a(shape_of(2, 3, 16, 24), 40, Gates::kUsual, 1), b(shape_of(2, 3, 16, 24), 1, Gates::kUsual, 2);
  const GlaSequence calls[] = {a.part(0, 40), b.part(0, 1)};
  gated_linear_attention(e.ctx, a.shape, calls);
  EXPECT_EQ(trace.last.kind, OpKind::kScan);
  EXPECT_EQ(trace.last.m, 41);
  // Outer product and reads for 41 tokens; attention in chunks of 16, 16 and 8 tokens.
  EXPECT_EQ(trace.last.macs, 41 * (2 + 6) * 16 * 24 + (136 + 136 + 36) * 6 * (16 + 24));
  EXPECT_EQ(trace.last.state_bytes, 2 * 2 * 2 * 16 * 24 * 4);
  EXPECT_EQ(trace.last.activation_bytes, 41 * 4 * (6 * 16 + 2 * (16 + 16 + 24) + 6 * 24));
}

}  // namespace
}  // namespace lacuna

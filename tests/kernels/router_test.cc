#include "kernels/router.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <limits>
#include <numeric>

#include "base/error.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::isa_levels;
using testing::normals;

class Recorder : public TraceSink {
 public:
  void record(const OpRecord& r) override { records.push_back(r); }
  std::vector<OpRecord> records;
};

struct Routing {
  std::vector<int32_t> expert;
  std::vector<float> p;
  friend bool operator==(const Routing&, const Routing&) = default;
};

Routing run(const RouterShape& shape, const std::vector<float>& w, const float* x, int64_t m, int threads = 2,
            ActivationType type = ActivationType::kF32) {
  Engine e(threads);
  e.ctx.activations = type;
  Routing r{std::vector<int32_t>(static_cast<size_t>(m * shape.top_k), -1),
            std::vector<float>(static_cast<size_t>(m * shape.top_k))};
  route(e.ctx, shape, w.data(), x, m, r.expert.data(), r.p.data());
  return r;
}

TEST(Route, MatchesASortInLongDouble) {
  EXPECT_TRUE(rc::check([] {
    RouterShape s;
    s.hidden = *rc::gen::inRange(1, 300);
    s.experts = *rc::gen::inRange(1, 40);
    s.top_k = *rc::gen::inRange(1, s.experts + 1);
    s.gate = *rc::gen::element(RouterGate::kSoftmax, RouterGate::kSigmoid);
    const auto m = *rc::gen::inRange<int64_t>(1, 60);
    const auto seed = *rc::gen::inRange<uint32_t>(0, 1000);
    const auto d = static_cast<size_t>(s.hidden), experts = static_cast<size_t>(s.experts),
               k = static_cast<size_t>(s.top_k);
    auto w = normals(experts * d, seed);
    if (*rc::gen::arbitrary<bool>()) std::copy_n(w.begin(), d, w.end() - static_cast<std::ptrdiff_t>(d));  // a tie
    const auto x = normals(static_cast<size_t>(m) * d, seed + 1);
    const Routing got = run(s, w, x.data(), m);
    for (size_t i = 0; i < static_cast<size_t>(m); ++i) {
      std::vector<long double> logit(experts);
      long double top = -1e9L, total = 0;
      for (size_t e = 0; e < experts; ++e) {
        for (size_t c = 0; c < d; ++c) logit[e] += static_cast<long double>(w[e * d + c]) * x[i * d + c];
        top = std::max(top, logit[e]);
      }
      for (const long double l : logit) total += std::exp(l - top);
      std::vector<int32_t> order(experts);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return logit[static_cast<size_t>(a)] > logit[static_cast<size_t>(b)];
      });
      for (size_t j = 0; j < k; ++j) {
        const auto e = static_cast<size_t>(got.expert[i * k + j]), wanted = static_cast<size_t>(order[j]);
        // Logits that differ by less than double's rounding may stand in either order; equal rows are exact.
        const bool right = e == wanted || (logit[e] != logit[wanted] && std::fabs(logit[e] - logit[wanted]) < 1e-12L);
        RC_ASSERT(right);
        const long double p =
            s.gate == RouterGate::kSoftmax ? std::exp(logit[e] - top) / total : 1 / (1 + std::exp(-logit[e]));
        RC_ASSERT(std::fabs(got.p[i * k + j] - p) <= 1e-7L * p + 1e-37L);
      }
    }
  }));
}

TEST(Route, TiesGoToTheLowerIndex) {
  const RouterShape s{3, 5, 4, RouterGate::kSigmoid};
  const std::vector<float> w = {1, 0, 0, 2, 0, 0, 2, 0, 0, 0, 7, 0, 2, 0, 0};
  const float x[] = {40, 0, 0};  // sigmoid of 40 and of 80 are both 1 in f32: the logits decide
  const Routing r = run(s, w, x, 1);
  EXPECT_EQ(r.expert, (std::vector<int32_t>{1, 2, 4, 0}));
  EXPECT_EQ(r.p, std::vector<float>(4, 1.0f));
}

TEST(Route, SameForAnyThreadsBatchActivationTypeAndIsa) {
  const RouterShape s{257, 16, 2, RouterGate::kSoftmax};
  const int64_t m = 500;
  const auto w = normals(16 * 257, 1), x = normals(static_cast<size_t>(m) * 257, 2);
  const Routing whole = run(s, w, x.data(), m, 1);
  EXPECT_EQ(run(s, w, x.data(), m, 3), whole);
  EXPECT_EQ(run(s, w, x.data(), m, 2, ActivationType::kBF16), whole);
  for (const Isa isa : isa_levels()) {
    const ScopedIsa held(isa);
    for (const int64_t step : {1, 7, 400}) {
      Routing parts;
      for (int64_t i = 0; i < m; i += step) {
        const Routing part = run(s, w, x.data() + i * 257, std::min(step, m - i));
        parts.expert.insert(parts.expert.end(), part.expert.begin(), part.expert.end());
        parts.p.insert(parts.p.end(), part.p.begin(), part.p.end());
      }
      EXPECT_EQ(parts, whole) << step;
    }
  }
}

TEST(Route, ExtremeLogitsStayDefined) {
  const RouterShape s{1, 3, 3, RouterGate::kSoftmax};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float x[] = {1};
  EXPECT_EQ(run(s, {3e38f, -3e38f, 0}, x, 1).p, (std::vector<float>{1, 0, 0}));
  // Distinct experts whatever the input; a NaN is handed on, not hidden.
  const Routing bad = run(s, {1, nan, 2}, x, 1);
  EXPECT_EQ(bad.expert, (std::vector<int32_t>{2, 0, 1}));
  EXPECT_TRUE(std::isnan(bad.p[0]));
  EXPECT_EQ(run(s, {nan, nan, nan}, x, 1).expert, (std::vector<int32_t>{0, 1, 2}));
}

TEST(Experts, GatherAndScatterMoveOnlyTheirRows) {
  EXPECT_TRUE(rc::check([] {
    const auto rows = *rc::gen::inRange<int64_t>(1, 200), d = *rc::gen::inRange<int64_t>(1, 400);
    std::vector<int32_t> token;
    for (int32_t i = 0; i < rows; ++i)
      if (*rc::gen::arbitrary<bool>()) token.push_back(i);
    const auto count = static_cast<int64_t>(token.size());
    const auto x = normals(static_cast<size_t>(rows * d), 1), y = normals(static_cast<size_t>(count * d), 2);
    const auto p = normals(static_cast<size_t>(count), 3);
    std::vector<float> gathered(static_cast<size_t>(count * d)), out = x;
    Engine e;
    gather_expert(e.ctx, 0, x.data(), rows, d, token.data(), count, gathered.data());
    scatter_expert(e.ctx, y.data(), count, d, token.data(), p.data(), rows, out.data());
    size_t at = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const bool chosen = at < token.size() && token[at] == i;
      for (int64_t c = 0; c < d; ++c) {
        const auto here = static_cast<size_t>(i * d + c), there = at * static_cast<size_t>(d) + static_cast<size_t>(c);
        if (chosen) RC_ASSERT(gathered[there] == x[here]);
        const double wanted = chosen ? x[here] + double{p[at]} * y[there] : x[here];
        RC_ASSERT(std::fabs(out[here] - wanted) <= (chosen ? 1e-6 * (1 + std::fabs(wanted)) : 0));
      }
      at += chosen;
    }
  }));
}

TEST(Experts, LedgerShowsRouterAndExperts) {
  Engine e;
  Recorder recorder;
  OpTotals totals;
  const RouterShape s{4, 3, 1, RouterGate::kSoftmax};
  const auto w = normals(12, 1), x = normals(20, 2);
  int32_t expert[5];
  float p[5], out[20];
  const int32_t token[] = {1, 4};
  e.ctx.layer = 2;
  e.ctx.trace = &recorder;
  route(e.ctx, s, w.data(), x.data(), 5, expert, p);
  gather_expert(e.ctx, 1, x.data(), 5, 4, token, 2, out);
  ASSERT_EQ(recorder.records.size(), 2u);
  const OpRecord &r = recorder.records[0], &g = recorder.records[1];
  EXPECT_EQ(r.kind, OpKind::kRouter);
  EXPECT_EQ(r.macs, 5 * 3 * 4);
  EXPECT_EQ(r.weight_bytes, 12 * 4);
  EXPECT_EQ(g.kind, OpKind::kExpert);
  EXPECT_EQ(g.n, 1);
  EXPECT_EQ(g.m, 2);
  EXPECT_EQ(g.experts, 1);
  for (const auto& record : recorder.records) totals.record(record);
  totals.record(g);
  EXPECT_EQ(totals.expert_tokens(), (std::vector<std::vector<int64_t>>{{}, {}, {0, 4, 0}}));
  EXPECT_EQ(totals.of(OpKind::kExpert).experts, 2);
  totals.reset();
  EXPECT_TRUE(totals.expert_tokens().empty());
}

TEST(Experts, RefuseBadRequests) {
  Engine e;
  float x[64] = {};
  int32_t id[8] = {};
  EXPECT_THROW(route(e.ctx, {4, 3, 0}, x, x, 2, id, x), BadInput);
  EXPECT_THROW(route(e.ctx, {4, 3, 4}, x, x, 2, id, x), BadInput);
  EXPECT_THROW(route(e.ctx, {0, 3, 1}, x, x, 2, id, x), BadInput);
  EXPECT_THROW(route(e.ctx, {4, 3, 1}, nullptr, x, 2, id, x), BadInput);
  EXPECT_THROW(route(e.ctx, {4, 3, 1}, x, x, -1, id, x), BadInput);
  route(e.ctx, {4, 3, 1}, nullptr, nullptr, 0, nullptr, nullptr);
  id[1] = 5;
  EXPECT_THROW(gather_expert(e.ctx, 0, x, 5, 4, id, 2, x + 32), BadInput);
  EXPECT_THROW(scatter_expert(e.ctx, x, 2, 4, id, x, 5, x + 32), BadInput);
  id[1] = -1;
  EXPECT_THROW(gather_expert(e.ctx, 0, x, 5, 4, id, 2, x + 32), BadInput);
  EXPECT_THROW(gather_expert(e.ctx, -1, x, 5, 4, id, 1, x + 32), BadInput);
}

}  // namespace
}  // namespace lacuna

#include "kernels/attention.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "kernels/cpu/attention_ops.h"
#include "kernels/kv_fixture.h"

namespace lacuna {
namespace {

using testing::Engine;
using testing::exact_attention;
using testing::exact_rows;
using testing::Head;
using testing::isa_levels;
using testing::max_error;
using testing::normals;
using testing::random_head;

#define FOR_EACH_ISA(level)                                               \
  for (const Isa level : isa_levels())                                    \
    if (const ScopedIsa held(level); true)                                \
      if (const ::testing::ScopedTrace where(__FILE__, __LINE__, isa_name(level)); true)

struct Sequence {
  std::vector<Head> heads;
  std::vector<KvHeadView> views;
  std::vector<float> q, out;
  int64_t tokens = 0, first_position = 0;

  Sequence(const KvLayout& layout, std::vector<int64_t> old, int group, int64_t new_tokens, int64_t first, uint32_t seed)
      : tokens(new_tokens), first_position(first) {
    for (size_t g = 0; g < old.size(); ++g)
      heads.push_back(random_head(layout, old[g], tokens, first, seed + static_cast<uint32_t>(g) * 100));
    for (const Head& h : heads) views.push_back(h.view());
    q = normals(static_cast<size_t>(tokens) * old.size() * static_cast<size_t>(group * layout.head_dim), seed + 50);
    out.assign(q.size(), -7.0f);
  }
  AttentionSequence call() { return {q.data(), out.data(), tokens, first_position, views.data()}; }
};

AttentionShape shape_of(int kv_heads, int group, int d, int64_t window = 0) {
  return {kv_heads * group, kv_heads, 1.0f / std::sqrt(static_cast<float>(d)), window, 0, 0};
}

void run(Engine& e, const KvLayout& layout, const AttentionShape& shape, Sequence& s) {
  const AttentionSequence call = s.call();
  attention(e.ctx, layout, shape, {&call, 1});
}

double error_of(const KvLayout& layout, const AttentionShape& shape, const Sequence& s) {
  const auto exact = exact_attention(s.heads, layout.head_dim, shape.query_heads / shape.kv_heads, s.q.data(), s.tokens,
                                     s.first_position, shape.scale, shape.window);
  return max_error(s.out, exact);
}

double max_value(const Sequence& s) {
  double m = 0;
  for (const Head& h : s.heads)
    for (const double x : h.v) m = std::max(m, std::fabs(x));
  return m;
}

const std::vector<DType> kCacheTypes = {DType::kF32, DType::kBF16, DType::kI8};
const std::vector<int> kHeadDims = {8, 16, 24, 40, 64, 80, 96, 128, 200, 256, 7, 33};

TEST(Attention, MatchesDoubleForRandomShapes) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      KvLayout layout;
      layout.dtype = *rc::gen::elementOf(kCacheTypes);
      layout.head_dim = *rc::gen::elementOf(kHeadDims);
      layout.page_slots = *rc::gen::element(4, 16, 32, 48);
      const int group = *rc::gen::inRange(1, 9), kv_heads = *rc::gen::inRange(1, 4);
      const auto tokens = *rc::gen::oneOf(rc::gen::inRange<int64_t>(1, 5), rc::gen::inRange<int64_t>(1, 90));
      std::vector<int64_t> old;
      for (int g = 0; g < kv_heads; ++g) old.push_back(*rc::gen::inRange<int64_t>(0, 400));
      const int64_t window = *rc::gen::element<int64_t>(0, 0, 1, 30, 200);
      Sequence s(layout, old, group, tokens, 500, *rc::gen::arbitrary<uint32_t>() / 2);
      const auto shape = shape_of(kv_heads, group, layout.head_dim, window);
      Engine f32;
      run(f32, layout, shape, s);
      RC_ASSERT(error_of(layout, shape, s) <= 1e-5);
      Engine bf16(2, ActivationType::kBF16);
      run(bf16, layout, shape, s);
      RC_ASSERT(error_of(layout, shape, s) <= 1e-2 * max_value(s));
    }));
  }
}

// Decode with narrow operands: two digits of a query and of a probability lose far less than bf16 would,
// whatever the page, the group, an outlier among the query's channels.
TEST(Attention, DecodeOverCodesIsAsGoodAsItsOperands) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      KvLayout layout;
      layout.dtype = *rc::gen::element(DType::kBF16, DType::kI8);
      layout.head_dim = *rc::gen::element(32, 64, 96, 128, 192, 256);
      layout.page_slots = *rc::gen::element(1, 4, 8, 10, 32, 48, 300);
      const int group = *rc::gen::inRange(1, 17), kv_heads = *rc::gen::inRange(1, 3);
      std::vector<int64_t> old;
      for (int g = 0; g < kv_heads; ++g) old.push_back(*rc::gen::inRange<int64_t>(0, 1500));
      const int64_t window = *rc::gen::element<int64_t>(0, 0, 0, 7, 300);
      Sequence s(layout, old, group, 1, 2000, *rc::gen::arbitrary<uint32_t>() / 2);
      const auto shape = shape_of(kv_heads, group, layout.head_dim, window);
      Engine e(1, ActivationType::kBF16);
      run(e, layout, shape, s);
      RC_ASSERT(error_of(layout, shape, s) <= (layout.dtype == DType::kI8 ? 2e-4 : 6e-3) * max_value(s));
      for (size_t i = 0; i < s.q.size(); i += static_cast<size_t>(layout.head_dim)) s.q[i] = 12;
      run(e, layout, shape, s);
      RC_ASSERT(error_of(layout, shape, s) <= (layout.dtype == DType::kI8 ? 6e-4 : 1e-2) * max_value(s));
    }));
  }
}

// Products take two or four slots at a time, over all pages of a step; what lies behind the last one's probability must
// not count, and with odd pages that is another slot's, or another buffer's.
TEST(Attention, NarrowValuesStopAtTheLastSlot) {
  const cpu::NarrowOps* narrow_ops = cpu::attention_ops(detected_isa()).narrow;
  if (!narrow_ops) return;  // a processor without these bodies
  const cpu::NarrowOps& ops = *narrow_ops;
  constexpr int kTile = cpu::kStreamTile;
  for (const int dim : {64, 128})
    for (const int count : {1, 2, 3, 5, 30, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128})
      for (const int page : {4, 10, 32, 128})
        for (const int rows : {1, 2, 3, 5, 7, 8, 16}) {
          std::vector<BF16> values(static_cast<size_t>(kTile * dim)), weights(static_cast<size_t>((rows + 1) * kTile), to_bf16(NAN));
          for (size_t i = 0; i < values.size(); ++i) values[i] = to_bf16(static_cast<float>(i % 7) - 3);
          std::vector<int8_t> codes(values.size());
          for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i % 7) - 3;
          std::vector<float> p(weights.size(), NAN);
          std::vector<uint8_t> digits(2 * weights.size(), 0xff);
          const std::vector<float> scale(static_cast<size_t>(rows), 1.0f / 40000);
          for (int s = 0; s < count; ++s)
            for (int i = 0; i < rows; ++i) {
              const float x = static_cast<float>(1 + (i + s + s / 4) % 7) / 8;
              p[static_cast<size_t>(i * kTile + s)] = x;
              weights[static_cast<size_t>(i * kTile + s)] = to_bf16(x);
              const int t = static_cast<int>(x * 40000);
              digits[static_cast<size_t>(2 * i * kTile + s)] = static_cast<uint8_t>(t >> 8);
              digits[static_cast<size_t>((2 * i + 1) * kTile + s)] = static_cast<uint8_t>(t & 255);
            }
          for (const DType dtype : {DType::kBF16, DType::kI8}) {
            if (!ops.takes(dtype, rows, dim)) continue;
            const bool narrow = dtype == DType::kI8;
            std::vector<cpu::SlotRun> runs;
            for (int s = 0; s < count; s += page)
              runs.push_back({narrow ? static_cast<void*>(&codes[static_cast<size_t>(s * dim)]) : &values[static_cast<size_t>(s * dim)],
                              nullptr, std::min(page, count - s), nullptr});
            std::vector<float> out(static_cast<size_t>(rows * dim), 0.0f);
            ops.values(dtype, runs.data(), static_cast<int>(runs.size()), dim,
                       narrow ? static_cast<void*>(digits.data()) : weights.data(), scale.data(), rows, out.data(), dim);
            ops.restore(dtype, out.data(), dim, rows, dim);
            for (int i = 0; i < rows; ++i)
              for (int c = 0; c < dim; ++c) {
                double expected = 0;
                for (int s = 0; s < count; ++s)
                  expected += p[static_cast<size_t>(i * kTile + s)] * codes[static_cast<size_t>(s * dim + c)];
                ASSERT_NEAR(out[static_cast<size_t>(i * dim + c)], expected, 4e-3)
                    << dtype_name(dtype) << " d " << dim << " count " << count << " page " << page << " row " << i << " of "
                    << rows << " column " << c;
              }
          }
        }
}

// Two steps with a larger maximum in the second, columns that are not seen, and scores far below the maximum.
TEST(Attention, NarrowSoftmaxMatchesDouble) {
  const cpu::NarrowOps* ops = cpu::attention_ops(detected_isa()).narrow;
  if (!ops) return;
  constexpr int kRows = 3, kLd = cpu::kStreamTile;
  for (const DType dtype : {DType::kBF16, DType::kI8})
    for (const int columns : {32, 64, 96, 128})
      for (const int hidden : {0, 5}) {
        const bool narrow = dtype == DType::kI8;
        float max[kRows], shrink[kRows] = {};
        std::fill_n(max, kRows, -INFINITY);
        const auto n = static_cast<size_t>(columns);
        std::vector<float> sums(kRows * 16), scale(kRows), weights(n);
        std::vector<BF16> pairs(kRows * kLd);
        const auto* digits = reinterpret_cast<const uint8_t*>(pairs.data());
        for (size_t c = 0; c < n; ++c) weights[c] = 0.01f * static_cast<float>(1 + c % 5);
        const std::vector<int32_t> begin(kRows, hidden), end(kRows, columns - hidden);
        double total[kRows] = {};
        for (const float shift : {0.0f, 20.0f}) {
          auto scores = normals(kRows * kLd, 7);
          for (size_t i = 0; i < scores.size(); ++i) scores[i] = scores[i] * 8 + shift - (i % 11 == 0 ? 400.0f : 0.0f);
          const cpu::SlotRun run[2] = {{nullptr, weights.data(), 21, nullptr}, {nullptr, &weights[21], columns - 21, nullptr}};
          ops->softmax(dtype, {scores.data(), kLd, kRows, begin.data(), end.data(), 0, columns, 0.5f, max, sums.data(),
                               shrink, pairs.data(), scale.data()}, run, 2);
          for (size_t i = 0; i < kRows; ++i) {
            total[i] *= shrink[i];
            double most = 0;
            for (size_t c = 0; c < n; ++c) {
              const bool seen = c >= static_cast<size_t>(hidden) && c < n - static_cast<size_t>(hidden);
              const double x = seen ? std::exp2(0.5 * scores[i * kLd + c] - max[i]) : 0;
              total[i] += x;
              const double expected = narrow ? x * weights[c] : x;
              const double got = narrow ? scale[i] * (256.0 * digits[2 * i * kLd + c] + digits[(2 * i + 1) * kLd + c])
                                        : to_float(pairs[i * kLd + c]);
              // Half a step of the digits.
              EXPECT_NEAR(got, expected, (narrow ? 6e-6 : 4.1e-3) * expected + (narrow ? 0.51 * scale[i] : 1e-30))
                  << columns << " columns, " << i << " " << c;
              most = std::max(most, expected);
            }
            const float* at = &sums[i * 16];
            EXPECT_NEAR(std::accumulate(at, at + 16, 0.0), total[i], (narrow ? 6e-6 : 1e-4) * total[i]);
            if (narrow) {
              EXPECT_NEAR(scale[i] * 65535, most, 6e-6 * most);
            }
          }
        }
      }
}

// Heads in lanes, from queries to sums: two steps with larger maxima in the second, slots that some rows do not see,
// pages whose last one ends anywhere, and nothing but NaN behind what is there. Scores near 20 take up the error of a
// query's digits.
TEST(Attention, HeadsInLanesMatchDouble) {
  const cpu::NarrowOps* ops = cpu::attention_ops(detected_isa()).heads;
  if (!ops) return;
  constexpr DType kType = DType::kI8;
  constexpr size_t kTile = cpu::kStreamTile;
  EXPECT_FALSE(ops->takes(kType, 6, 64) || ops->takes(kType, 9, 64) || ops->takes(kType, 8, 32) ||
               ops->takes(DType::kBF16, 8, 64));
  for (const int dim : {64, 128})
    for (const int rows : {7, 8})
      for (const int count : {1, 2, 5, 8, 31, 32, 33, 60, 64, 96, 127, 128})
        for (const int page : {8, 24, 32, 128})
          for (const int hidden : {0, 3}) {
            ASSERT_TRUE(ops->takes(kType, rows, dim));
            const auto d = static_cast<size_t>(dim), n = static_cast<size_t>(count), m = static_cast<size_t>(rows);
            const auto q = normals(static_cast<int64_t>(m * d), 3);
            const auto bytes = static_cast<size_t>(ops->query_bytes(kType, rows, dim)) / 64 + 1;
            struct alignas(64) Line {
              char bytes[64];
            };
            std::vector<Line> query(bytes);
            ops->prepare(kType, q.data(), dim, rows, dim, query.data());
            float max[8], shrink[8], digit_scale[8];
            std::fill_n(max, 8, -INFINITY);
            std::vector<float> sums(8 * 16), out(m * d);
            std::vector<double> expected(m * d), total(m), top(m, -INFINITY);
            double most = 0;
            uint32_t random = 1;
            for (const float size : {0.01f, 0.05f}) {
              std::vector<int8_t> codes(2 * kTile * d);
              for (int8_t& c : codes)
                c = static_cast<int8_t>(static_cast<int>((random = random * 1664525u + 1013904223u) >> 24) % 255 - 127);
              std::vector<float> key_scale(kTile + 16, NAN), value_scale(kTile + 16, NAN);
              for (size_t i = 0; i < n; ++i) key_scale[i] = size / static_cast<float>(1 + i % 3);
              for (size_t i = 0; i < n; ++i) value_scale[i] = 0.02f * static_cast<float>(i % 4);
              std::vector<cpu::SlotRun> keys, values;
              for (int i = 0; i < count; i += page) {
                const auto at = static_cast<size_t>(i);
                keys.push_back({&codes[at * d], &key_scale[at], std::min(page, count - i), nullptr});
                values.push_back({&codes[(kTile + at) * d], &value_scale[at], std::min(page, count - i), nullptr});
              }
              const int runs = static_cast<int>(keys.size()), to = (count + 31) / 32 * 32;
              std::vector<int32_t> begin, end;
              for (int i = 0; i < rows; ++i) {
                begin.push_back(hidden * (i % 3));
                end.push_back(std::max(begin.back(), count - hidden * (i % 2)));
              }
              std::vector<float> scores(8 * kTile + 32, NAN);
              std::vector<uint8_t> p(16 * kTile, 0xff);
              ops->scores(kType, keys.data(), runs, dim, query.data(), rows, scores.data(), kTile);
              ops->softmax(kType,
                           {scores.data(), kTile, rows, begin.data(), end.data(), 0, to, 0.3f, max, sums.data(), shrink,
                            p.data(), digit_scale},
                           values.data(), runs);
              for (size_t i = 0; i < m * d; ++i) out[i] *= shrink[i / d];
              ops->values(kType, values.data(), runs, dim, p.data(), digit_scale, rows, out.data(), dim);
              for (size_t i = 0; i < m; ++i) {
                total[i] *= shrink[i];
                for (size_t c = 0; c < d; ++c) expected[i * d + c] *= shrink[i];
                for (auto s = static_cast<size_t>(begin[i]); s < static_cast<size_t>(end[i]); ++s) {
                  double dot = 0;
                  for (size_t c = 0; c < d; ++c)
                    dot += q[i * d + c] * static_cast<double>(codes[s * d + c]) * key_scale[s];
                  top[i] = std::max(top[i], 0.3 * dot);
                  const double x = std::exp2(0.3 * dot - max[i]);
                  total[i] += x;
                  for (size_t c = 0; c < d; ++c) expected[i * d + c] += x * value_scale[s] * codes[(kTile + s) * d + c];
                }
                if (total[i] > 0) {
                  ASSERT_NEAR(max[i], top[i] - 4, 4.01) << i;
                }
              }
            }
            ops->restore(kType, out.data(), dim, rows, dim);
            for (size_t i = 0; i < m * d; ++i)
              if (total[i / d] > 0) most = std::max(most, std::fabs(expected[i] / total[i / d]));
            for (size_t i = 0; i < m; ++i) {
              const double got = std::accumulate(&sums[i * 16], &sums[i * 16] + 16, 0.0);
              ASSERT_NEAR(got, total[i], 4e-4 * total[i])
                  << "d " << dim << " count " << count << " row " << i << " of " << rows;
              for (size_t c = 0; c < d; ++c)
                ASSERT_NEAR(out[i * d + c], expected[i * d + c], 4e-4 * most * total[i])
                    << "d " << dim << " count " << count << " page " << page << " hidden " << hidden << " row " << i
                    << " of " << rows << " column " << c;
            }
          }
}

// Seven and eight rows over int8, of one token or several, that begin within a page.
TEST(Attention, HeadsInLanesBeginAnywhere) {
  for (const auto& [group, tokens] : {std::pair(8, 1), {7, 1}, {4, 2}, {1, 7}, {2, 4}})
    for (const int page : {8, 32, 48})
      for (const int64_t window : {3, 50, 1001}) {
        const KvLayout layout{DType::kI8, 64, page};
        const auto shape = shape_of(2, group, 64, window);
        Engine e(1, ActivationType::kBF16);
        Sequence s(layout, {1500, 333}, group, tokens, 1600, 13);
        run(e, layout, shape, s);
        EXPECT_LE(error_of(layout, shape, s), 2e-4 * max_value(s))
            << group << " heads, page " << page << ", window " << window;
      }
}

TEST(Attention, DecodeOverCodesKeepsNanAndHugeScores) {
  FOR_EACH_ISA(isa) {
    for (const auto& [dtype, group] : {std::pair(DType::kBF16, 3), {DType::kI8, 3}, {DType::kI8, 8}}) {
      const KvLayout layout{dtype, 64, 32};
      const auto shape = shape_of(1, group, 64);
      Engine e(1, ActivationType::kBF16);
      Sequence s(layout, {200}, group, 1, 300, 5);
      for (size_t i = 0; i < 64; ++i) s.q[i] = i == 9 ? NAN : 1.0f;
      for (size_t i = 64; i < 128; ++i) s.q[i] = 0;
      for (size_t i = 128; i < 192; ++i) s.q[i] *= 300;
      run(e, layout, shape, s);
      for (size_t i = 0; i < 64; ++i) EXPECT_TRUE(std::isnan(s.out[i])) << i;
      // A query of zeros sees the mean of all values; one with scores near 1000 hardly more than one slot.
      for (size_t i = 0; i < 64; ++i) {
        double mean = 0;
        for (size_t t = 0; t < 201; ++t) mean += s.heads[0].v[t * 64 + i] / 201;
        EXPECT_NEAR(s.out[64 + i], mean, dtype == DType::kI8 ? 1e-5 : 1e-3) << i;
        EXPECT_TRUE(std::isfinite(s.out[128 + i])) << i;
      }
    }
  }
}

TEST(Attention, LongHeadsAreSplitAndMerged) {
  FOR_EACH_ISA(isa) {
    for (const DType dtype : kCacheTypes)
      for (const int64_t tokens : {1, 4, 30}) {
        const KvLayout layout{dtype, 64, 32};
        Sequence s(layout, {5000, 1021, 3}, 3, tokens, 9000, 11);
        Engine e, rounded(2, ActivationType::kBF16);
        for (const int64_t window : {0, 1500, 8000}) {
          const auto shape = shape_of(3, 3, 64, window);
          run(e, layout, shape, s);
          EXPECT_LE(error_of(layout, shape, s), 1e-5) << tokens << " tokens, window " << window;
          run(rounded, layout, shape, s);
          EXPECT_LE(error_of(layout, shape, s), 1e-2 * max_value(s)) << tokens << " tokens, window " << window;
        }
      }
  }
}

TEST(Attention, LargeScoresDoNotOverflow) {
  const KvLayout layout{DType::kF32, 64, 32};
  Sequence s(layout, {300}, 2, 40, 300, 5);
  for (float& x : s.q) x *= 300;
  auto shape = shape_of(1, 2, 64);
  FOR_EACH_ISA(isa) {
    for (const int64_t tokens : {int64_t{40}, int64_t{1}}) {
      Sequence t(layout, {300}, 2, tokens, 300, 5);
      for (float& x : t.q) x *= 300;
      Engine e;
      run(e, layout, shape, t);
      // Scores near 2000 hold 1e-4 in f32; so do the exponents, and the probabilities.
      EXPECT_LE(error_of(layout, shape, t), 2e-3);
    }
  }
}

TEST(Attention, ChunkedPrefillEqualsOneCall) {
  const KvLayout layout{DType::kBF16, 64, 32};
  for (const int64_t window : {0, 150}) {
    const auto shape = shape_of(2, 3, 64, window);
    Sequence whole(layout, {0, 0}, 3, 700, 0, 3);
    FOR_EACH_ISA(isa) {
      Engine e;
      run(e, layout, shape, whole);
      std::vector<float> chunked(whole.q.size());
      for (int64_t t = 0; t < whole.tokens;) {
        const int64_t n = std::min<int64_t>(t == 0 ? 333 : t < 500 ? 100 : 1, whole.tokens - t);
        std::vector<KvHeadView> views = whole.views;
        for (KvHeadView& v : views) v.length = t + n;
        const AttentionSequence call{&whole.q[static_cast<size_t>(t * 384)], &chunked[static_cast<size_t>(t * 384)], n, t,
                                     views.data()};
        attention(e.ctx, layout, shape, {&call, 1});
        t += n;
      }
      for (size_t i = 0; i < chunked.size(); ++i) ASSERT_NEAR(chunked[i], whole.out[i], 1e-5) << i;
    }
  }
}

TEST(Attention, SameBitsForAnyThreadsAndAnyCompany) {
  for (const auto& [dtype, group] : {std::pair(DType::kF32, 4), {DType::kBF16, 4}, {DType::kI8, 4}, {DType::kI8, 8}})
    for (const ActivationType activations : {ActivationType::kF32, ActivationType::kBF16}) {
      const KvLayout layout{dtype, 64, 32};
      const auto shape = shape_of(2, group, 64);
      std::vector<Sequence> batch;
      batch.emplace_back(layout, std::vector<int64_t>{2500, 40}, group, 1, 5000, 1);
      batch.emplace_back(layout, std::vector<int64_t>{0, 0}, group, 300, 0, 2);
      batch.emplace_back(layout, std::vector<int64_t>{7, 3000}, group, 3, 4000, 3);
      batch.emplace_back(layout, std::vector<int64_t>{0, 1}, group, 1, 1, 4);
      batch.emplace_back(layout, std::vector<int64_t>{2000, 2000}, group, 25, 2000, 5);
      std::vector<std::vector<float>> alone;
      Engine one(1, activations), three(3, activations);
      for (Sequence& s : batch) {
        run(one, layout, shape, s);
        alone.push_back(s.out);
        s.out.assign(s.out.size(), 0);
      }
      std::vector<AttentionSequence> calls;
      for (Sequence& s : batch) calls.push_back(s.call());
      attention(three.ctx, layout, shape, calls);
      for (size_t i = 0; i < batch.size(); ++i) EXPECT_EQ(batch[i].out, alone[i]) << "sequence " << i;
    }
}

TEST(Attention, StridedRowsAndEmptySequences) {
  const KvLayout layout{DType::kF32, 16, 32};
  auto shape = shape_of(1, 2, 16);
  Sequence s(layout, {60}, 2, 20, 60, 9);
  Engine e;
  run(e, layout, shape, s);
  std::vector<float> q(20 * 50, 9.0f), out(20 * 40, -3.0f);
  for (int64_t t = 0; t < 20; ++t) std::copy_n(&s.q[static_cast<size_t>(t * 32)], 32, &q[static_cast<size_t>(t * 50)]);
  shape.q_stride = 50;
  shape.out_stride = 40;
  const AttentionSequence calls[] = {{}, {q.data(), out.data(), 20, 60, s.views.data()}};
  attention(e.ctx, layout, shape, calls);
  for (int64_t t = 0; t < 20; ++t) {
    for (int64_t c = 0; c < 32; ++c)
      ASSERT_EQ(out[static_cast<size_t>(t * 40 + c)], s.out[static_cast<size_t>(t * 32 + c)]);
    for (int64_t c = 32; c < 40; ++c) ASSERT_EQ(out[static_cast<size_t>(t * 40 + c)], -3.0f);
  }
}

TEST(Attention, HotLoopsAllocateNothingNew) {
  const KvLayout layout{DType::kI8, 64, 32};
  const auto shape = shape_of(2, 3, 64);
  Sequence s(layout, {3000, 100}, 3, 1, 3000, 9);
  Engine e;
  run(e, layout, shape, s);
  const size_t held = e.memory.now(MemoryTag::kScratch);
  e.memory.set_limit(MemoryTag::kScratch, held);
  run(e, layout, shape, s);
  EXPECT_EQ(e.memory.peak(MemoryTag::kScratch), held);
}

class Records : public TraceSink {
 public:
  void record(const OpRecord& r) override { all.push_back(r); }
  std::vector<OpRecord> all;
};

TEST(Attention, ReportsWhatItRead) {
  const KvLayout layout{DType::kI8, 64, 32};
  Sequence s(layout, {100, 10}, 3, 5, 100, 9);
  Engine e;
  Records records;
  e.ctx.trace = &records;
  e.ctx.layer = 6;
  run(e, layout, shape_of(2, 3, 64), s);
  run(e, layout, shape_of(2, 3, 64, 4), s);
  ASSERT_EQ(records.all.size(), 2u);
  const OpRecord& r = records.all[0];
  EXPECT_EQ(r.kind, OpKind::kAttention);
  EXPECT_EQ(r.layer, 6);
  EXPECT_EQ(r.m, 5 * 6);
  EXPECT_EQ(r.n, 105);
  EXPECT_EQ(r.k, 64);
  const int64_t pairs = 5 * 100 + 15 + 5 * 10 + 15;
  EXPECT_EQ(r.macs, pairs * 3 * 2 * 64);
  EXPECT_EQ(r.kv_read_bytes, (105 + 15) * 2 * (64 + 4));
  EXPECT_EQ(r.activation_bytes, 2 * 5 * 6 * 64 * 4);
  // Positions 97 … 104 are in reach of the first query (100), as far as the heads still hold them.
  int64_t in_reach = 0;
  for (const Head& h : s.heads)
    for (const int32_t p : h.positions) in_reach += p > 96;
  EXPECT_EQ(records.all[1].kv_read_bytes, in_reach * 2 * (64 + 4));
}

TEST(Attention, RefusesWhatItCannotDo) {
  const KvLayout layout{DType::kF32, 16, 32};
  Sequence s(layout, {10}, 2, 2, 10, 1);
  Engine e;
  const auto good = shape_of(1, 2, 16);
  const auto with = [&](auto change) {
    AttentionShape shape = good;
    change(shape);
    run(e, layout, shape, s);
  };
  EXPECT_THROW(with([](auto& x) { x.query_heads = 0; }), BadInput);
  EXPECT_THROW(with([](auto& x) { x.kv_heads = 3; }), BadInput);
  EXPECT_THROW(with([](auto& x) { x.scale = 0; }), BadInput);
  EXPECT_THROW(with([](auto& x) { x.scale = NAN; }), BadInput);
  EXPECT_THROW(with([](auto& x) { x.window = -1; }), BadInput);
  EXPECT_THROW(with([](auto& x) { x.q_stride = 31; }), BadInput);
  EXPECT_THROW(with([](auto& x) { x.out_stride = 1; }), BadInput);
  KvLayout f16 = layout;
  f16.dtype = DType::kF16;
  EXPECT_THROW(run(e, f16, good, s), Unsupported);
  KvLayout no_dim = layout;
  no_dim.head_dim = 0;
  EXPECT_THROW(run(e, no_dim, good, s), BadInput);
  AttentionSequence call = s.call();
  call.tokens = 13;
  EXPECT_THROW(attention(e.ctx, layout, good, {&call, 1}), BadInput);
  call = s.call();
  call.q = nullptr;
  EXPECT_THROW(attention(e.ctx, layout, good, {&call, 1}), BadInput);
  call = s.call();
  call.first_position = int64_t{1} << 31;
  EXPECT_THROW(attention(e.ctx, layout, good, {&call, 1}), BadInput);
  try {
    with([](auto& x) { x.q_stride = 31; });
  } catch (const BadInput& error) {
    EXPECT_STREQ(error.what(), "attention: q_stride is 31; a row has 32 elements");
  }
}

// ---- scores for eviction --------------------------------------------------------------------------

TEST(WindowAttention, MatchesDoubleForRandomShapes) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      const KvLayout layout{*rc::gen::elementOf(kCacheTypes), *rc::gen::elementOf(kHeadDims), *rc::gen::element(16, 32)};
      const int d = layout.head_dim, r = *rc::gen::inRange(1, 6);
      const auto w = *rc::gen::inRange<int64_t>(1, 70), old = *rc::gen::inRange<int64_t>(0, 500);
      const int64_t window = *rc::gen::element<int64_t>(0, 0, 1, 100), stride = r * d + 5;
      const Head head = random_head(layout, old, w, 600, *rc::gen::arbitrary<uint32_t>() / 2);
      const auto q = normals(static_cast<size_t>(w * stride), 8);
      std::vector<float> probs(static_cast<size_t>(r * w * head.length()), -1.0f);
      const float scale = 1.0f / std::sqrt(static_cast<float>(d));
      Engine e(2, ActivationType::kBF16);
      window_attention(e.ctx, layout, head.view(), q.data(), w, r, stride, 600, scale, window, probs.data());
      for (int j = 0; j < r; ++j) {
        const auto exact = exact_rows(head, d, &q[static_cast<size_t>(j * d)], w, stride, 600, scale, window);
        const auto n = static_cast<size_t>(w * head.length());
        const std::vector<float> got(probs.begin() + static_cast<int64_t>(n) * j,
                                     probs.begin() + static_cast<int64_t>(n) * (j + 1));
        RC_ASSERT(max_error(got, exact) <= 2e-6);
        for (size_t i = 0; i < n; ++i)
          if (exact[i] == 0) RC_ASSERT(got[i] == 0);
      }
    }));
  }
}

TEST(ColumnSums, MatchDoubleAndAccumulate) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      const KvLayout layout{*rc::gen::elementOf(kCacheTypes), *rc::gen::elementOf(kHeadDims), 32};
      const int d = layout.head_dim, r = *rc::gen::inRange(1, 4);
      const auto tokens = *rc::gen::inRange<int64_t>(1, 500), old = *rc::gen::inRange<int64_t>(0, 200);
      const int64_t window = *rc::gen::element<int64_t>(0, 0, 60), stride = r * d;
      const Head head = random_head(layout, old, tokens, 300, *rc::gen::arbitrary<uint32_t>() / 2);
      const int64_t n = head.length();
      const auto q = normals(static_cast<size_t>(tokens * stride), 8);
      const float scale = 1.0f / std::sqrt(static_cast<float>(d));
      std::vector<float> sums(static_cast<size_t>(r * n), 2.0f), again = sums;
      Engine two(2), one(1);
      attention_column_sums(two.ctx, layout, head.view(), q.data(), tokens, r, 0, 300, scale, window, sums.data());
      attention_column_sums(one.ctx, layout, head.view(), q.data(), tokens, r, 0, 300, scale, window, again.data());
      RC_ASSERT(sums == again);
      for (int j = 0; j < r; ++j) {
        const auto exact = exact_rows(head, d, &q[static_cast<size_t>(j * d)], tokens, stride, 300, scale, window);
        for (int64_t i = 0; i < n; ++i) {
          double column = 2;
          for (int64_t t = 0; t < tokens; ++t) column += exact[static_cast<size_t>(t * n + i)];
          RC_ASSERT(std::fabs(sums[static_cast<size_t>(j * n + i)] - column) <= 1e-5 * (1 + column));
        }
      }
    }));
  }
}

TEST(TriangleProducts, MatchDouble) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      const int d = *rc::gen::element(1, 2, 3, 5, 8, 16, 30, 33, 64, 80, 128), n = *rc::gen::inRange(1, 4);
      const auto count = *rc::gen::inRange<int64_t>(1, 250), extra = *rc::gen::inRange<int64_t>(0, 3),
                 ld = count + extra;
      const auto values = normals(static_cast<size_t>(count * d), *rc::gen::arbitrary<uint32_t>() / 2);
      auto full = normals(static_cast<size_t>(n * d * d), 9);
      std::vector<float> packed(static_cast<size_t>(n * packed_triangle(d)));
      for (int t = 0; t < n; ++t) {
        for (int i = 0; i < d; ++i)
          for (int j = 0; j < i; ++j) full[static_cast<size_t>((t * d + i) * d + j)] = NAN;  // not looked at
        pack_triangle(&full[static_cast<size_t>(t * d * d)], d, &packed[static_cast<size_t>(t * packed_triangle(d))]);
      }
      for (const bool squares : {false, true}) {
        std::vector<float> out(static_cast<size_t>(n * ld), -7.0f), again = out;
        Engine one(1), two(2);
        triangle_products(one.ctx, values.data(), count, d, packed.data(), n, squares, out.data(), ld);
        triangle_products(two.ctx, values.data(), count, d, packed.data(), n, squares, again.data(), ld);
        RC_ASSERT(out == again);
        for (int t = 0; t < n; ++t) {
          for (int64_t v = 0; v < ld; ++v) {
            const float got = out[static_cast<size_t>(t * ld + v)];
            if (v >= count) {
              RC_ASSERT(got == -7.0f);
              continue;
            }
            const float* x = &values[static_cast<size_t>(v * d)];
            double sum = 0, size = 0;
            for (int i = 0; i < d; ++i) {
              double y = 0, all = 0;
              for (int j = i; j < d; ++j) {
                const double term = static_cast<double>(full[static_cast<size_t>((t * d + i) * d + j)]) * x[j];
                y += term;
                all += std::fabs(term);
              }
              sum += squares ? y * y : x[i] * y;
              size += squares ? all * all : std::fabs(x[i]) * all;
            }
            RC_ASSERT(std::fabs(got - sum) <= 1e-6 * size);
          }
        }
        const int64_t last = count - 1;
        std::vector<float> alone(static_cast<size_t>(n));
        triangle_products(one.ctx, &values[static_cast<size_t>(last * d)], 1, d, packed.data(), n, squares,
                          alone.data(), 1);
        for (int t = 0; t < n; ++t) RC_ASSERT(alone[static_cast<size_t>(t)] == out[static_cast<size_t>(t * ld + last)]);
      }
    }));
  }
}

// ---- cache rows -----------------------------------------------------------------------------------

TEST(KvAppend, WritesTheExactCodes) {
  FOR_EACH_ISA(isa) {
    EXPECT_TRUE(rc::check([] {
      const KvLayout layout{*rc::gen::elementOf(kCacheTypes), *rc::gen::elementOf(kHeadDims), *rc::gen::element(4, 32)};
      const auto d = static_cast<size_t>(layout.head_dim);
      const auto tokens = *rc::gen::inRange<int64_t>(1, 150);
      const int kv_heads = *rc::gen::inRange(1, 4);
      const auto stride = static_cast<int64_t>(d) * kv_heads + *rc::gen::element(0, 3);
      const auto seed = *rc::gen::arbitrary<uint32_t>() / 2;
      auto k = normals(static_cast<size_t>(tokens * stride), seed), v = normals(k.size(), seed + 1);
      std::fill_n(k.begin(), d, 0.0f);                        // an all-zero row
      for (size_t i = 0; i < d; ++i) v[i] = 1e-41f * v[i];    // subnormal
      std::vector<Head> expected, got;
      std::vector<KvHeadView> views;
      for (int g = 0; g < kv_heads; ++g) {
        expected.push_back(random_head(layout, 9 * g, 0, 60, seed));
        Head head(layout, 9 * g + tokens), want(layout, 9 * g + tokens);
        for (int64_t i = 0; i < expected.back().length(); ++i) {
          std::vector<float> row(d, static_cast<float>(i));
          head.push(row.data(), row.data(), static_cast<int32_t>(i));
          want.push(row.data(), row.data(), static_cast<int32_t>(i));
        }
        views.push_back(head.view());
        const auto offset = static_cast<size_t>(g) * d;
        for (int64_t t = 0; t < tokens; ++t)
          want.push(&k[static_cast<size_t>(t * stride) + offset], &v[static_cast<size_t>(t * stride) + offset],
                    static_cast<int32_t>(1000 + t));
        expected.back() = std::move(want);
        got.push_back(std::move(head));
      }
      Engine e;
      kv_append(e.ctx, layout, views.data(), kv_heads, k.data(), v.data(), tokens, 1000, stride);
      for (size_t g = 0; g < got.size(); ++g)
        for (int64_t i = 0; i < expected[g].length(); ++i) RC_ASSERT(got[g].slot_bytes(i) == expected[g].slot_bytes(i));
    }));
  }
}

// Rows of several sequences, in any pieces, are those that each would append.
TEST(KvAppend, PiecesOfSeveralSequencesAreTheWhole) {
  for (const DType dtype : kCacheTypes) {
    const KvLayout layout{dtype, 64, 5};
    constexpr int kHeads = 2;
    const int64_t tokens[] = {7, 0, 16, 1}, old[] = {3, 0, 5, 0}, all = 24, stride = 2 * kHeads * 64 + 3;
    const auto k = normals(static_cast<size_t>(all * stride), 1), v = normals(k.size(), 2);
    for (const int64_t piece : {24, 8, 5, 1}) {
      std::vector<Head> whole, parts;
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < kHeads; ++h)
          for (auto* heads : {&whole, &parts}) {
            Head head(layout, old[i] + tokens[i]);
            const auto row = normals(64, 9);
            for (int64_t t = 0; t < old[i]; ++t) head.push(row.data(), row.data(), static_cast<int32_t>(t));
            heads->push_back(std::move(head));
          }
      std::vector<KvHeadView> views, of_parts;
      for (const Head& h : whole) views.push_back(h.view());
      for (const Head& h : parts) of_parts.push_back(h.view());
      std::vector<KvRows> rows;
      Engine e;
      for (int64_t i = 0, at = 0; i < 4; at += tokens[i++]) {
        kv_append(e.ctx, layout, &views[static_cast<size_t>(i * kHeads)], kHeads, &k[static_cast<size_t>(at * stride)],
                  &v[static_cast<size_t>(at * stride)], tokens[i], 100 * i, stride);
        rows.push_back({&of_parts[static_cast<size_t>(i * kHeads)], tokens[i], 100 * i});
      }
      for (int64_t at = 0; at < all; at += piece)
        kv_append_rows(e.ctx, layout, rows, kHeads, at, std::min(piece, all - at), &k[static_cast<size_t>(at * stride)],
                       &v[static_cast<size_t>(at * stride)], stride);
      for (size_t i = 0; i < whole.size(); ++i)
        for (int64_t s = 0; s < old[i / kHeads] + tokens[i / kHeads]; ++s)
          ASSERT_EQ(parts[i].slot_bytes(s), whole[i].slot_bytes(s)) << piece << " head " << i << " slot " << s;
      EXPECT_THROW(kv_append_rows(e.ctx, layout, rows, kHeads, 20, 5, k.data(), v.data(), stride), BadInput);
    }
  }
}

TEST(KvRead, GivesTheDecodedRows) {
  FOR_EACH_ISA(isa) {
    for (const DType dtype : kCacheTypes)
      for (const int d : kHeadDims) {
        const KvLayout layout{dtype, d, 16};
        const Head head = random_head(layout, 200, 0, 400, 4);
        std::vector<float> k(static_cast<size_t>(150 * d)), v(k.size());
        Engine e;
        kv_read(e.ctx, layout, head.view(), 37, 187, k.data(), v.data());
        std::vector<float> k_only(k.size());
        kv_read(e.ctx, layout, head.view(), 37, 187, k_only.data(), nullptr);
        for (size_t i = 0; i < k.size(); ++i) {
          ASSERT_EQ(k[i], static_cast<float>(head.k[static_cast<size_t>(37 * d) + i]));
          ASSERT_EQ(v[i], static_cast<float>(head.v[static_cast<size_t>(37 * d) + i]));
        }
        EXPECT_EQ(k, k_only);
      }
  }
}

TEST(KvCompact, MovesSlotsBitForBitInPlace) {
  EXPECT_TRUE(rc::check([] {
    const KvLayout layout{*rc::gen::elementOf(kCacheTypes), *rc::gen::elementOf(kHeadDims), *rc::gen::element(4, 32)};
    const auto n = *rc::gen::inRange<int64_t>(0, 300);
    const Head head = random_head(layout, n, 0, 400, *rc::gen::arbitrary<uint32_t>() / 2);
    const int share = *rc::gen::element(0, 5, 50, 95, 100);
    std::mt19937 rng(*rc::gen::arbitrary<uint32_t>());
    std::vector<int32_t> keep;
    std::vector<std::vector<std::byte>> expected;
    for (int64_t i = 0; i < n; ++i)
      if (static_cast<int>(rng() % 100) < share) {
        keep.push_back(static_cast<int32_t>(i));
        expected.push_back(head.slot_bytes(i));
      }
    Engine e;
    Records records;
    e.ctx.trace = &records;
    kv_compact(e.ctx, layout, head.view(), keep);
    for (size_t i = 0; i < keep.size(); ++i) RC_ASSERT(head.slot_bytes(static_cast<int64_t>(i)) == expected[i]);
    RC_ASSERT(records.all.at(0).kv_tokens_kept == static_cast<int64_t>(keep.size()));
    RC_ASSERT(records.all.at(0).kv_tokens_evicted == n - static_cast<int64_t>(keep.size()));
  }));
}

TEST(KvPages, RefuseBadRequests) {
  const KvLayout layout{DType::kF32, 16, 32};
  const Head head = random_head(layout, 20, 0, 30, 4);
  const KvHeadView view = head.view();
  Engine e;
  std::vector<float> rows(64 * 16);
  const auto keep = [&](std::vector<int32_t> slots) { kv_compact(e.ctx, layout, view, slots); };
  EXPECT_THROW(keep({3, 3}), BadInput);
  EXPECT_THROW(keep({4, 1}), BadInput);
  EXPECT_THROW(keep({-1}), BadInput);
  EXPECT_THROW(keep({20}), BadInput);
  EXPECT_THROW(kv_read(e.ctx, layout, view, 0, 21, rows.data(), nullptr), BadInput);
  EXPECT_THROW(kv_read(e.ctx, layout, view, 5, 4, rows.data(), nullptr), BadInput);
  EXPECT_THROW(kv_append(e.ctx, layout, &view, 1, rows.data(), rows.data(), 2, 0, 15), BadInput);
  EXPECT_THROW(kv_append(e.ctx, layout, &view, 0, rows.data(), rows.data(), 2, 0), BadInput);
  EXPECT_THROW(kv_append(e.ctx, layout, &view, 1, nullptr, rows.data(), 2, 0), BadInput);
  EXPECT_THROW(window_attention(e.ctx, layout, view, rows.data(), 21, 1, 0, 0, 1.0f, 0, rows.data()), BadInput);
  EXPECT_THROW(window_attention(e.ctx, layout, view, rows.data(), 2, 0, 0, 0, 1.0f, 0, rows.data()), BadInput);
  EXPECT_THROW(attention_column_sums(e.ctx, layout, view, nullptr, 2, 1, 0, 0, 1.0f, 0, rows.data()), BadInput);
}

}  // namespace
}  // namespace lacuna

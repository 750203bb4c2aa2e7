#include "cache/kv_cache.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <random>

namespace lacuna {
namespace {

struct Filled {
  std::vector<float> k, v;  // [tokens, G, d]
};

Filled random_rows(std::mt19937& rng, int64_t tokens, int heads, int d) {
  std::normal_distribution<float> normal;
  Filled f;
  f.k.resize(static_cast<size_t>(tokens * heads * d));
  f.v.resize(f.k.size());
  for (float& x : f.k) x = normal(rng);
  for (float& x : f.v) x = normal(rng);
  return f;
}

// Whatever is appended, kept, dropped and copied, the cache equals a plain list of rows, and the
// allocator holds exactly its pages.
TEST(KvCache, EqualsAPlainListUnderRandomOperations) {
  EXPECT_TRUE(rc::check([] {
    const int heads = *rc::gen::inRange(1, 4);
    const int d = *rc::gen::inRange(1, 5) * 8;
    const int page = *rc::gen::element(4, 16, 32);
    std::mt19937 rng(*rc::gen::arbitrary<uint32_t>());
    MemoryAccount account;
    Context ctx(account, 2);
    {
      KvCache cache(account, {{{heads, d}, {heads, d}}, DType::kF32, page});
      struct Row {
        int32_t position;
        std::vector<float> k, v;
      };
      std::vector<std::vector<Row>> model(static_cast<size_t>(heads));  // of layer 1
      int32_t next = 0;
      const int steps = *rc::gen::inRange(1, 12);
      for (int step = 0; step < steps; ++step) {
        if (rng() % 2 == 0) {
          const int64_t tokens = 1 + rng() % 70;
          const Filled f = random_rows(rng, tokens, heads, d);
          cache.append(ctx, 1, f.k.data(), f.v.data(), tokens, next);
          for (int64_t t = 0; t < tokens; ++t)
            for (int h = 0; h < heads; ++h) {
              const auto at = static_cast<std::ptrdiff_t>((t * heads + h) * d);
              model[static_cast<size_t>(h)].push_back(
                  {next + static_cast<int32_t>(t), {f.k.begin() + at, f.k.begin() + at + d}, {f.v.begin() + at, f.v.begin() + at + d}});
            }
          next += static_cast<int32_t>(tokens);
        } else {
          const int h = static_cast<int>(rng() % static_cast<uint32_t>(heads));
          auto& rows = model[static_cast<size_t>(h)];
          std::vector<int32_t> keep;
          std::vector<Row> kept;
          for (size_t i = 0; i < rows.size(); ++i)
            if (rng() % 3) {
              keep.push_back(static_cast<int32_t>(i));
              kept.push_back(rows[i]);
            }
          cache.keep(ctx, 1, h, keep);
          rows = kept;
        }
        const KvCache twin = cache.copy(ctx);
        for (const KvCache* c : std::initializer_list<const KvCache*>{&cache, &twin}) {
          size_t pages = 0;
          for (int h = 0; h < heads; ++h) {
            const auto& rows = model[static_cast<size_t>(h)];
            RC_ASSERT(c->length(1, h) == static_cast<int64_t>(rows.size()));
            RC_ASSERT(c->length(0, h) == 0);
            pages += (rows.size() + static_cast<size_t>(page) - 1) / static_cast<size_t>(page);
            std::vector<float> k(rows.size() * static_cast<size_t>(d)), v(k.size());
            kv_read(ctx, c->layout(1), c->view(1, h), 0, c->length(1, h), k.data(), v.data());
            const auto positions = c->positions(1, h);
            for (size_t i = 0; i < rows.size(); ++i) {
              RC_ASSERT(positions[i] == rows[i].position);
              RC_ASSERT(std::equal(rows[i].k.begin(), rows[i].k.end(), k.begin() + static_cast<std::ptrdiff_t>(i) * d));
              RC_ASSERT(std::equal(rows[i].v.begin(), rows[i].v.end(), v.begin() + static_cast<std::ptrdiff_t>(i) * d));
            }
          }
          RC_ASSERT(c->allocated_bytes() == pages * c->layout(1).page_bytes());
        }
        RC_ASSERT(account.now(MemoryTag::kKv) == cache.allocated_bytes() + twin.allocated_bytes());
        RC_ASSERT(cache.used_bytes() <= cache.allocated_bytes());
      }
    }
    RC_ASSERT(account.now(MemoryTag::kKv) == 0u);
  }));
}

TEST(KvCache, DropsPagesBehindAWindow) {
  MemoryAccount account;
  Context ctx(account, 1);
  KvCache cache(account, {{{2, 8}}, DType::kBF16, 4});
  std::mt19937 rng(1);
  for (int32_t t = 0; t < 100; ++t) {
    const Filled f = random_rows(rng, 1, 2, 8);
    cache.append(ctx, 0, f.k.data(), f.v.data(), 1, t);
    cache.drop_before(0, t - 9);  // a window of 10 behind token t
    for (int h = 0; h < 2; ++h) {
      const auto positions = cache.positions(0, h);
      EXPECT_LE(positions.front(), std::max(0, t - 9));
      EXPECT_EQ(positions.back(), t);
      EXPECT_LE(positions.size(), 10u + 2 * 4);
    }
  }
}

TEST(KvCache, LimitRefusesBeforeAnyByteTooMany) {
  MemoryAccount account;
  Context ctx(account, 1);
  KvCache cache(account, {{{1, 16}}, DType::kF32, 8});
  account.set_limit(MemoryTag::kKv, 3 * cache.layout(0).page_bytes());
  std::mt19937 rng(1);
  const Filled f = random_rows(rng, 25, 1, 16);
  EXPECT_NO_THROW(cache.append(ctx, 0, f.k.data(), f.v.data(), 24, 0));
  EXPECT_THROW(cache.append(ctx, 0, f.k.data(), f.v.data(), 1, 24), OutOfMemory);
  EXPECT_EQ(cache.length(0, 0), 24);
  EXPECT_LE(account.peak(MemoryTag::kKv), 3 * cache.layout(0).page_bytes());
}

}  // namespace
}  // namespace lacuna

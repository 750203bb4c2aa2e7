#include "models/cola.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "models/cola_fixture.h"
#include "models/latent_attention.h"
#include "refusals.h"

namespace lacuna {
namespace {

using refusals::expect_says;

using testing::ColaCheckpoint;
using testing::ColaSpec;
using testing::Row;
using testing::Rows;

using Floats = std::vector<float>;

Floats normals(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Floats x(static_cast<size_t>(n));
  for (float& f : x) f = normal(rng);
  return x;
}

Rows as_rows(const Floats& x, int64_t width) {
  Rows rows;
  for (size_t i = 0; i < x.size(); i += static_cast<size_t>(width))
    rows.emplace_back(x.begin() + static_cast<std::ptrdiff_t>(i), x.begin() + static_cast<std::ptrdiff_t>(i) + width);
  return rows;
}

double distance(const Floats& found, const Rows& exact) {
  double worst = 0;
  size_t i = 0;
  for (const Row& r : exact)
    for (const double e : r) {
      const double d = std::fabs(found.at(i++) - e);
      worst = d <= worst ? worst : d;
    }
  return i == found.size() ? worst : INFINITY;
}

double largest(const Rows& rows) {
  double most = 0;
  for (const Row& r : rows)
    for (const double x : r) most = std::max(most, std::fabs(x));
  return most;
}

double distance(const Floats& a, const Floats& b) { return distance(a, {Row(b.begin(), b.end())}); }

Floats part(const Floats& x, int64_t begin, int64_t end) { return {x.begin() + begin, x.begin() + end}; }
void append(Floats& to, const Floats& x) { to.insert(to.end(), x.begin(), x.end()); }

// A loaded checkpoint and short words for its calls.
struct Engine {
  explicit Engine(const ColaCheckpoint& c, int threads = 2, LoadOptions options = {}, int64_t block = 0,
                  ActivationType activations = ActivationType::kF32)
      : ctx(memory, threads), latent(c.spec.latent), patch(c.spec.patch), vocab(c.spec.vocab) {
    ctx.activations = activations;
    model = ColaModel::load(ctx, c.dir, options, block);
  }
  ColaState state(DType dtype = DType::kF32, int page_slots = 32) { return model->new_state(memory, {dtype, page_slots}); }
  struct Posterior {
    Floats mean, logvar;
  };
  Posterior encode(const std::vector<int32_t>& ids, const std::vector<int64_t>& lengths) {
    const size_t n = ids.size() / static_cast<size_t>(patch) * static_cast<size_t>(latent);
    Posterior p{Floats(n), Floats(n)};
    model->encode(ctx, ids, lengths, p.mean.data(), p.logvar.data());
    return p;
  }
  Floats decode(const Floats& z, const std::vector<LatentRows>& rows) {
    Floats logits(z.size() / static_cast<size_t>(latent) * static_cast<size_t>(patch * vocab));
    model->decode(ctx, z.data(), rows, logits.data());
    return logits;
  }
  Floats velocity(const Floats& x, const Floats& t, const std::vector<LatentRows>& rows) {
    const TimestepTable table = model->make_timesteps(ctx, t);
    std::vector<int32_t> index(t.size());
    for (size_t i = 0; i < t.size(); ++i) index[i] = static_cast<int32_t>(i);
    Floats v(x.size());
    model->velocity(ctx, table, index, x.data(), rows, v.data());
    return v;
  }
  void commit(ColaState& s, const Floats& z) {
    const auto n = static_cast<int64_t>(z.size()) / latent;
    const TimestepTable table = model->make_timesteps(ctx, Floats{0});
    const std::vector<LatentRows> rows = {{&s, n, n}};
    model->velocity(ctx, table, std::vector<int32_t>(static_cast<size_t>(n)), z.data(), rows, nullptr);
  }
  MemoryAccount memory;
  Context ctx;
  int64_t latent, patch, vocab;
  std::unique_ptr<ColaModel> model;
};

ColaSpec random_spec() {
  ColaSpec s;
  const auto flag = [] { return *rc::gen::arbitrary<bool>(); };
  s.vae_heads = *rc::gen::inRange(1, 4);
  const int head = *rc::gen::element(2, 8, 14);
  // A norm over two or four values that are nearly equal divides by nearly nothing: rounding alone passes any bound.
  s.dim = s.vae_heads * (s.vae_heads * head < 6 ? 8 : head);
  s.ffn = 2 * *rc::gen::inRange<int64_t>(3, 20);
  s.patch = *rc::gen::inRange<int64_t>(1, 4);
  s.vae_block = *rc::gen::inRange<int64_t>(1, 6);
  s.encoder_blocks = *rc::gen::inRange(1, 3);
  s.decoder_blocks = *rc::gen::inRange(1, 3);
  s.post_norm = flag();
  s.bias = flag();
  s.qk_bias = flag();
  s.qk_norm = flag();
  s.qk_affine = flag();
  s.norm_affine = flag();
  s.last_norm = flag();
  s.hidden = *rc::gen::element<int64_t>(9, 16, 24);
  s.block = *rc::gen::inRange<int64_t>(1, 7);
  s.expand = *rc::gen::inRange<int64_t>(1, 4);
  s.heads = *rc::gen::inRange(1, 4);
  s.head_dim = *rc::gen::element(8, 13, 16);
  s.rope_dim = *rc::gen::element(2, 6, 8);
  s.layers = *rc::gen::inRange(1, 3);
  s.dit_bias = flag();
  s.latent = *rc::gen::inRange<int64_t>(2, 6);
  s.seed = *rc::gen::inRange<uint32_t>(1, 1000);
  return s;
}

TEST(Cola, MatchesTheFormulasInDoubleForRandomShapes) {
  EXPECT_TRUE(rc::check([] {
    const ColaCheckpoint c(random_spec());
    Engine e(c);
    const int64_t n = *rc::gen::inRange<int64_t>(1, 20);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n * c.spec.patch; ++i)
      ids.push_back(static_cast<int32_t>(*rc::gen::inRange<int64_t>(0, c.spec.vocab + 1)));
    const auto found = e.encode(ids, {static_cast<int64_t>(ids.size())});
    const auto exact = c.encode(ids);
    // A posterior mean of nearly equal values is normed by nearly nothing, which no precision survives.
    if (c.spec.latent > 2 || !c.spec.last_norm) RC_ASSERT(distance(found.mean, exact.mean) <= 2e-3);
    RC_ASSERT(distance(found.logvar, exact.logvar) <= 1e-4 * std::max(1.0, largest(exact.logvar)));
    const Floats z = normals(n * c.spec.latent, 1);
    RC_ASSERT(distance(e.decode(z, {{nullptr, n, 0}}), c.decode(as_rows(z, c.spec.latent))) <= 1e-4);
    Floats t;
    for (int64_t i = 0; i < n; ++i) t.push_back(*rc::gen::element(0.0f, 31.25f, 500.0f, 999.0f, 1000.0f));
    RC_ASSERT(distance(e.velocity(z, t, {{nullptr, n, 0}}),
                       c.velocity(as_rows(z, c.spec.latent), std::vector<double>(t.begin(), t.end()))) <= 2e-4);
  }));
}

// The same clean latents in one call, and cut anywhere between blocks; and velocities in between leave no trace.
TEST(Cola, HistoryIsTheSameHoweverItWasAppended) {
  EXPECT_TRUE(rc::check([] {
    const ColaCheckpoint c(random_spec());
    Engine e(c);
    const int64_t bs = c.spec.block, blocks = *rc::gen::inRange<int64_t>(1, 6), n = bs * blocks, latent = c.spec.latent;
    const Floats z = normals(n * latent, 1), x = normals(bs * latent, 2);
    const Floats noisy(static_cast<size_t>(bs), 500.0f);
    ColaState at_once = e.state(), in_steps = e.state(DType::kF32, *rc::gen::element(2, 32));
    e.commit(at_once, z);
    Floats by_block;
    for (int64_t b = 0; b < blocks; ++b) {
      const Floats own = part(z, b * bs * latent, (b + 1) * bs * latent);
      e.velocity(x, noisy, {{&in_steps, bs, 0}});
      // Room for a block, which the next one takes.
      const size_t before = e.memory.now(MemoryTag::kKv);
      e.velocity(x, noisy, {{&in_steps, bs, 0}});
      RC_ASSERT(e.memory.now(MemoryTag::kKv) == before);
      append(by_block, e.velocity(own, Floats(static_cast<size_t>(bs), 0.0f), {{&in_steps, bs, bs}}));
      RC_ASSERT(e.memory.now(MemoryTag::kKv) == before);
    }
    RC_ASSERT(at_once.history == n && in_steps.history == n);
    RC_ASSERT(distance(by_block, e.velocity(z, Floats(static_cast<size_t>(n), 0.0f), {{nullptr, n, 0}})) <= 5e-5);
    const Floats expected = e.velocity(x, noisy, {{&at_once, bs, 0}});
    RC_ASSERT(distance(e.velocity(x, noisy, {{&in_steps, bs, 0}}), expected) <= 5e-5);
    // History and the block after it in one call, which keeps nothing or just the history.
    Floats both = z, times(static_cast<size_t>(n), 0.0f);
    append(both, x);
    append(times, noisy);
    RC_ASSERT(distance(part(e.velocity(both, times, {{nullptr, n + bs, 0}}), n * latent, (n + bs) * latent), expected) <= 5e-5);
    ColaState merged = e.state();
    RC_ASSERT(distance(part(e.velocity(both, times, {{&merged, n + bs, n}}), n * latent, (n + bs) * latent), expected) <= 5e-5);
    RC_ASSERT(merged.history == n);
    RC_ASSERT(distance(e.velocity(x, noisy, {{&merged, bs, 0}}), expected) <= 5e-5);
  }));
}

TEST(Cola, DecodingInStepsIsDecodingAtOnce) {
  EXPECT_TRUE(rc::check([] {
    const ColaCheckpoint c(random_spec());
    Engine e(c);
    const int64_t bs = c.spec.vae_block, n = bs * *rc::gen::inRange<int64_t>(1, 9), latent = c.spec.latent;
    const Floats z = normals(n * latent, 1);
    const Floats full = e.decode(z, {{nullptr, n, 0}});
    ColaState s = e.state();
    const int64_t width = c.spec.patch * c.spec.vocab;
    while (s.decoded < n) {
      const int64_t from = s.decoded, m = bs * *rc::gen::inRange<int64_t>(1, (n - from) / bs + 1);
      const Floats own = part(z, from * latent, (from + m) * latent);
      const std::vector<LatentRows> peek = {{&s, m, 0}}, keep = {{&s, m, m}};
      const Floats looked = e.decode(own, peek);
      RC_ASSERT(s.decoded == from);
      if (*rc::gen::arbitrary<bool>())
        e.model->decode(e.ctx, own.data(), keep, nullptr);
      else
        RC_ASSERT(e.decode(own, keep) == looked);
      RC_ASSERT(s.decoded == from + m);
      RC_ASSERT(distance(looked, part(full, from * width, (from + m) * width)) <= 5e-5);
    }
  }));
}

// Calls beyond kChunkRows are cut; whole and in pieces, with and without caches.
TEST(Cola, LongCallsAreCutBetweenBlocks) {
  ColaSpec spec;
  spec.layers = spec.encoder_blocks = spec.decoder_blocks = 1;
  spec.block = 7;
  spec.vae_block = 3;
  const ColaCheckpoint c(spec);
  Engine e(c);
  const int64_t n = 1201, latent = spec.latent;
  const Floats z = normals(n * latent, 1), zeros(static_cast<size_t>(n), 0.0f);
  ColaState s = e.state();
  const Floats whole = e.velocity(z, zeros, {{nullptr, n, 0}});  // a sequence without a cache is never cut
  EXPECT_LE(distance(e.velocity(z, zeros, {{&s, n, n}}), whole), 5e-5);
  EXPECT_EQ(s.history, n);
  EXPECT_EQ(s.dit.length(0, 0), n);
  EXPECT_LE(distance(e.decode(z, {{&s, n, 12}}), e.decode(z, {{nullptr, n, 0}})), 5e-5);
  EXPECT_EQ(s.decoded, 12);
  EXPECT_EQ(s.vae.length(0, 0), 12);

  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(i * 7 % spec.vocab));
  const auto found = e.encode(ids, {600, 1, 600});
  Floats exact;
  for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 600}, {600, 601}, {601, 1201}})
    for (const Row& r : c.encode({ids.begin() + from, ids.begin() + to}).mean) append(exact, Floats(r.begin(), r.end()));
  EXPECT_LE(distance(found.mean, exact), 1e-3);
}

TEST(Cola, CutsKeepSequencesWithoutACacheTogether) {
  EXPECT_TRUE(rc::check([] {
    MemoryAccount memory;
    KvCache kv(memory, {{{1, 8}}, DType::kF32, 32});
    const auto block = *rc::gen::inRange<int64_t>(1, 20), most = *rc::gen::inRange<int64_t>(1, 60);
    std::vector<LatentPart> parts;
    for (int i = *rc::gen::inRange(0, 6); i > 0; --i)
      parts.push_back({*rc::gen::arbitrary<bool>() ? &kv : nullptr, *rc::gen::inRange<int64_t>(1, 100), *rc::gen::inRange<int64_t>(0, 50)});
    const auto chunks = cut_into_chunks(parts, block, most);
    int64_t row = 0;
    size_t at = 0;
    int64_t done = 0;  // rows of part `at`
    for (const LatentChunk& chunk : chunks) {
      RC_ASSERT(chunk.first_row == row);
      int64_t rows = 0;
      for (const LatentPart& p : chunk.parts) {
        RC_ASSERT(p.kv == parts[at].kv && p.first_position == parts[at].first_position + done && p.rows > 0);
        rows += p.rows;
        done += p.rows;
        if (done == parts[at].rows) {
          ++at;
          done = 0;
        } else {
          RC_ASSERT(p.kv != nullptr && (p.first_position + p.rows) % block == 0);
        }
      }
      RC_ASSERT(rows == chunk.rows);
      RC_ASSERT(rows <= most || chunk.parts.size() == 1);
      row += rows;
    }
    RC_ASSERT(at == parts.size() && done == 0);
  }));
}

// With a VAE block of 1 padding reaches no earlier latent; with others it reaches those of its own block alone.
TEST(Cola, PaddingReachesNoEarlierBlock) {
  for (const int64_t block : {1, 4}) {
    ColaSpec spec;
    spec.vae_block = block;
    const ColaCheckpoint c(spec);
    Engine e(c);
    std::vector<int32_t> ids = {5, 1, 9, 30, 2, 7};
    const auto plain = e.encode(ids, {6});
    ids.resize(12, 36);
    const auto padded = e.encode(ids, {12});
    const int64_t whole = 6 / block * block * spec.latent;
    EXPECT_LE(distance(part(padded.mean, 0, whole), part(plain.mean, 0, whole)), 2e-5);
    EXPECT_LE(distance(part(padded.logvar, 0, whole), part(plain.logvar, 0, whole)), 2e-5);
    const Floats reached = part(padded.mean, whole, 6 * spec.latent);
    EXPECT_EQ(distance(reached, part(plain.mean, whole, 6 * spec.latent)) > 1e-3, block > 1);
  }
}

// Bit for bit, as long as both calls have more rows than linear()'s small-M body takes (8), or both at most as many.
TEST(Cola, ASequenceDoesNotDependOnItsBatchNorOnThreads) {
  for (const DType kv : {DType::kF32, DType::kBF16, DType::kI8})
    for (const ActivationType activations : {ActivationType::kF32, ActivationType::kBF16}) {
      ColaSpec spec;
      spec.block = 12;
      const ColaCheckpoint c(spec, activations == ActivationType::kBF16 ? DType::kBF16 : DType::kF32);
      Engine one(c, 1, {}, 0, activations), three(c, 3, {}, 0, activations);
      const int64_t bs = spec.block, latent = spec.latent;
      Floats alone;
      Floats together_x, together_t;
      std::vector<ColaState> alone_states, together;
      for (uint32_t i = 0; i < 4; ++i) {
        alone_states.push_back(one.state(kv));
        together.push_back(three.state(kv));
        const Floats hist = normals(i * bs * latent, 10 + i), x = normals(bs * latent, 20 + i);
        const Floats t(static_cast<size_t>(bs), 100.0f * static_cast<float>(i));
        if (i > 0) {
          one.commit(alone_states[i], hist);
          three.commit(together[i], hist);
        }
        append(alone, one.velocity(x, t, {{&alone_states[i], bs, 0}}));
        append(together_x, x);
        append(together_t, t);
      }
      std::vector<LatentRows> rows;
      for (ColaState& s : together) rows.push_back({&s, bs, 0});
      EXPECT_EQ(three.velocity(together_x, together_t, rows), alone);

      Floats logits;
      for (int64_t i = 0; i < 4; ++i)
        append(logits, one.decode(part(together_x, i * bs * latent, (i + 1) * bs * latent), {{&alone_states[static_cast<size_t>(i)], bs, bs}}));
      for (LatentRows& r : rows) r.keep = bs;
      EXPECT_EQ(three.decode(together_x, rows), logits);
      std::vector<int32_t> ids(48);
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 5 % 37);
      Floats means;
      for (size_t i = 0; i < 4; ++i)
        append(means, one.encode({ids.begin() + static_cast<std::ptrdiff_t>(12 * i), ids.begin() + static_cast<std::ptrdiff_t>(12 * i + 12)}, {12}).mean);
      EXPECT_EQ(three.encode(ids, {12, 12, 12, 12}).mean, means);
    }
}

TEST(Cola, NarrowWeightsAndCachesStayClose) {
  ColaSpec spec;
  spec.dim = spec.hidden = 48;
  const ColaCheckpoint c(spec), narrow(spec, DType::kBF16);
  Engine wide(c), bf16(narrow), rounded(narrow, 2, {}, 0, ActivationType::kBF16);
  LoadOptions options;
  options.weights = WeightMode::kInt8;
  Engine int8(c, 2, options);
  EXPECT_EQ(int8.model->info().weight_dtype, DType::kI8);
  EXPECT_EQ(bf16.model->info().weight_dtype, DType::kBF16);
  EXPECT_EQ(bf16.model->info().dit_parameters, wide.model->info().dit_parameters);
  EXPECT_LT(int8.model->info().velocity_bytes, wide.model->info().velocity_bytes / 3);
  const int64_t bs = spec.block, latent = spec.latent;
  const Floats hist = normals(2 * bs * latent, 1), x = normals(bs * latent, 2), t(static_cast<size_t>(bs), 600.0f);
  const auto run = [&](Engine& e, DType kv) {
    ColaState s = e.state(kv);
    e.commit(s, hist);
    Floats v = e.velocity(x, t, {{&s, bs, 0}});
    append(v, e.decode(x, {{&s, bs, bs}}));
    return v;
  };
  const Floats exact = run(wide, DType::kF32);
  double size = 0;
  for (const float f : exact) size = std::max<double>(size, std::fabs(f));
  EXPECT_GT(size, 1);
  for (Engine* e : {&bf16, &rounded, &int8}) EXPECT_LE(distance(run(*e, DType::kF32), exact), 0.05 * size);
  EXPECT_LE(distance(run(wide, DType::kBF16), exact), 0.02 * size);
  EXPECT_LE(distance(run(wide, DType::kI8), exact), 0.03 * size);
  // … and differ, or nothing was narrow.
  for (Engine* e : {&bf16, &rounded, &int8}) EXPECT_GT(distance(run(*e, DType::kF32), exact), 1e-4);
}

TEST(Cola, TimestepsAreRoundedHalfToEven) {
  const ColaCheckpoint c(ColaSpec{});
  Engine e(c);
  const TimestepTable table =
      e.model->make_timesteps(e.ctx, Floats{937.5f, 875, 437.5f, 850, 650, 1000, 0}, TimestepRounding::kBf16);
  const auto t = table.timesteps();
  EXPECT_EQ(Floats(t.begin(), t.end()), (Floats{936, 876, 438, 848, 648, 1000, 0}));
  EXPECT_GT(e.memory.now(MemoryTag::kActivations), size_t{0});
  for (const float bad : {-1.0f, 1000.5f, NAN, INFINITY})
    EXPECT_THROW(e.model->make_timesteps(e.ctx, Floats{1, bad}), BadInput) << bad;
}

TEST(Cola, ABlockSizeOfTheCallersOwn) {
  ColaSpec spec, wider;
  wider.block = 6;
  const ColaCheckpoint c(spec), d(wider);
  Engine e(c, 2, {}, 6), f(d);
  EXPECT_EQ(e.model->config().dit.block, 6);
  const Floats x = normals(13 * spec.latent, 1), t(13, 300.0f);
  EXPECT_EQ(e.velocity(x, t, {{nullptr, 13, 0}}), f.velocity(x, t, {{nullptr, 13, 0}}));
  EXPECT_THROW(ColaModel::load(e.ctx, c.dir, {}, -1), BadInput);
}

TEST(Cola, CopiesHaveTheirOwnMemory) {
  const ColaCheckpoint c(ColaSpec{});
  Engine e(c);
  const int64_t bs = c.spec.block, latent = c.spec.latent;
  ColaState s = e.state();
  e.commit(s, normals(bs * latent, 1));
  e.decode(normals(bs * latent, 1), {{&s, bs, bs}});
  ColaState copy = s.copy(e.ctx);
  ColaState moved = std::move(s);
  const Floats x = normals(bs * latent, 2), t(static_cast<size_t>(bs), 300.0f);
  const Floats before = e.velocity(x, t, {{&moved, bs, 0}});
  e.commit(copy, normals(bs * latent, 3));
  EXPECT_EQ(copy.history, 2 * bs);
  EXPECT_EQ(moved.history, bs);
  EXPECT_EQ(copy.decoded, bs);
  EXPECT_EQ(e.velocity(x, t, {{&moved, bs, 0}}), before);
}

// A call that fails leaves every state as it was.
TEST(Cola, AFailedCallAppendsNothing) {
  const ColaCheckpoint c(ColaSpec{});
  Engine e(c);
  const int64_t bs = c.spec.block, latent = c.spec.latent;
  ColaState s = e.state();
  e.commit(s, normals(32 * latent, 1));
  Floats x = normals(bs * latent, 2);
  const Floats t(static_cast<size_t>(bs), 300.0f);
  const std::vector<LatentRows> rows = {{&s, bs, bs}};
  ColaState other = s.copy(e.ctx);  // whose rows leave their pages
  const Floats before = e.velocity(x, t, {{&other, bs, 0}});
  // The second layer's page no longer fits.
  const size_t held = s.dit.allocated_bytes();
  const size_t page = s.dit.layout(0).page_bytes();
  e.memory.set_limit(MemoryTag::kKv, e.memory.now(MemoryTag::kKv) + 3 * page);
  EXPECT_THROW(e.velocity(x, t, rows), OutOfMemory);
  e.memory.set_limit(MemoryTag::kKv, 0);
  EXPECT_EQ(s.history, 32);
  for (int layer = 0; layer < c.spec.layers; ++layer) EXPECT_EQ(s.dit.length(layer, 0), 32);
  EXPECT_EQ(s.dit.allocated_bytes(), held);
  EXPECT_EQ(e.velocity(x, t, {{&s, bs, 0}}), before);
  x[5] = NAN;
  EXPECT_THROW(e.velocity(x, t, rows), BadInput);
  EXPECT_THROW(e.commit(s, x), BadInput);
  EXPECT_THROW(e.decode(x, rows), BadInput);
  EXPECT_EQ(s.history, 32);
  EXPECT_EQ(s.decoded, 0);
}

TEST(Cola, RefusesCallsThatDoNotFit) {
  const ColaCheckpoint c(ColaSpec{});
  ColaSpec other_spec;
  other_spec.head_dim = 12;
  other_spec.layers = 3;
  const ColaCheckpoint d(other_spec);
  Engine e(c), other(d);
  const Floats x = normals(16, 1), t(4, 300.0f);
  Floats v(16);
  ColaState s = e.state(), strange = other.state(), narrow = e.state(DType::kBF16), paged = e.state(DType::kF32, 8);
  const TimestepTable table = e.model->make_timesteps(e.ctx, t), foreign = other.model->make_timesteps(other.ctx, t);
  const std::vector<int32_t> at(4);
  const auto call = [&](std::vector<LatentRows> rows, const TimestepTable& table, std::vector<int32_t> at) {
    e.model->velocity(e.ctx, table, at, x.data(), rows, v.data());
  };
  call({{&s, 4, 0}}, table, at);
  call({}, table, {});
  call({{&s, 0, 0}}, table, {});
  EXPECT_THROW(call({{&s, 4, 5}}, table, at), BadInput);
  EXPECT_THROW(call({{&s, 4, -1}}, table, at), BadInput);
  EXPECT_THROW(call({{&s, -4, 0}}, table, at), BadInput);
  EXPECT_THROW(call({{nullptr, 4, 1}}, table, at), BadInput);
  EXPECT_THROW(call({{nullptr, int64_t{1} << 40, 0}}, table, at), BadInput);
  EXPECT_THROW(call({{&s, 2, 0}, {&s, 2, 0}}, table, at), BadInput);
  EXPECT_THROW(call({{&s, 2, 0}, {&narrow, 2, 0}}, table, at), BadInput);
  EXPECT_THROW(call({{&s, 2, 0}, {&paged, 2, 0}}, table, at), BadInput);
  EXPECT_THROW(call({{&strange, 4, 0}}, table, at), BadInput);
  EXPECT_THROW(call({{&s, 4, 0}}, foreign, at), BadInput);
  EXPECT_THROW(call({{&s, 4, 0}}, table, {0, 1, 2, 4}), BadInput);
  EXPECT_THROW(call({{&s, 4, 0}}, table, {0, 1, 2, -1}), BadInput);
  EXPECT_THROW(call({{&s, 4, 0}}, table, {0, 1, 2}), BadInput);
  EXPECT_THROW(e.encode({1, 2, 3}, {2}), BadInput);
  EXPECT_THROW(e.encode({1, 2, 3}, {4}), BadInput);
  EXPECT_THROW(e.encode({1, 2, 3}, {5, -2}), BadInput);
  EXPECT_THROW(e.encode({1, 2, 38}, {3}), BadInput);
  EXPECT_THROW(e.encode({1, 2, -1}, {3}), BadInput);
  EXPECT_TRUE(e.encode({}, {0, 0}).mean.empty());
  e.encode({1, 2, 37}, {3});  // the mask token
  ColaSpec pairs;
  pairs.patch = 2;
  const ColaCheckpoint p(pairs);
  Engine patched(p);
  EXPECT_THROW(patched.encode({1, 2, 3, 4}, {3, 1}), BadInput);
}

template <typename E>
std::string refusal(const ColaCheckpoint& c, const LoadOptions& options = {}) {
  MemoryAccount memory;
  Context ctx(memory, 1);
  const std::string what = refusals::refusal<E>([&] { ColaModel::load(ctx, c.dir, options); });
  EXPECT_EQ(memory.now(MemoryTag::kWeights), size_t{0});
  return what;
}

TEST(Cola, CopiedWeightsAreTheSameWeights) {
  const ColaCheckpoint c(ColaSpec{});
  LoadOptions options;
  options.place = WeightPlace::kCopied;
  Engine mapped(c), copied(c, 2, options);
  const Floats z = normals(5 * c.spec.latent, 1), t(5, 500.0f);
  EXPECT_EQ(copied.velocity(z, t, {{nullptr, 5, 0}}), mapped.velocity(z, t, {{nullptr, 5, 0}}));
  EXPECT_EQ(copied.decode(z, {{nullptr, 5, 0}}), mapped.decode(z, {{nullptr, 5, 0}}));
  // Both files are the account's now: a limit below them refuses.
  MemoryAccount memory;
  Context ctx(memory, 1);
  memory.set_total_limit(copied.memory.now(MemoryTag::kWeights) / 2);
  EXPECT_THROW(ColaModel::load(ctx, c.dir, options), OutOfMemory);
  EXPECT_NO_THROW(ColaModel::load(ctx, c.dir, {}));
  EXPECT_EQ(memory.now(MemoryTag::kWeights), 0u);
}

TEST(Cola, RefusesCheckpointsThatDoNotFit) {
  {
    ColaCheckpoint c(ColaSpec{});
    c.tensors["dit"]["blocks.1.mlp.proj_in.weight"].shape = {24, 48};
    c.write();
    expect_says(refusal<CorruptData>(c), {"cola_dit", "blocks.1.mlp.proj_in.weight", "[48, 24]"});
  }
  {
    ColaCheckpoint c(ColaSpec{});
    c.tensors["vae"].erase("decoder.blocks.0.q_norm.bias");
    c.write();
    expect_says(refusal<CorruptData>(c), {"cola_vae", "decoder.blocks.0.q_norm.bias"});
  }
  for (const char* name : {"encoder.patch_embedder.weight", "encoder.blocks.1.norm_ffn.bias"}) {
    ColaCheckpoint c(ColaSpec{});
    c.tensors["vae"][name].values[3] = NAN;
    c.write();
    expect_says(refusal<CorruptData>(c), {"cola_vae", name});
  }
  {
    ColaCheckpoint c(ColaSpec{});
    const auto file = c.folder_of("dit") / "model.safetensors";
    std::filesystem::resize_file(file, std::filesystem::file_size(file) - 10);
    expect_says(refusal<CorruptData>(c), {"cola_dit", "model.safetensors"});
  }
  {
    ColaCheckpoint c(ColaSpec{});
    std::filesystem::remove_all(c.folder_of("vae"));
    expect_says(refusal<IoError>(c), {"cola_vae", "config.json"});
    EXPECT_TRUE(is_cola_checkpoint(c.dir));
    std::filesystem::remove_all(c.folder_of("dit"));
    EXPECT_FALSE(is_cola_checkpoint(c.dir));
    expect_says(refusal<BadInput>(c), {"cola_vae", "cola_dit"});
  }
  {
    ColaCheckpoint c(ColaSpec{});
    LoadOptions options;
    options.spikes.use = SpikeUse::kFake;
    expect_says(refusal<Unsupported>(c, options), {"spike"});
  }
}

// The flat layout, and shards with an index.
TEST(Cola, LoadsTheOtherLayouts) {
  const ColaCheckpoint c(ColaSpec{});
  Engine nested(c);
  const Floats x = normals(16, 1), t(4, 300.0f);
  const Floats v = nested.velocity(x, t, {{nullptr, 4, 0}});
  for (const char* half : {"cola_vae", "cola_dit"}) std::filesystem::rename(c.dir / "cola_dlm" / half, c.dir / half);
  std::filesystem::remove(c.dir / "cola_dlm");
  std::ofstream(c.dir / "tokenizer.json") << "{}";
  Engine flat(c);
  EXPECT_EQ(flat.velocity(x, t, {{nullptr, 4, 0}}), v);
  EXPECT_EQ(flat.model->config().tokenizer_dir, c.dir);
  EXPECT_TRUE(nested.model->config().tokenizer_dir.empty());
}

// What a call reads of the weights is what the ledger counts.
TEST(Cola, BytesAreThoseOfTheLedger) {
  const ColaCheckpoint wide(ColaSpec{}), narrow(ColaSpec{}, DType::kBF16);
  for (const bool packed : {false, true}) {
    const ColaCheckpoint& c = packed ? narrow : wide;
    Engine e(c, 2, {}, 0, packed ? ActivationType::kBF16 : ActivationType::kF32);
    OpTotals totals;
    const auto weights = [&](const auto& call) {
      totals.reset();
      e.ctx.trace = &totals;
      call();
      e.ctx.trace = nullptr;
      return static_cast<size_t>(totals.of(OpKind::kGemm).weight_bytes);
    };
    const ColaInfo& info = e.model->info();
    ColaState s = e.state();
    const int64_t bs = c.spec.block;
    const Floats x = normals(2 * bs * c.spec.latent, 1);
    const std::vector<LatentRows> rows = {{&s, bs, 0}, {nullptr, bs, 0}};
    TimestepTable table;
    EXPECT_EQ(weights([&] { table = e.model->make_timesteps(e.ctx, Floats{0, 500}); }), info.timestep_bytes);
    Floats v(x.size()), logits(static_cast<size_t>(2 * bs * c.spec.vocab));
    const std::vector<int32_t> at(static_cast<size_t>(2 * bs));
    EXPECT_EQ(weights([&] { e.model->velocity(e.ctx, table, at, x.data(), rows, v.data()); }), info.velocity_bytes);
    EXPECT_EQ(weights([&] { e.model->decode(e.ctx, x.data(), rows, logits.data()); }), info.decode_bytes);
    EXPECT_EQ(weights([&] { e.model->decode(e.ctx, x.data(), rows, nullptr); }), info.append_bytes);
    EXPECT_EQ(weights([&] { e.encode({1, 2, 3}, {3}); }), info.encode_bytes);
    EXPECT_GT(totals.of(OpKind::kEmbed).calls, 0);
  }
}

// Rows that go through the layers a few at a time, on one thread, have the bits of whole batches, whether threads meet
// around every attention or go apart (calls try both): an observer wants those.
TEST(Cola, RowsOnThreadsOfTheirOwnHaveTheBitsOfTheBatch) {
  struct Nobody : ColaObserver {
    void on_tensor(const ColaTap&) override {}
  } nobody;
  ColaSpec wide;  // whose heads are prepared in one pass
  wide.head_dim = 64;
  wide.rope_dim = 48;
  wide.block = 16;
  for (const ColaSpec& spec : {ColaSpec{}, wide}) {
    const ColaCheckpoint c(spec, DType::kBF16);
    const int64_t bs = spec.block, rows_of[] = {2 * bs, bs, bs, 3 * bs};
    const Floats x = normals(7 * bs * spec.latent, 1);
    Floats want_v, want_logits;
    for (const int threads : {1, 2, 3}) {
      for (const bool watched : {true, false}) {
        Engine e(c, threads, {}, 0, ActivationType::kBF16);
        if (watched) e.model->observe(&nobody);
        ColaState a = e.state(DType::kBF16), b = e.state(DType::kBF16);
        std::vector<LatentRows> rows = {
            {&a, rows_of[0], bs}, {nullptr, rows_of[1]}, {&b, rows_of[2]}, {nullptr, rows_of[3]}};
        const TimestepTable table = e.model->make_timesteps(e.ctx, Floats{0, 500});
        std::vector<int32_t> at(static_cast<size_t>(7 * bs));
        for (size_t i = 0; i < at.size(); ++i) at[i] = static_cast<int32_t>(i % 2);
        Floats v(x.size()), logits(static_cast<size_t>(7 * bs * spec.patch * spec.vocab));
        e.model->velocity(e.ctx, table, at, x.data(), rows, v.data());
        e.model->decode(e.ctx, x.data(), rows, logits.data());
        rows[0].keep = 0;
        for (int call = 0; call < 3; ++call) {
          Floats again(x.size());
          e.model->velocity(e.ctx, table, at, x.data(), rows, again.data());
          append(v, again);
        }
        if (want_v.empty()) want_v = v, want_logits = logits;
        EXPECT_EQ(v, want_v) << threads << watched;
        EXPECT_EQ(logits, want_logits) << threads << watched;
      }
    }
  }
}

}  // namespace
}  // namespace lacuna

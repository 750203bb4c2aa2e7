#include "models/cola.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "models/dit.h"
#include "models/text_vae.h"

namespace lacuna {
namespace {

constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// Positions of a state's next rows, and what they are appended to.
struct StateHalf {
  KvCache ColaState::*kv;
  int64_t ColaState::*length;
};
constexpr StateHalf kPrior{&ColaState::dit, &ColaState::history}, kDecoder{&ColaState::vae, &ColaState::decoded};

KvCacheShape kv_shape(int layers, int heads, int head_dim, const KvOptions& options) {
  KvCacheShape shape;
  shape.layers.assign(static_cast<size_t>(layers), {heads, head_dim});
  shape.dtype = options.dtype;
  shape.page_slots = options.page_slots;
  return shape;
}

// Index of the first value that is not finite; n if all are.
int64_t first_odd(const float* x, int64_t n) {
  // Stretches without one are found out at once: logits are tens of thousands.
  constexpr int64_t kStretch = 64;
  int64_t i = 0;
  for (; i + kStretch <= n; i += kStretch) {
    uint32_t odd = 0;
    for (int64_t j = 0; j < kStretch; ++j) odd |= (std::bit_cast<uint32_t>(x[i + j]) & 0x7f800000u) == 0x7f800000u;
    if (odd) break;
  }
  while (i < n && std::isfinite(x[i])) ++i;
  return i;
}

void check_latents(const char* call, const float* x, int64_t rows, int64_t width) {
  if (rows > 0 && !x) throw BadInput("{}: {} rows without latents", call, rows);
  const int64_t odd = first_odd(x, rows * width);
  if (odd < rows * width)
    throw BadInput("{}: value {} of latent {} is {}; expected a finite number", call, odd % width, odd / width, x[odd]);
}

void check_result(const char* call, const char* what, const float* result, int64_t rows, int64_t width) {
  const int64_t odd = first_odd(result, rows * width);
  if (odd < rows * width)
    throw CorruptData("{}: {} of row {} is {}; expected finite numbers from finite weights and latents", call, what,
                      odd / width, result[odd]);
}

// A call's rows, checked and ready for the sweeps.
struct Call {
  Call(const char* name, StateHalf half, std::span<const LatentRows> entries, const KvCacheShape& expected) : half(half) {
    layout = {DType::kF32, expected.layers[0].head_dim, 32};
    const ColaState* first = nullptr;
    for (size_t i = 0; i < entries.size(); ++i) {
      const LatentRows& e = entries[i];
      if (e.rows < 0 || e.keep < 0 || e.keep > e.rows)
        throw BadInput("{}: entry {} keeps {} of {} rows", name, i, e.keep, e.rows);
      if (!e.state && e.keep > 0) throw BadInput("{}: entry {} keeps {} rows without a state", name, i, e.keep);
      const int64_t position = e.state ? e.state->*half.length : 0;
      if (e.rows > kMaxPositions - position)
        throw BadInput("{}: entry {}: {} rows after {} latents; positions have 31 bits", name, i, e.rows, position);
      rows += e.rows;
      KvCache* kv = nullptr;
      if (e.state) {
        kv = &(e.state->*half.kv);
        const auto same = [](const KvCacheShape::Layer& a, const KvCacheShape::Layer& b) {
          return a.kv_heads == b.kv_heads && a.head_dim == b.head_dim;
        };
        if (!std::equal(kv->shape().layers.begin(), kv->shape().layers.end(), expected.layers.begin(),
                        expected.layers.end(), same))
          throw BadInput("{}: entry {}: a state of another model", name, i);
        for (size_t j = 0; j < i; ++j)
          if (entries[j].state == e.state) throw BadInput("{}: entries {} and {} have the same state", name, j, i);
        if (!first) {
          first = e.state;
          layout = kv->layout(0);
        } else if (kv->layout(0).dtype != layout.dtype || kv->layout(0).page_slots != layout.page_slots) {
          throw BadInput("{}: entry {}: a cache of {} in pages of {} slots beside others of {} and {}", name, i,
                         dtype_name(kv->layout(0).dtype), kv->layout(0).page_slots, dtype_name(layout.dtype),
                         layout.page_slots);
        }
        guard.watch(*kv, position, e.keep);
      }
      if (e.rows > 0) parts.push_back({kv, e.rows, position});
    }
  }
  // What is to be kept stays.
  void commit(std::span<const LatentRows> entries) {
    guard.commit();
    for (const LatentRows& e : entries)
      if (e.state) e.state->*half.length += e.keep;
  }

  StateHalf half;
  int64_t rows = 0;
  KvLayout layout;
  std::vector<LatentPart> parts;
  AppendGuard guard;
};

}  // namespace

struct ColaModel::Body {
  Body(Context& ctx, ColaConfig config, const LoadOptions& options)
      : vae_weights(ctx, ModelFiles::open(config.vae_dir), options),
        vae(config.vae, placed(vae_weights)),
        dit_weights(ctx, ModelFiles::open(config.dit_dir), options),
        dit(config.dit, placed(dit_weights)) {
    vae.pack(ctx);
    dit.pack(ctx);
    info.vae_parameters = vae_weights.parameters();
    info.dit_parameters = dit_weights.parameters();
    info.weight_dtype = dit.weight_dtype();
    info.weight_bytes = vae_weights.bytes() + dit_weights.bytes() + vae.packed_bytes() + dit.packed_bytes();
    info.velocity_bytes = dit.velocity_bytes();
    info.timestep_bytes = dit.timestep_bytes();
    info.encode_bytes = vae.encode_bytes();
    info.decode_bytes = vae.decode_bytes();
    info.append_bytes = vae.append_bytes();
    info.config = std::move(config);
  }

  static WeightBinder& placed(WeightBinder& weights) {
    weights.place();
    return weights;
  }
  KvCacheShape dit_shape(const KvOptions& options = {}) const {
    const ColaDitConfig& c = info.config.dit;
    return kv_shape(c.layers, c.heads, c.head_dim, options);
  }
  KvCacheShape vae_shape(int blocks, const KvOptions& options = {}) const {
    const ColaVaeConfig& c = info.config.vae;
    return kv_shape(blocks, c.heads, c.head_dim, options);
  }
  ColaShow show(const LatentChunk& chunk) const {
    if (!observer) return {};
    return [this, &chunk](const char* part, const char* name, int layer, const float* data, int64_t width, int64_t stride) {
      observer->on_tensor({part, name, layer, chunk.first_row, chunk.rows, width, stride, data});
    };
  }

  ColaInfo info;
  WeightBinder vae_weights;
  TextVae vae;
  WeightBinder dit_weights;
  Dit dit;
  ColaObserver* observer = nullptr;
};

ColaModel::ColaModel(std::unique_ptr<Body> body) : body_(std::move(body)) {}
ColaModel::~ColaModel() = default;

std::unique_ptr<ColaModel> ColaModel::load(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options,
                                           int64_t block) {
  ColaConfig config = load_cola_config(dir);
  if (block < 0 || block > (1 << 20)) throw BadInput("block size {}; expected 1 to {}, or 0: the model's", block, 1 << 20);
  if (block > 0) config.dit.block = block;
  if (options.spikes.use != SpikeUse::kAuto && options.spikes.use != SpikeUse::kOff)
    throw Unsupported("{}: Cola DLM has no spike-coded inputs", dir.string());
  return std::unique_ptr<ColaModel>(new ColaModel(std::make_unique<Body>(ctx, std::move(config), options)));
}

const ColaInfo& ColaModel::info() const { return body_->info; }
void ColaModel::observe(ColaObserver* observer) { body_->observer = observer; }

ColaState ColaModel::new_state(MemoryAccount& account, const KvOptions& options) const {
  return ColaState{KvCache(account, body_->dit_shape(options)),
                   KvCache(account, body_->vae_shape(config().vae.decoder_blocks, options))};
}

void ColaModel::encode(Context& ctx, std::span<const int32_t> ids, std::span<const int64_t> lengths, float* mean,
                       float* logvar) {
  const ColaVaeConfig& c = config().vae;
  const auto total = static_cast<int64_t>(ids.size());
  int64_t sum = 0;
  for (const int64_t n : lengths) {
    if (n < 0 || n > total - sum) throw BadInput("encode: sequences of more tokens than the {} given", total);
    if (n % c.patch != 0) throw BadInput("encode: a sequence of {} tokens; expected a multiple of patch_size = {}", n, c.patch);
    sum += n;
  }
  if (sum != total) throw BadInput("encode: sequences of {} tokens, but {} ids", sum, total);
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] > c.vocab)
      throw BadInput("encode: id {} at index {}; expected 0 to {} (the last is the mask)", ids[i], i, c.vocab);
  if (total == 0) return;
  if (!mean) throw BadInput("encode: no memory for the means of {} tokens", total);

  // Keys and values of the encoder live as long as the call.
  std::vector<KvCache> caches;
  caches.reserve(lengths.size());
  std::vector<LatentPart> parts;
  for (const int64_t n : lengths) {
    if (n == 0) continue;
    caches.emplace_back(ctx.memory, body_->vae_shape(c.encoder_blocks));
    parts.push_back({&caches.back(), n / c.patch, 0});
  }
  const KvLayout layout = caches[0].layout(0);
  for (const LatentChunk& chunk : cut_into_chunks(parts, c.block, kChunkRows)) {
    const int64_t at = chunk.first_row * c.latent_dim;
    body_->vae.encode(ctx, chunk, layout, ids.data() + chunk.first_row * c.patch, mean + at, logvar ? logvar + at : nullptr,
                      body_->show(chunk));
  }
  check_result("encode", "the mean", mean, total / c.patch, c.latent_dim);
  if (logvar) check_result("encode", "the log-variance", logvar, total / c.patch, c.latent_dim);
}

void ColaModel::to_prior(std::span<float> latents) const {
  const ColaVaeConfig& c = config().vae;
  for (float& z : latents) z = (z - c.shifting_factor) * c.scaling_factor;
}

void ColaModel::decode(Context& ctx, const float* z, std::span<const LatentRows> rows, float* logits) {
  const ColaVaeConfig& c = config().vae;
  Call call("decode", kDecoder, rows, body_->vae_shape(c.decoder_blocks));
  check_latents("decode", z, call.rows, c.latent_dim);
  for (const LatentChunk& chunk : cut_into_chunks(call.parts, c.block, kChunkRows)) {
    const float* from = z + chunk.first_row * c.latent_dim;
    float* to = logits ? logits + chunk.first_row * c.patch * c.vocab : nullptr;
    body_->vae.decode(ctx, chunk, call.layout, from, to, body_->show(chunk));
  }
  if (logits) check_result("decode", "logits", logits, call.rows, c.patch * c.vocab);
  call.commit(rows);
}

TimestepTable ColaModel::make_timesteps(Context& ctx, std::span<const float> t, TimestepRounding rounding) {
  TimestepTable table;
  for (const float x : t) {
    if (!(x >= 0 && x <= 1000)) throw BadInput("timestep {}; expected 0 to 1000", x);
    table.timesteps_.push_back(rounding == TimestepRounding::kBf16 ? to_float(to_bf16(x)) : x);
  }
  if (t.size() > 65536) throw BadInput("{} timesteps; expected at most 65536", t.size());
  table.dim_ = static_cast<size_t>(config().dit.dim);
  table.layers_ = config().dit.layers;
  if (t.empty()) return table;
  const size_t row = table.dim_ * sizeof(float) * t.size();
  table.values_ = Buffer(ctx.memory, MemoryTag::kActivations, row * (6 * static_cast<size_t>(table.layers_) + 2));
  table.embedding_ = Buffer(ctx.memory, MemoryTag::kActivations, row);
  body_->dit.modulate(ctx, table.timesteps_, table.values_.as<float>(), table.embedding_.as<float>());
  return table;
}

void ColaModel::velocity(Context& ctx, const TimestepTable& table, std::span<const int32_t> timestep, const float* x,
                         std::span<const LatentRows> rows, float* v) {
  const ColaDitConfig& c = config().dit;
  Call call("velocity", kPrior, rows, body_->dit_shape());
  if (static_cast<int64_t>(timestep.size()) != call.rows)
    throw BadInput("velocity: {} timesteps for {} rows", timestep.size(), call.rows);
  if (table.dim_ != static_cast<size_t>(c.dim) || table.layers_ != c.layers)
    throw BadInput("velocity: the timesteps are those of another model");
  for (size_t i = 0; i < timestep.size(); ++i)
    if (timestep[i] < 0 || timestep[i] >= table.count())
      throw BadInput("velocity: timestep {} of row {}; the table has {}", timestep[i], i, table.count());
  check_latents("velocity", x, call.rows, c.channels);
  for (const LatentChunk& chunk : cut_into_chunks(call.parts, c.block, kChunkRows))
    body_->dit.forward(ctx, chunk, call.layout, table, timestep.data() + chunk.first_row, x + chunk.first_row * c.channels,
                       v ? v + chunk.first_row * c.channels : nullptr, body_->show(chunk));
  if (v) check_result("velocity", "the velocity", v, call.rows, c.channels);
  call.commit(rows);
}

}  // namespace lacuna

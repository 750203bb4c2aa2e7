#include "kernels/spike_linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/linear_bodies.h"
#include "kernels/cpu/spike_bodies.h"

namespace lacuna {
namespace {

void check_shape(const char* op, const char* what, const Tensor& t) {
  if (!t) throw BadInput("{}: {} has no data", op, what);
  if (t.rank != 2 || t.shape[0] <= 0 || t.shape[1] <= 0)
    throw BadInput("{}: {} has shape {}; expected two positive dimensions [out, in]", op, what, t.shape_string());
}

// Inputs that fire in any row: the columns an event product reads.
std::vector<uint8_t> firing(const SpikeBatch& x) {
  std::vector<uint8_t> fires(static_cast<size_t>(x.k), 0);
  for (int64_t r = 0; r < x.m; ++r)
    for (int64_t i = 0; i < x.k; ++i) fires[static_cast<size_t>(i)] |= x.counts[r * x.k + i] != 0;
  return fires;
}

}  // namespace

std::string_view spike_arithmetic_name(SpikeArithmetic a) {
  switch (a) {
    case SpikeArithmetic::kFake:
      return "fake";
    case SpikeArithmetic::kInteger:
      return "integer";
    case SpikeArithmetic::kEvent:
      return "event";
  }
  return "?";
}

size_t SpikeWeight::bytes() const {
  const size_t bias_bytes = bias ? static_cast<size_t>(out) * 4 : 0;
  if (arithmetic == SpikeArithmetic::kFake)
    return fake.weight.bytes() + (fake.row_scale ? static_cast<size_t>(out) * 4 : 0) + bias_bytes;
  return static_cast<size_t>(out * in + 4 * out * groups()) +
         static_cast<size_t>(overflow_count) * sizeof(SpikeOverflow) + bias_bytes;
}

PackedSpikeWeight pack_spike_weight(Context& ctx, const Tensor& codes, const float* scales, int64_t group,
                                    const float* bias, SpikeArithmetic arithmetic) {
  check_shape("pack_spike_weight", "the codes", codes);
  if (codes.dtype != DType::kI8 && codes.dtype != DType::kI16)
    throw BadInput("pack_spike_weight: the codes have dtype {}; expected int8 or int16", dtype_name(codes.dtype));
  if (!scales) throw BadInput("pack_spike_weight: there are no scales");
  if (group <= 0 || (group < codes.shape[1] && group % 4 != 0))
    throw BadInput("pack_spike_weight: groups of {} inputs of {}; expected a multiple of 4", group, codes.shape[1]);
  return cpu::pack_spike_weight(ctx, codes, scales, group, bias, arithmetic);
}

void quantize_groups(Context& ctx, const Tensor& weight, const float* scales, int64_t group, int16_t* codes) {
  check_shape("quantize_groups", "the weight", weight);
  if (weight.dtype != DType::kF32 && weight.dtype != DType::kF16 && weight.dtype != DType::kBF16)
    throw BadInput("quantize_groups: the weight has dtype {}; expected f32, f16 or bf16", dtype_name(weight.dtype));
  if (!scales || !codes) throw BadInput("quantize_groups: {} no data", scales ? "codes have" : "scales have");
  if (group <= 0) throw BadInput("quantize_groups: groups of {} inputs; expected 1 or more", group);
  const int64_t n = weight.shape[0], k = weight.shape[1], groups = (k + group - 1) / group;
  for (int64_t i = 0; i < n * groups; ++i)
    if (!(scales[i] > 0) || !std::isfinite(scales[i]))
      throw BadInput("quantize_groups: the scale of output {}, group {} is {}; expected a finite number above 0",
                     i / groups, i % groups, scales[i]);

  OpScope scope(ctx, OpKind::kQuantize);
  const cpu::SpikeBodies& b = cpu::spike_bodies();
  const cpu::LinearBodies& rows = cpu::linear_bodies();
  for (int t = 0; t < ctx.pool.size(); ++t) ctx.workspace<float>(t, static_cast<size_t>(k));
  std::atomic<int64_t> wrong{-1};
  ctx.pool.parallel_for(n, [&](int64_t o, int thread) {
    float* wide = ctx.workspace<float>(thread, static_cast<size_t>(k));
    rows.widen(weight.dtype, weight.as<std::byte>() + o * k * static_cast<int64_t>(dtype_size(weight.dtype)), k, wide);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group, count = std::min(group, k - first);
      if (!b.quantize(wide + first, count, scales[o * groups + g], codes + o * k + first)) wrong.store(o * groups + g);
    }
  });
  if (const int64_t at = wrong.load(); at >= 0)
    throw BadInput(
        "quantize_groups: output {}, group {} holds a weight that is not finite or whose code passes 15 bits (scale "
        "{})",
        at / groups, at % groups, scales[at]);
  if (scope.on()) {
    OpRecord& r = scope.record;
    r.m = n;
    r.k = k;
    r.weight_bytes = static_cast<int64_t>(weight.bytes()) + 2 * n * k + 4 * n * groups;
  }
}

void spike_linear(Context& ctx, const SpikeWeight& w, const SpikeBatch& x, float* y, LinearMode mode,
                  int64_t y_stride) {
  if (w.out <= 0 || w.in <= 0) throw BadInput("spike_linear: the weight is empty");
  if (x.m < 0 || x.k != w.in)
    throw BadInput("spike_linear: counts have shape [{}, {}]; the weight takes {} inputs", x.m, x.k, w.in);
  if (x.m == 0) return;
  if (!x.counts || !x.rows || !y) throw BadInput("spike_linear: {} no data", !y ? "y has" : "counts have");
  if (y_stride == 0) y_stride = w.out;
  if (x.m > 1 && y_stride < w.out)
    throw BadInput("spike_linear: rows of y are {} floats apart, but each holds {} values", y_stride, w.out);

  OpScope scope(ctx, OpKind::kSpike);
  const bool accumulate = mode == LinearMode::kAccumulate;
  cpu::spike_linear(ctx, w, x, y, accumulate, y_stride);
  if (!scope.on()) return;
  OpRecord& r = scope.record;
  r.m = x.m;
  r.n = w.out;
  r.k = w.in;
  r.inputs = x.m * x.k;
  for (int64_t i = 0; i < x.m; ++i) {
    r.silent_inputs += x.rows[i].silent;
    r.spikes += x.rows[i].spikes;
  }
  r.activation_bytes = 4 * x.m * (x.k + w.out * (accumulate ? 2 : 1));
  if (w.arithmetic != SpikeArithmetic::kEvent) {
    r.macs = x.m * (w.out * w.in + w.overflow_count);
    r.weight_bytes = static_cast<int64_t>(w.bytes());
    return;
  }
  r.synaptic_ops = w.out * r.spikes;
  const std::vector<uint8_t> fires = firing(x);
  const int64_t columns = std::count(fires.begin(), fires.end(), 1);
  int64_t overflow_read = 0;
  for (int64_t e = 0; e < w.overflow_count; ++e) {
    const int64_t input = w.overflow[e].input;
    overflow_read += fires[static_cast<size_t>(input)];
    for (int64_t i = 0; i < x.m; ++i) r.macs += x.counts[i * x.k + input] != 0;
  }
  r.weight_bytes = w.out * columns + 4 * w.out * w.groups() +
                   overflow_read * static_cast<int64_t>(sizeof(SpikeOverflow)) + (w.bias ? 4 * w.out : 0);
}

}  // namespace lacuna

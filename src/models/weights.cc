#include "models/weights.h"

namespace lacuna {
namespace {

float element(const Tensor& t, int64_t i) {
  switch (t.dtype) {
    case DType::kF32:
      return t.as<float>()[i];
    case DType::kF16:
      return to_float(t.as<F16>()[i]);
    case DType::kBF16:
      return to_float(t.as<BF16>()[i]);
    default:
      throw InternalError("element() of dtype {}", dtype_name(t.dtype));
  }
}

bool is_float(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

}  // namespace

size_t linear_bytes(const LinearWeight& w) {
  return (w.panels ? w.panel_bytes : w.weight.bytes()) + (w.row_scale ? static_cast<size_t>(w.out()) * 4 : 0) +
         (w.bias ? static_cast<size_t>(w.out()) * 4 : 0);
}

WeightBinder::WeightBinder(Context& ctx, ModelFiles files, const LoadOptions& options)
    : ctx_(ctx), files_(std::move(files)), options_(options) {}

void WeightBinder::place(const SpikeCoding& coding) {
  const std::optional<size_t> room = ctx_.memory.room();
  const bool copy = options_.place == WeightPlace::kCopied ||
                    (options_.place == WeightPlace::kAuto && room && files_.file_bytes() <= *room / 2);
  const bool stored = options_.weights == WeightMode::kStored && !coding.on;
  if (copy && stored) files_.copy_to_memory(ctx_.memory, ctx_.pool);
}

WeightBinder::~WeightBinder() {
  if (mapped_) ctx_.memory.count_external(MemoryTag::kWeights, -mapped_);
}

const float* WeightBinder::own(Buffer buffer) {
  owned_.push_back(std::move(buffer));
  bytes_ += owned_.back().bytes();
  return owned_.back().as<float>();
}

const float* WeightBinder::vector(const std::string& name, int64_t size) {
  return floats(files_.get(name, {size}), name);
}

const float* WeightBinder::matrix(const std::string& name, int64_t rows, int64_t columns) {
  return floats(files_.get(name, {rows, columns}), name);
}

const float* WeightBinder::floats(const Tensor& t, const std::string& name) {
  const int64_t size = t.elements();
  if (!is_float(t.dtype))
    throw CorruptData("{}: tensor '{}': found dtype {}, expected f32, f16 or bf16", files_.file_of(name).string(), name,
                      dtype_name(t.dtype));
  if (options_.check_finite) check_finite(t, name, files_.file_of(name));
  Buffer buffer(ctx_.memory, MemoryTag::kWeights, static_cast<size_t>(size) * sizeof(float));
  for (int64_t i = 0; i < size; ++i) buffer.as<float>()[i] = element(t, i);
  parameters_ += size;
  return own(std::move(buffer));
}

LinearWeight WeightBinder::linear(const std::string& name, int64_t out, int64_t in, bool bias) {
  return bind(name, files_.get(name + ".weight", {out, in}), bias);
}

LinearWeight WeightBinder::convolution(const std::string& name, int64_t out, int64_t in, int64_t taps, bool bias) {
  const Tensor t = files_.get(name + ".weight", {out, in, taps});
  return bind(name, Tensor(t.data, t.dtype, {out, in * taps}), bias);
}

LinearWeight WeightBinder::bind(const std::string& name, Tensor weight, bool bias) {
  const std::string weight_name = name + ".weight";
  const int64_t out = weight.shape[0], in = weight.shape[1];
  LinearWeight w;
  w.weight = weight;
  const auto file = files_.file_of(weight_name);
  if (!is_float(w.weight.dtype) && w.weight.dtype != DType::kI8)
    throw CorruptData("{}: tensor '{}': found dtype {}, expected f32, f16, bf16 or int8", file.string(), weight_name,
                      dtype_name(w.weight.dtype));
  if (options_.check_finite && w.weight.dtype != DType::kI8) check_finite(w.weight, weight_name, file);
  parameters_ += out * in;
  if (w.weight.dtype == DType::kI8) {
    const int64_t before = parameters_;
    w.row_scale = vector(weight_name + "_scale", out);
    parameters_ = before;  // a scale is not a parameter of the model
  }
  if (w.weight.dtype != DType::kI8 && options_.weights == WeightMode::kInt8) {
    Buffer codes(ctx_.memory, MemoryTag::kWeights, static_cast<size_t>(out * in));
    Buffer scales(ctx_.memory, MemoryTag::kWeights, static_cast<size_t>(out) * sizeof(float));
    quantize_rows(ctx_, w.weight, codes.as<int8_t>(), scales.as<float>());
    w.weight = Tensor(codes.as<int8_t>(), DType::kI8, {out, in});
    own(std::move(codes));
    w.row_scale = own(std::move(scales));
  } else {
    bytes_ += w.weight.bytes();
    if (!files_.copied()) {
      const auto mapped = static_cast<int64_t>(w.weight.bytes());
      ctx_.memory.count_external(MemoryTag::kWeights, mapped);
      mapped_ += mapped;
    }
  }
  if (bias) w.bias = vector(name + ".bias", out);
  return w;
}

const SpikeWeight* WeightBinder::own(PackedSpikeWeight packed) {
  spikes_.push_back(std::move(packed));
  return &spikes_.back().view;
}

PackedSpikeWeight WeightBinder::quantised(const std::string& name, const Tensor& weight, const float* bias,
                                          const SpikeCoding& coding) {
  const std::string scale_name = name + ".weight_quantizer.scales";
  const int64_t out = weight.shape[0], in = weight.shape[1], groups = (in + coding.group - 1) / coding.group;
  const Tensor scales = files_.get(scale_name, {out, groups, 1});
  const auto file = files_.file_of(scale_name).string();
  if (scales.dtype != DType::kF32)
    throw CorruptData("{}: tensor '{}': found dtype {}, expected f32", file, scale_name, dtype_name(scales.dtype));
  if (!is_float(weight.dtype))
    throw CorruptData("{}: tensor '{}.weight': found dtype {}, expected f32, f16 or bf16 beside '{}'", file, name,
                      dtype_name(weight.dtype), scale_name);
  Buffer codes(ctx_.memory, MemoryTag::kScratch, static_cast<size_t>(out * in) * sizeof(int16_t));
  try {
    quantize_groups(ctx_, weight, scales.as<float>(), coding.group, codes.as<int16_t>());
  } catch (const BadInput& error) {
    throw CorruptData("{}: tensor '{}': {}", file, scale_name, error.what());
  }
  return pack_spike_weight(ctx_, Tensor(codes.as<int16_t>(), DType::kI16, {out, in}), scales.as<float>(), coding.group,
                           bias, coding.arithmetic);
}

Projection WeightBinder::projection(const std::string& name, int64_t out, int64_t in, bool bias, float k,
                                    const SpikeCoding& coding, LinearWeight* scored_as_dense, bool floats_too) {
  const size_t bytes_before = bytes_, owned_before = owned_.size();
  const int64_t mapped_before = mapped_;
  LinearWeight dense = linear(name, out, in, bias);
  if (scored_as_dense) *scored_as_dense = dense;
  if (!coding.on || k <= 0) return dense;

  Projection p;
  const bool by_group = coding.group_scales && has(name + ".weight_quantizer.scales");
  const bool by_row = dense.weight.dtype == DType::kI8;
  if (!by_group && (coding.arithmetic == SpikeArithmetic::kFake || (!by_row && floats_too))) {
    // The weight as it is, and counts times their threshold.
    PackedSpikeWeight fake;
    fake.view.arithmetic = SpikeArithmetic::kFake;
    fake.view.out = out;
    fake.view.in = fake.view.group = in;
    fake.view.bias = dense.bias;
    fake.view.fake = dense;
    p.spike = own(std::move(fake));
    return p;
  }
  if (!by_group && !by_row)
    throw Unsupported(
        "{}: tensor '{}.weight': found dtype {}, expected int8 or a tensor '{}.weight_quantizer.scales' for spike "
        "counts times codes; quantise at load (--weights int8) or fake-quantise (--spikes fake)",
        files_.file_of(name + ".weight").string(), name, dtype_name(dense.weight.dtype), name);
  p.spike = own(by_group ? quantised(name, files_.get(name + ".weight"), dense.bias, coding)
                         : pack_spike_weight(ctx_, dense.weight, dense.row_scale, in, dense.bias, coding.arithmetic));
  // What one step reads is the packed weight; the dense one goes unless someone looks at it.
  bytes_ = bytes_before + p.spike->bytes();
  if (scored_as_dense) return p;
  if (mapped_ > mapped_before) {
    ctx_.memory.count_external(MemoryTag::kWeights, mapped_before - mapped_);
    mapped_ = mapped_before;
    if (dense.row_scale) owned_.erase(owned_.begin() + static_cast<std::ptrdiff_t>(owned_before));
  } else {
    // Quantised at load: codes and scales.
    owned_.erase(owned_.begin() + static_cast<std::ptrdiff_t>(owned_before),
                 owned_.begin() + static_cast<std::ptrdiff_t>(owned_.size() - (bias ? 1 : 0)));
  }
  return p;
}

}  // namespace lacuna

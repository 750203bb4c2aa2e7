#include "models/weights.h"

namespace lacuna {
namespace {

float element(const Tensor& t, int64_t i) {
  switch (t.dtype) {
    case DType::kF32: return t.as<float>()[i];
    case DType::kF16: return to_float(t.as<F16>()[i]);
    case DType::kBF16: return to_float(t.as<BF16>()[i]);
    default: throw InternalError("element() of dtype {}", dtype_name(t.dtype));
  }
}

bool is_float(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

}  // namespace

size_t linear_bytes(const LinearWeight& w) {
  return w.weight.bytes() + (w.row_scale ? static_cast<size_t>(w.out()) * 4 : 0) + (w.bias ? static_cast<size_t>(w.out()) * 4 : 0);
}

WeightBinder::WeightBinder(Context& ctx, ModelFiles files, const LoadOptions& options)
    : ctx_(ctx), files_(std::move(files)), options_(options) {}

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
  const std::string weight_name = name + ".weight";
  LinearWeight w;
  w.weight = files_.get(weight_name, {out, in});
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
    const auto mapped = static_cast<int64_t>(w.weight.bytes());
    ctx_.memory.count_external(MemoryTag::kWeights, mapped);
    mapped_ += mapped;
    bytes_ += w.weight.bytes();
  }
  if (bias) w.bias = vector(name + ".bias", out);
  return w;
}

}  // namespace lacuna

#include "models/tensor_stream.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace lacuna {
namespace {

// Bytes of a tensor handled at a time: long writes, little memory, and Ctrl-C within a fraction of a second.
constexpr int64_t kBlockBytes = 8 << 20;

bool is_float(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

// Rows [begin, begin + count) of a matrix, or elements of a vector.
Tensor slice(const Tensor& t, int64_t begin, int64_t count) {
  Tensor part = t;
  const int64_t row = t.elements() / t.shape[0];
  part.data = t.as<std::byte>() + begin * row * static_cast<int64_t>(dtype_size(t.dtype));
  part.shape[0] = count;
  return part;
}

int64_t rows_a_block(const Tensor& t) {
  return std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, static_cast<int64_t>(t.bytes()) / t.shape[0]));
}

// x times factor, rounded to its own type.
void scale(const Tensor& x, double factor, std::byte* out) {
  const int64_t n = x.elements();
  const auto f = [factor](float v) { return static_cast<float>(v * factor); };
  if (x.dtype == DType::kF32)
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(out)[i] = f(x.as<float>()[i]);
  else if (x.dtype == DType::kBF16)
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<BF16*>(out)[i] = to_bf16(f(to_float(x.as<BF16>()[i])));
  else
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<F16*>(out)[i] = to_f16(f(to_float(x.as<F16>()[i])));
}

}  // namespace

// What the jobs share while they run.
struct TensorStream::Writing {
  SafetensorsWriter writer;
  const Progress& progress;
  uint64_t done = 0, total = 0;

  void put(const std::string& name, const void* data, size_t bytes) {
    if (progress.cancelled && progress.cancelled()) throw Cancelled("stopped after {} of {} bytes", done, total);
    writer.write(name, data, bytes);
    done += bytes;
    if (progress.report) progress.report(done, total);
  }
};

void TensorStream::announce(std::string name, DType dtype, std::vector<int64_t> shape) {
  uint64_t bytes = dtype_size(dtype);
  for (const int64_t n : shape) bytes *= static_cast<uint64_t>(n);
  bytes_ += bytes;
  specs_.push_back({std::move(name), dtype, std::move(shape)});
}

void TensorStream::rows(Writing& w, const std::string& to, const Tensor& tensor, double factor) const {
  const int64_t step = rows_a_block(tensor), count = tensor.shape[0];
  Buffer scaled;
  for (int64_t i = 0; i < count; i += step) {
    const Tensor part = slice(tensor, i, std::min(step, count - i));
    if (factor == 1) {
      w.put(to, part.data, part.bytes());
      continue;
    }
    scaled.ensure(ctx_.memory, MemoryTag::kScratch, part.bytes());
    scale(part, factor, scaled.as());
    w.put(to, scaled.as(), part.bytes());
  }
}

void TensorStream::quantised(Writing& w, const std::string& to, const Tensor& tensor, double factor) const {
  const int64_t step = rows_a_block(tensor), count = tensor.shape[0], in = tensor.shape[1];
  Buffer codes(ctx_.memory, MemoryTag::kScratch, static_cast<size_t>(std::min(step, count) * in));
  Buffer scales(ctx_.memory, MemoryTag::kScratch, static_cast<size_t>(count) * sizeof(float));
  for (int64_t i = 0; i < count; i += step) {
    const Tensor part = slice(tensor, i, std::min(step, count - i));
    quantize_rows(ctx_, part, codes.as<int8_t>(), scales.as<float>() + i);
    w.put(to, codes.as(), static_cast<size_t>(part.elements()));
  }
  // Codes do not change with the factor: it belongs to the scales.
  if (factor != 1) scale(Tensor(scales.as(), DType::kF32, {count}), factor, scales.as());
  w.put(to + "_scale", scales.as(), scales.bytes());
}

void TensorStream::vector(const std::string& from, const std::string& to, int64_t size) {
  const Tensor t = source_.get(from, {size});
  const auto file = source_.file_of(from);
  if (!is_float(t.dtype))
    throw CorruptData("{}: tensor '{}': found dtype {}, expected f32, f16 or bf16", file.string(), from,
                      dtype_name(t.dtype));
  announce(to, t.dtype, {size});
  copied_ += size;
  jobs_.push_back([this, t, from, to, file](Writing& w) {
    check_finite(t, from, file);
    rows(w, to, t, 1);
  });
}

void TensorStream::linear(const std::string& from, const std::string& to, int64_t out, int64_t in, bool bias,
                          double factor) {
  const std::string weight = from + ".weight", name = to + ".weight";
  const Tensor t = source_.get(weight, {out, in});
  const auto file = source_.file_of(weight);
  if (!is_float(t.dtype) && t.dtype != DType::kI8)
    throw CorruptData("{}: tensor '{}': found dtype {}, expected f32, f16, bf16 or int8", file.string(), weight,
                      dtype_name(t.dtype));
  copied_ += out * in;
  if (t.dtype == DType::kI8) {
    const std::string scale_name = weight + "_scale";
    const Tensor s = source_.get(scale_name, {out});
    if (s.dtype != DType::kF32)
      throw CorruptData("{}: tensor '{}': found dtype {}, expected f32", source_.file_of(scale_name).string(),
                        scale_name, dtype_name(s.dtype));
    announce(name, DType::kI8, {out, in});
    announce(name + "_scale", DType::kF32, {out});
    jobs_.push_back([this, t, s, name, scale_name, factor](Writing& w) {
      check_finite(s, scale_name, source_.file_of(scale_name));
      rows(w, name, t, 1);
      rows(w, name + "_scale", s, factor);
    });
  } else {
    announce(name, int8_ ? DType::kI8 : t.dtype, {out, in});
    if (int8_) announce(name + "_scale", DType::kF32, {out});
    jobs_.push_back([this, t, weight, file, name, factor](Writing& w) {
      check_finite(t, weight, file);
      if (int8_)
        quantised(w, name, t, factor);
      else
        rows(w, name, t, factor);
    });
  }
  if (bias) vector(from + ".bias", to + ".bias", out);
}

void TensorStream::constant(const std::string& to, int64_t size, float value) {
  generated(to, {size}, [value] { return [value] { return value; }; });
}

void TensorStream::generated(const std::string& to, std::vector<int64_t> shape,
                             std::function<std::function<float()>()> make) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  announce(to, DType::kF32, std::move(shape));
  new_ += count;
  jobs_.push_back([to, count, make = std::move(make)](Writing& w) {
    const std::function<float()> next = make();
    std::vector<float> block;
    for (int64_t i = 0; i < count; i += static_cast<int64_t>(block.size())) {
      block.resize(static_cast<size_t>(std::min<int64_t>(count - i, kBlockBytes / 4)));
      for (float& x : block) x = next();
      w.put(to, block.data(), block.size() * sizeof(float));
    }
  });
}

void TensorStream::write(const std::filesystem::path& file, const Progress& progress) {
  Writing w{SafetensorsWriter(file, specs_, {{"format", "pt"}}), progress, 0, bytes_};
  for (const auto& job : jobs_) job(w);
  w.writer.commit();
}

}  // namespace lacuna

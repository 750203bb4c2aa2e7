#pragma once

#include <deque>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "models/model.h"

namespace lacuna {

// Binds a checkpoint's tensors to layers: checks shapes against the configuration, keeps matrices as
// stored (mapped) or quantises them to int8 per output row, converts small vectors to f32. Owns what
// it made; the files stay mapped as long as it lives. Bytes are charged to MemoryTag::kWeights.
class WeightBinder {
 public:
  WeightBinder(Context& ctx, ModelFiles files, const LoadOptions& options);
  ~WeightBinder();
  WeightBinder(const WeightBinder&) = delete;
  WeightBinder& operator=(const WeightBinder&) = delete;

  bool has(const std::string& name) const { return files_.has(name); }
  // `name`.weight [out, in], with `name`.bias [out] if `bias`.
  LinearWeight linear(const std::string& name, int64_t out, int64_t in, bool bias);
  // `name` [size] as f32.
  const float* vector(const std::string& name, int64_t size);
  // `name` [rows, columns] as f32, for small matrices that are not weights of a product: never quantised.
  const float* matrix(const std::string& name, int64_t rows, int64_t columns);

  int64_t parameters() const { return parameters_; }
  size_t bytes() const { return bytes_; }

 private:
  const float* own(Buffer buffer);
  const float* floats(const Tensor& tensor, const std::string& name);

  Context& ctx_;
  ModelFiles files_;
  LoadOptions options_;
  std::deque<Buffer> owned_;
  int64_t mapped_ = 0;
  int64_t parameters_ = 0;
  size_t bytes_ = 0;
};

// Bytes that one decode step reads of a linear layer.
size_t linear_bytes(const LinearWeight& w);

}  // namespace lacuna

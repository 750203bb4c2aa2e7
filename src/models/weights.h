#pragma once

#include <deque>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "models/model.h"
#include "models/projection.h"

namespace lacuna {

// Binds a checkpoint's tensors to layers: checks shapes against the configuration, keeps matrices as
// stored (mapped or copied) or quantises them to int8 per output row, converts small vectors to f32. Owns what
// it made; the files stay mapped as long as it lives. Bytes are charged to MemoryTag::kWeights.
class WeightBinder {
 public:
  WeightBinder(Context& ctx, ModelFiles files, const LoadOptions& options);
  ~WeightBinder();
  WeightBinder(const WeightBinder&) = delete;
  WeightBinder& operator=(const WeightBinder&) = delete;

  // Puts the stored weights where LoadOptions::place says. Before anything is bound.
  void place(const SpikeCoding& coding = {});

  bool has(const std::string& name) const { return files_.has(name); }
  // `name`.weight [out, in], with `name`.bias [out] if `bias`.
  LinearWeight linear(const std::string& name, int64_t out, int64_t in, bool bias);
  // As linear() for a convolution whose stride is its width: `name`.weight [out, in, taps] takes rows of in * taps
  // values, channel by channel.
  LinearWeight convolution(const std::string& name, int64_t out, int64_t in, int64_t taps, bool bias);
  // As linear() for a layer whose input is spike-coded if k > 0: int8 codes with a scale a row as they are, f32
  // weights of a W8ASpike checkpoint by the codes round(weight / scale) of its `name`.weight_quantizer.scales.
  // Weights of other kinds can only be fake-quantised, which kFake does, and `floats_too` allows for small
  // matrices that int8 checkpoints keep in floats; otherwise they are Unsupported.
  // scored_as_dense: the dense weight, for those who look at it without multiplying (attention scores).
  Projection projection(const std::string& name, int64_t out, int64_t in, bool bias, float k, const SpikeCoding& coding,
                        LinearWeight* scored_as_dense = nullptr, bool floats_too = false);
  // `name` [size] as f32.
  const float* vector(const std::string& name, int64_t size);
  // `name` [rows, columns] as f32, for small matrices that are not weights of a product: never quantised.
  const float* matrix(const std::string& name, int64_t rows, int64_t columns);

  int64_t parameters() const { return parameters_; }
  size_t bytes() const { return bytes_; }

 private:
  LinearWeight bind(const std::string& name, Tensor weight, bool bias);
  const float* own(Buffer buffer);
  const float* floats(const Tensor& tensor, const std::string& name);
  const SpikeWeight* own(PackedSpikeWeight packed);
  PackedSpikeWeight quantised(const std::string& name, const Tensor& weight, const float* bias, const SpikeCoding& coding);

  Context& ctx_;
  ModelFiles files_;
  LoadOptions options_;
  std::deque<Buffer> owned_;
  std::deque<PackedSpikeWeight> spikes_;
  int64_t mapped_ = 0;
  int64_t parameters_ = 0;
  size_t bytes_ = 0;
};

// Bytes that one decode step reads of a linear layer.
size_t linear_bytes(const LinearWeight& w);

}  // namespace lacuna

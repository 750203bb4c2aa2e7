#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "formats/safetensors_writer.h"
#include "models/model.h"

namespace lacuna {

// Makes a checkpoint out of another one's tensors, and new ones, a few rows at a time. First everything is
// announced, then write() does it; nothing is read or computed before.
class TensorStream {
 public:
  // int8: float matrices become codes and a scale a row. The source must outlive the stream.
  TensorStream(Context& ctx, const ModelFiles& source, bool int8) : ctx_(ctx), source_(source), int8_(int8) {}

  // The source's `from` [size] as `to`, as stored.
  void vector(const std::string& from, const std::string& to, int64_t size);
  // `from`.weight [out, in], with `from`.bias [out] if `bias`, times `factor`. Float types are kept (the product
  // rounded to them); of int8 the row scales are multiplied.
  void linear(const std::string& from, const std::string& to, int64_t out, int64_t in, bool bias, double factor = 1);
  // New ones, in f32.
  void constant(const std::string& to, int64_t size, float value);
  // next() gives the elements in order.
  void generated(const std::string& to, std::vector<int64_t> shape, std::function<std::function<float()>()> make);

  struct Progress {
    std::function<void(uint64_t done, uint64_t total)> report;
    std::function<bool()> cancelled;
  };
  void write(const std::filesystem::path& file, const Progress& progress);

  int64_t tensors() const { return static_cast<int64_t>(specs_.size()); }
  uint64_t bytes() const { return bytes_; }
  int64_t copied_parameters() const { return copied_; }
  int64_t new_parameters() const { return new_; }

 private:
  struct Writing;
  void announce(std::string name, DType dtype, std::vector<int64_t> shape);
  void rows(Writing& w, const std::string& to, const Tensor& tensor, double factor) const;
  void quantised(Writing& w, const std::string& to, const Tensor& tensor, double factor) const;

  Context& ctx_;
  const ModelFiles& source_;
  bool int8_;
  std::vector<SafetensorsWriter::Spec> specs_;
  std::vector<std::function<void(Writing&)>> jobs_;
  uint64_t bytes_ = 0;
  int64_t copied_ = 0, new_ = 0;
};

}  // namespace lacuna

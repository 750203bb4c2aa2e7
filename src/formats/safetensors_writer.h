#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/atomic_file.h"
#include "tensor/tensor.h"

namespace lacuna {

// Writes one .safetensors file tensor by tensor, without holding them all. Nothing stands at the
// path until commit(); before that, or after an error (a full disk is an IoError), nothing is left.
// The result passes SafetensorsFile's checks, and every tensor in it is aligned to its element size.
class SafetensorsWriter {
 public:
  struct Spec {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  // All tensors that will be written. BadInput for names that are not UTF-8 or occur twice.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<Spec> tensors,
                    const std::map<std::string, std::string>& metadata = {});

  // A whole tensor, which must match its spec; any order.
  void write(std::string_view name, const Tensor& tensor);
  // The next part of a tensor, row-major; parts of different tensors may alternate.
  void write(std::string_view name, const void* data, size_t bytes);
  // Every tensor must be complete.
  void commit();

 private:
  struct Slot {
    Spec spec;
    uint64_t begin, bytes;  // in the file
    uint64_t written = 0;
  };
  Slot& slot(std::string_view name);

  AtomicFile file_;
  std::map<std::string, Slot, std::less<>> slots_;
};

}  // namespace lacuna

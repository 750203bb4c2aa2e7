#pragma once

#include "cli.h"
#include "formats/safetensors_writer.h"

namespace lacuna::cli {

struct InspectOptions {
  EngineOptions engine;
  DiffusionOptions diffusion;
  std::string ids, out;
  std::vector<std::string> policies, budgets;
  std::vector<const CLI::Option*> cache_options;  // what only means something for a cache that can be evicted
  int64_t greedy = 0;
  bool json = false;
};

// "1,2,3", or "@FILE" with ids separated by commas or white space.
std::vector<int32_t> parse_ids(std::string text);

// Tensors of a run, held until all are known: the file's header comes first.
class Results {
 public:
  template <typename T>
  void add(std::string name, DType dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
    specs_.push_back({std::move(name), dtype, std::move(shape)});
    data_.emplace_back(bytes, bytes + values.size() * sizeof(T));
  }
  void write(const std::string& path) const {
    SafetensorsWriter writer(path, specs_);
    for (size_t i = 0; i < specs_.size(); ++i) writer.write(specs_[i].name, data_[i].data(), data_[i].size());
    writer.commit();
  }

 private:
  std::vector<SafetensorsWriter::Spec> specs_;
  std::vector<std::vector<std::byte>> data_;
};

// The command for a block-diffusion model: what its two halves are; with --ids what they make of them.
int inspect_diffusion(const InspectOptions& options);

}  // namespace lacuna::cli

#pragma once

#include <filesystem>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "formats/safetensors_file.h"

namespace lacuna {

// All weights of a model directory in the Hugging Face layout. What is read, in this order:
// `model.safetensors`; the shards named by the folder's one `*.safetensors.index.json`; the folder's
// one `*.safetensors` file. A path to a .safetensors file stands for that file alone.
// Everything is validated when opened (safetensors_file.h): an index that names a shard or tensor that
// is not there, and a tensor that stands in two shards, are CorruptData.
class ModelFiles {
 public:
  static ModelFiles open(const std::filesystem::path& directory);

  bool has(std::string_view tensor) const { return where_.find(tensor) != where_.end(); }
  // Views stay valid as long as this object. A missing tensor is CorruptData.
  Tensor get(std::string_view tensor) const;
  // As above and of this shape, which the caller derived from config.json; else CorruptData.
  Tensor get(std::string_view tensor, std::initializer_list<int64_t> shape) const;

  // Reads every file into `account`'s memory (SafetensorsFile::copy_to_memory).
  void copy_to_memory(MemoryAccount& account, ThreadPool& pool);
  bool copied() const { return !files_.empty() && files_.front().copied(); }

  std::vector<std::string> names() const;
  std::filesystem::path file_of(std::string_view tensor) const { return file(tensor).name(); }
  // Bytes mapped or copied, for MemoryAccount::count_external(MemoryTag::kWeights, …).
  size_t file_bytes() const;
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  const SafetensorsFile& file(std::string_view tensor) const;
  void add(const std::filesystem::path& path);

  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t, std::less<>> where_;  // tensor -> index into files_
};

}  // namespace lacuna

#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "base/threads.h"
#include "tensor/memory.h"
#include "tensor/tensor.h"

namespace lacuna {

// One .safetensors file: 8 bytes header length (little-endian u64), a JSON header
// {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}, data.
// Format: huggingface/safetensors, README "Format" and lib.rs `Metadata::validate`.
//
// Everything is checked when the file is opened; a file that passes can be read without further
// checks. Beyond the JSON itself (no duplicate keys): header of at most 100 MB inside the file,
// known dtypes, shape × dtype = byte range, ranges inside the data, no overlaps, no holes.
// Violations are CorruptData that names file, tensor, field, found and expected; 8-bit and smaller
// float dtypes are Unsupported.
//
// The format allows tensors that do not start at a multiple of their element size (files from old
// writers). Those are copied to aligned memory when the file is opened; all others are views of
// the mapped file.
class SafetensorsFile {
 public:
  struct Entry {
    DType dtype;
    std::vector<int64_t> shape;
    std::span<const std::byte> data;  // aligned to the element size
  };

  explicit SafetensorsFile(const std::filesystem::path& path);
  // The same over bytes in memory, which must outlive the result; `name` takes the path's place.
  SafetensorsFile(std::span<const std::byte> bytes, std::string name);
  SafetensorsFile(SafetensorsFile&&) = default;
  SafetensorsFile& operator=(SafetensorsFile&&) = default;

  const std::string& name() const { return name_; }
  const std::map<std::string, Entry, std::less<>>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // A view that stays valid as long as this object. CorruptData when the file has no such tensor;
  // Unsupported when it has more than Tensor::kMaxRank dimensions.
  Tensor get(std::string_view tensor) const;
  // Reads the file into `account`'s memory, where it lies in huge pages (tensor/blocks.h), and closes it. Views
  // given out before are no longer valid. Throws OutOfMemory; then everything is as it was.
  void copy_to_memory(MemoryAccount& account, ThreadPool& pool);
  bool copied() const { return static_cast<bool>(copy_); }
  // Memory these weights take once touched: the file itself plus the copies of misaligned tensors.
  size_t bytes() const { return bytes_.size() + copied_bytes_; }

 private:
  void parse();

  std::string name_;
  MappedFile file_;
  Buffer copy_;  // of the whole file, in its place
  std::span<const std::byte> bytes_;
  std::map<std::string, Entry, std::less<>> entries_;
  std::map<std::string, std::string> metadata_;
  std::vector<std::unique_ptr<std::byte[]>> copies_;
  size_t copied_bytes_ = 0;
};

// Throws CorruptData naming file, tensor and index of the first NaN or infinity. Integer tensors
// always pass. One pass over the data at memory speed.
void check_finite(const Tensor& tensor, std::string_view name, const std::filesystem::path& file);

// "F32", "BF16", … as the format spells them.
std::string_view safetensors_dtype(DType dtype);

}  // namespace lacuna

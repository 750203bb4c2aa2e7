#include "formats/safetensors_writer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "formats/json.h"
#include "formats/safetensors_file.h"

namespace lacuna {
namespace {

// Data begin at a multiple of a cache line, counted from the start of the (page-aligned) mapping.
constexpr size_t kAlignment = 64;

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<Spec> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : file_(path) {
  // Wide elements first: the format allows no gaps, and so each tensor still starts aligned.
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const Spec& a, const Spec& b) { return dtype_size(a.dtype) > dtype_size(b.dtype); });
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t at = 0;
  for (Spec& spec : tensors) {
    uint64_t bytes = dtype_size(spec.dtype);
    for (int64_t n : spec.shape) bytes *= static_cast<uint64_t>(n);
    if (spec.name == "__metadata__" || header.contains(spec.name))
      throw BadInput("{}: tensor '{}' is to be written twice or has a reserved name", path.string(), spec.name);
    header[spec.name] = {{"dtype", std::string(safetensors_dtype(spec.dtype))},
                         {"shape", spec.shape},
                         {"data_offsets", {at, at + bytes}}};
    std::string name = spec.name;
    slots_.emplace(std::move(name), Slot{std::move(spec), at, bytes});
    at += bytes;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception& error) {
    throw BadInput("{}: a tensor name or its metadata is not UTF-8: {}", path.string(), error.what());
  }
  text.resize((8 + text.size() + kAlignment - 1) / kAlignment * kAlignment - 8, ' ');
  const uint64_t header_bytes = text.size();
  char length[8];
  std::memcpy(length, &header_bytes, 8);
  file_.write_at(0, length, 8);
  file_.write_at(8, text.data(), text.size());
  for (auto& [name, slot] : slots_) slot.begin += 8 + header_bytes;
}

SafetensorsWriter::Slot& SafetensorsWriter::slot(std::string_view name) {
  const auto found = slots_.find(name);
  if (found == slots_.end()) throw InternalError("tensor '{}' was not announced to the writer", name);
  return found->second;
}

void SafetensorsWriter::write(std::string_view name, const Tensor& tensor) {
  const Slot& s = slot(name);
  const bool same = tensor.dtype == s.spec.dtype && tensor.rank == static_cast<int>(s.spec.shape.size()) &&
                    std::equal(s.spec.shape.begin(), s.spec.shape.end(), tensor.shape.begin());
  if (!same)
    throw InternalError("tensor '{}' of dtype {} and shape {} is not what was announced", name,
                        dtype_name(tensor.dtype), tensor.shape_string());
  write(name, tensor.data, tensor.bytes());
}

void SafetensorsWriter::write(std::string_view name, const void* data, size_t bytes) {
  Slot& s = slot(name);
  if (bytes > s.bytes - s.written)
    throw InternalError("tensor '{}' has {} bytes, and {} more were written", name, s.bytes, s.written + bytes - s.bytes);
  file_.write_at(s.begin + s.written, data, bytes);
  s.written += bytes;
}

void SafetensorsWriter::commit() {
  for (const auto& [name, slot] : slots_)
    if (slot.written != slot.bytes)
      throw InternalError("tensor '{}' was written to byte {} of {}", name, slot.written, slot.bytes);
  file_.commit();
}

}  // namespace lacuna

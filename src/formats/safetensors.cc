#include "formats/safetensors.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "formats/json.h"

namespace lacuna {

namespace fs = std::filesystem;

namespace {

constexpr size_t kMaxIndex = 100'000'000;  // bytes; as for a safetensors header

bool ends_with(const std::string& text, std::string_view end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// File names in the folder that end so, sorted.
std::vector<std::string> files_ending(const fs::path& directory, std::string_view end) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator at(directory, error), stop; !error && at != stop; at.increment(error))
    if (std::string name = at->path().filename().string(); ends_with(name, end)) names.push_back(std::move(name));
  if (error) throw IoError("{}: cannot list the folder: {}", directory.string(), error.message());
  std::sort(names.begin(), names.end());
  return names;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

void ModelFiles::add(const fs::path& path) {
  files_.emplace_back(path);
  for (const auto& [tensor, unused] : files_.back().entries()) {
    const auto [at, added] = where_.emplace(tensor, files_.size() - 1);
    if (!added)
      throw CorruptData("{}: tensor '{}' stands in two files, {} and {}", directory_, name_excerpt(tensor),
                        files_[at->second].name(), files_.back().name());
  }
}

ModelFiles ModelFiles::open(const fs::path& directory) {
  ModelFiles model;
  model.directory_ = directory.string();
  std::error_code ignored;
  if (!fs::exists(directory, ignored)) throw IoError("{}: no such file or folder", directory.string());
  if (!fs::is_directory(directory, ignored)) {
    model.add(directory);
    return model;
  }
  if (fs::exists(directory / "model.safetensors", ignored)) {
    model.add(directory / "model.safetensors");
    return model;
  }
  const auto indices = files_ending(directory, ".safetensors.index.json");
  if (indices.size() > 1)
    throw BadInput("{}: has {} safetensors indices ({}), expected one", directory.string(), indices.size(),
                   listed(indices));
  if (indices.empty()) {
    const auto singles = files_ending(directory, ".safetensors");
    if (singles.size() == 1) {
      model.add(directory / singles[0]);
      return model;
    }
    if (singles.size() > 1)
      throw BadInput("{}: has {} safetensors files ({}) and no index, expected model.safetensors or an index",
                     directory.string(), singles.size(), listed(singles));
    if (!files_ending(directory, ".bin").empty())
      throw Unsupported("{}: has weights only as .bin (pickle) files, expected safetensors", directory.string());
    throw BadInput("{}: has no weights, expected model.safetensors or a sharded model with its index",
                   directory.string());
  }

  const fs::path index_path = directory / indices[0];
  const std::string where = index_path.string();
  const Json index = parse_json(read_text_file(index_path, kMaxIndex), where);
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || map == index.end() || !map->is_object())
    throw CorruptData("{}: has no object 'weight_map' of tensor names and shard files", where);
  std::set<std::string> shards;
  for (const auto& [tensor, value] : map->items()) {
    if (!value.is_string())
      throw CorruptData("{}: weight_map['{}'] is {}, expected a file name", where, name_excerpt(tensor), json_excerpt(value));
    const auto& shard = value.get_ref<const std::string&>();
    // A name with a folder in it could make a downloaded index read any file of the machine.
    if (shard.empty() || shard.find('/') != std::string::npos || shard.find('\0') != std::string::npos)
      throw CorruptData("{}: weight_map['{}'] is {}, expected a plain file name", where, name_excerpt(tensor), json_excerpt(value));
    shards.insert(shard);
  }
  for (const auto& shard : shards) {
    if (!fs::exists(directory / shard, ignored))
      throw CorruptData("{}: names the shard '{}', which is not in {}", where, name_excerpt(shard), directory.string());
    model.add(directory / shard);
  }
  for (const auto& [tensor, value] : map->items()) {
    const auto found = model.where_.find(tensor);
    const auto& shard = value.get_ref<const std::string&>();
    if (found == model.where_.end() || fs::path(model.files_[found->second].name()).filename() != shard)
      throw CorruptData("{}: says tensor '{}' is in '{}', which has no such tensor", where, name_excerpt(tensor),
                        name_excerpt(shard));
  }
  return model;
}

const SafetensorsFile& ModelFiles::file(std::string_view tensor) const {
  const auto found = where_.find(tensor);
  if (found == where_.end())
    throw CorruptData("{}: has no tensor '{}', which the model's config.json calls for", directory_, tensor);
  return files_[found->second];
}

Tensor ModelFiles::get(std::string_view tensor) const { return file(tensor).get(tensor); }

Tensor ModelFiles::get(std::string_view tensor, std::initializer_list<int64_t> shape) const {
  const Tensor found = get(tensor);
  if (!std::equal(shape.begin(), shape.end(), found.shape.begin(), found.shape.begin() + found.rank)) {
    const Tensor expected(nullptr, found.dtype, shape);
    throw CorruptData("{}: tensor '{}' has shape {}, expected {} from config.json", file_of(tensor).string(), tensor,
                      found.shape_string(), expected.shape_string());
  }
  return found;
}

void ModelFiles::copy_to_memory(MemoryAccount& account, ThreadPool& pool) {
  for (SafetensorsFile& file : files_) file.copy_to_memory(account, pool);
}

std::vector<std::string> ModelFiles::names() const {
  std::vector<std::string> names;
  for (const auto& [name, unused] : where_) names.push_back(name);
  return names;
}

size_t ModelFiles::file_bytes() const {
  size_t bytes = 0;
  for (const auto& file : files_) bytes += file.bytes();
  return bytes;
}

}  // namespace lacuna

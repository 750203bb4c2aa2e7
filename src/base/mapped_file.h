#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace lacuna {

// A whole regular file, mapped read-only. Pages are read when first touched, so opening a large
// file costs nothing. A file that another process truncates while it is mapped cannot be guarded
// against; checkpoints are expected to stay as they are while they are in use.
class MappedFile {
 public:
  MappedFile() = default;
  // Throws IoError (missing, unreadable, not a regular file) that names the path.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::filesystem::path& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Lets the system take back the memory of whole pages within [begin, end); touched again, they are read again.
  void forget(size_t begin, size_t end) const;

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The whole file as text. Throws IoError; refuses files larger than `limit` bytes (BadInput), so
// that a wrong path to a huge file does not fill the memory.
std::string read_text_file(const std::filesystem::path& path, size_t limit);

}  // namespace lacuna

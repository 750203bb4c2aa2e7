#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>

namespace lacuna {

// Writes a file so that its name never shows a half-written one: the bytes go to a temporary name
// beside it, and commit() makes them durable and renames. Without commit(), or after an error, the
// temporary file is removed and whatever stood at the name before is untouched.
// A name that stands for a device or a pipe (/dev/stdout) is written directly, never replaced.
// Every failure (full disk, no permission, missing folder) is an IoError that names the path.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends.
  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  // Writes at a byte offset, in any order; needs a seekable target. Not to be mixed with write().
  void write_at(uint64_t offset, const void* data, size_t bytes);
  // Nothing may be written afterwards.
  void commit();

 private:
  [[noreturn]] void fail(const char* what);
  void discard() noexcept;

  std::filesystem::path path_;       // as the caller named it, for messages
  std::filesystem::path target_;     // what the rename replaces: path_ with links resolved
  std::filesystem::path temporary_;  // empty when written directly
  int fd_ = -1;
};

// One whole file at once.
void write_file(const std::filesystem::path& path, std::string_view contents);

}  // namespace lacuna

#include "base/mapped_file.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"

namespace lacuna {

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  struct stat info {};
  // Looked at before opening: opening a FIFO would wait for a writer.
  if (::stat(path.c_str(), &info) != 0) throw IoError("{}: {}", path.string(), std::strerror(errno));
  if (!S_ISREG(info.st_mode)) throw IoError("{}: not a regular file", path.string());
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw IoError("{}: cannot open: {}", path.string(), std::strerror(errno));
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    throw IoError("{}: changed while it was opened", path.string());
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ > 0) {  // an empty mapping is an error to the system, an empty file is not one to us
    void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) {
      const int error = errno;
      ::close(fd);
      throw IoError("{}: cannot map {} bytes: {}", path.string(), size_, std::strerror(error));
    }
    data_ = static_cast<const std::byte*>(data);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::forget(size_t begin, size_t end) const {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  begin = (begin + page - 1) / page * page;
  end = end == size_ ? end : end / page * page;
  // Advice: at worst the pages stay.
  if (begin < end) ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_text_file(const std::filesystem::path& path, size_t limit) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  if (bytes.size() > limit)
    throw BadInput("{}: has {} bytes, expected at most {}", path.string(), bytes.size(), limit);
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace lacuna

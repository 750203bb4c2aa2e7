#include "base/atomic_file.h"

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include "base/error.h"

namespace lacuna {

namespace fs = std::filesystem;

AtomicFile::AtomicFile(const fs::path& path) : path_(path), target_(path) {
  std::error_code ignored;
  const fs::file_status status = fs::status(path, ignored);
  if (fs::is_directory(status)) throw IoError("{}: is a folder, expected a file name to write to", path.string());
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (fd_ < 0) fail("cannot open for writing");
    return;
  }
  // A link keeps pointing where it did; the file behind it is the one replaced.
  if (fs::is_symlink(fs::symlink_status(path, ignored))) {
    const fs::path resolved = fs::weakly_canonical(path, ignored);
    if (!ignored) target_ = resolved;
  }
  static std::atomic<unsigned> counter{0};
  temporary_ = target_;
  temporary_ += fmt::format(".tmp-{}-{}", ::getpid(), counter++);
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    temporary_.clear();
    fail("cannot create");
  }
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::write(const void* data, size_t bytes) {
  LACUNA_CHECK(fd_ >= 0);
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(fd_, at, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("cannot write");
    at += n;
    bytes -= static_cast<size_t>(n);
  }
}

void AtomicFile::write_at(uint64_t offset, const void* data, size_t bytes) {
  LACUNA_CHECK(fd_ >= 0);
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, at, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("cannot write");
    at += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  LACUNA_CHECK(fd_ >= 0);
  if (temporary_.empty()) {
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0) fail("cannot finish writing");
    return;
  }
  if (::fsync(fd_) != 0) fail("cannot make durable");
  const int fd = std::exchange(fd_, -1);
  if (::close(fd) != 0) fail("cannot finish writing");
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("cannot rename into place");
  temporary_.clear();
  // The rename itself is durable once the folder is. Some file systems cannot sync a folder; the
  // file is then whole all the same, so a refusal is no error.
  const fs::path folder = target_.has_parent_path() ? target_.parent_path() : fs::path(".");
  const int folder_fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_fd >= 0) {
    ::fsync(folder_fd);
    ::close(folder_fd);
  }
}

void AtomicFile::fail(const char* what) {
  const int error = errno;
  discard();
  throw IoError("{}: {}: {}", path_.string(), what, std::strerror(error));
}

void AtomicFile::discard() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  temporary_.clear();
}

void write_file(const fs::path& path, std::string_view contents) {
  AtomicFile file(path);
  file.write(contents);
  file.commit();
}

}  // namespace lacuna

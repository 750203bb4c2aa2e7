#include "base/atomic_folder.h"

#include <unistd.h>

#include <atomic>
#include <system_error>

#include "base/error.h"

namespace lacuna {

namespace fs = std::filesystem;

namespace {

// A name beside `path` that nobody uses.
fs::path beside(const fs::path& path, const char* what) {
  static std::atomic<unsigned> counter{0};
  fs::path name = path;
  name += fmt::format(".{}-{}-{}", what, ::getpid(), counter++);
  return name;
}

}  // namespace

AtomicFolder::AtomicFolder(const fs::path& path, bool replace, const char* marker) {
  std::error_code error;
  target_ = fs::weakly_canonical(path, error);  // a link keeps pointing where it did; no trailing slash either
  if (error || path.empty()) throw BadInput("\"{}\": expected the name of a folder to write", path.string());
  if (target_.filename().empty()) target_ = target_.parent_path();
  const fs::file_status status = fs::status(target_, error);
  if (fs::exists(status)) {
    if (!replace) throw BadInput("{}: exists already; expected a new name, or --force to replace it", path.string());
    if (!fs::is_directory(status)) throw BadInput("{}: is not a folder, so it is not replaced", path.string());
    if (!fs::is_empty(target_, error) && !fs::exists(target_ / marker, error))
      throw BadInput("{}: is neither empty nor a folder with a {}, so it is not replaced", path.string(), marker);
  }
  temporary_ = beside(target_, "tmp");
  if (!fs::create_directory(temporary_, error) || error) {
    const std::string why = error ? error.message() : "the name is taken";
    const std::string name = temporary_.string();
    temporary_.clear();
    throw IoError("{}: cannot create the folder {}: {}", path.string(), name, why);
  }
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void AtomicFolder::commit() {
  LACUNA_CHECK(!temporary_.empty());
  std::error_code error;
  fs::path old;
  if (fs::exists(target_, error)) {
    old = beside(target_, "old");
    fs::rename(target_, old, error);
    if (error) throw IoError("{}: cannot be moved out of the way: {}", target_.string(), error.message());
  }
  fs::rename(temporary_, target_, error);
  if (error) {
    const std::string why = error.message();
    if (!old.empty()) fs::rename(old, target_, error);
    throw IoError("{}: cannot rename the finished folder into place: {}", target_.string(), why);
  }
  temporary_.clear();
  if (!old.empty()) fs::remove_all(old, error);
}

}  // namespace lacuna

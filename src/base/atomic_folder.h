#pragma once

#include <filesystem>

namespace lacuna {

// Makes a folder so that its name never shows a half-written one: files go into a temporary folder beside
// it, and commit() renames. Without commit(), or after an error, the temporary folder is removed and
// whatever stood at the name before is untouched.
class AtomicFolder {
 public:
  // BadInput when something stands at the path already, unless `replace` and it is a folder that is empty or
  // holds a file `marker`: never anything that a slip of the hand may have named.
  AtomicFolder(const std::filesystem::path& path, bool replace, const char* marker);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  // Where to write until commit().
  const std::filesystem::path& temporary() const { return temporary_; }
  void commit();

 private:
  std::filesystem::path target_, temporary_;
};

}  // namespace lacuna

#include "base/atomic_folder.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "base/atomic_file.h"
#include "base/error.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

class Folder : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lacuna-folder-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }
  size_t entries() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }
  std::string refusal(const fs::path& path, bool replace) const {
    try {
      AtomicFolder folder(path, replace, "config.json");
    } catch (const BadInput& error) {
      return error.what();
    }
    return "";
  }
  fs::path dir_;
};

TEST_F(Folder, AppearsWholeOrNotAtAll) {
  {
    AtomicFolder folder(dir_ / "out", false, "config.json");
    write_file(folder.temporary() / "a", "x");
    EXPECT_FALSE(fs::exists(dir_ / "out"));
    folder.commit();
  }
  EXPECT_TRUE(fs::exists(dir_ / "out" / "a"));
  { AtomicFolder folder(dir_ / "other", false, "config.json"); }
  EXPECT_EQ(entries(), 1u);
}

TEST_F(Folder, ReplacesOnlyWhenAskedAndOnlyItsKind) {
  fs::create_directories(dir_ / "out" / "deep");
  EXPECT_NE(refusal(dir_ / "out", false).find("--force"), std::string::npos);
  EXPECT_NE(refusal(dir_ / "out", true).find("config.json"), std::string::npos);
  write_file(dir_ / "out" / "config.json", "{}");
  {
    AtomicFolder folder(dir_ / "out" / "", true, "config.json");
    write_file(folder.temporary() / "new", "x");
    EXPECT_TRUE(fs::exists(dir_ / "out" / "deep"));
  }
  EXPECT_TRUE(fs::exists(dir_ / "out" / "deep")) << "no commit, no change";
  AtomicFolder folder(dir_ / "out", true, "config.json");
  write_file(folder.temporary() / "new", "x");
  folder.commit();
  EXPECT_TRUE(fs::exists(dir_ / "out" / "new"));
  EXPECT_FALSE(fs::exists(dir_ / "out" / "deep"));
  EXPECT_EQ(entries(), 1u);
}

TEST_F(Folder, RefusesFilesAndMissingParents) {
  write_file(dir_ / "file", "x");
  EXPECT_NE(refusal(dir_ / "file", true).find("not a folder"), std::string::npos);
  EXPECT_THROW(AtomicFolder(dir_ / "none" / "out", false, "config.json"), IoError);
  EXPECT_NE(refusal("", false), "");
  EXPECT_EQ(entries(), 1u);
}

}  // namespace
}  // namespace lacuna

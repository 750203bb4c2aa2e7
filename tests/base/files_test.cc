#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mapped_file.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

class Files : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lacuna-files-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }
  size_t entries() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }
  fs::path dir_;
};

std::string message(const std::function<void()>& run) {
  try {
    run();
  } catch (const IoError& error) {
    return error.what();
  }
  ADD_FAILURE() << "no IoError";
  return "";
}

TEST_F(Files, WritesAndMaps) {
  const fs::path path = dir_ / "a";
  AtomicFile file(path);
  file.write("hello ");
  EXPECT_FALSE(fs::exists(path)) << "nothing under the name before commit()";
  file.write("world");
  file.commit();
  EXPECT_EQ(entries(), 1u);
  const MappedFile mapped(path);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size()), "hello world");
  EXPECT_EQ(read_text_file(path, 11), "hello world");
  EXPECT_THROW(read_text_file(path, 10), BadInput);
}

TEST_F(Files, WritesAtOffsets) {
  AtomicFile file(dir_ / "a");
  file.write_at(3, "def", 3);
  file.write_at(0, "abc", 3);
  file.commit();
  EXPECT_EQ(read_text_file(dir_ / "a", 100), "abcdef");
}

TEST_F(Files, UncommittedLeavesTheOldFile) {
  write_file(dir_ / "a", "old");
  {
    AtomicFile file(dir_ / "a");
    file.write("new");
  }
  EXPECT_EQ(read_text_file(dir_ / "a", 100), "old");
  EXPECT_EQ(entries(), 1u);
}

TEST_F(Files, LinksStayLinks) {
  write_file(dir_ / "real", "old");
  fs::create_symlink("real", dir_ / "link");
  write_file(dir_ / "link", "new");
  EXPECT_TRUE(fs::is_symlink(dir_ / "link"));
  EXPECT_EQ(read_text_file(dir_ / "real", 100), "new");
}

TEST_F(Files, FullDiskIsAnIoErrorAndLeavesNothing) {
  // A limit on file sizes fails a write the way a full disk does: in the middle.
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 4096;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string text = message([&] { write_file(dir_ / "big", std::string(100'000, 'x')); });
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(text.find((dir_ / "big").string()), std::string::npos) << text;
  EXPECT_EQ(entries(), 0u);
}

TEST_F(Files, DevicesAreWrittenNotReplaced) {
  struct stat info {};
  const std::string text = message([] { write_file("/dev/full", "x"); });
  EXPECT_NE(text.find("/dev/full"), std::string::npos) << text;
  ASSERT_EQ(::stat("/dev/full", &info), 0);
  EXPECT_TRUE(S_ISCHR(info.st_mode));
  EXPECT_NO_THROW(write_file("/dev/null", "x"));
}

TEST_F(Files, RefusalsNameThePath) {
  EXPECT_NE(message([&] { MappedFile(dir_ / "none"); }).find("none"), std::string::npos);
  EXPECT_NE(message([&] { MappedFile file(dir_); }).find(dir_.string()), std::string::npos);
  EXPECT_NE(message([&] { write_file(dir_ / "no" / "such" / "a", "x"); }).find("such/a"), std::string::npos);
  EXPECT_NE(message([&] { write_file(dir_, "x"); }).find(dir_.string()), std::string::npos);
  ASSERT_EQ(mkfifo((dir_ / "pipe").c_str(), 0600), 0);
  EXPECT_NE(message([&] { MappedFile(dir_ / "pipe"); }).find("pipe"), std::string::npos) << "and does not wait for a writer";
}

TEST_F(Files, EmptyFileIsEmpty) {
  write_file(dir_ / "a", "");
  EXPECT_EQ(MappedFile(dir_ / "a").bytes().size(), 0u);
}

}  // namespace
}  // namespace lacuna

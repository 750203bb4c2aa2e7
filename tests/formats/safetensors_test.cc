#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>

#include "base/atomic_file.h"
#include "base/error.h"
#include "formats/safetensors.h"
#include "formats/safetensors_writer.h"
#include "refusals.h"

namespace lacuna {
namespace {

using refusals::expect_says;
using refusals::refusal;

namespace fs = std::filesystem;

// Header (as it is) and data as the bytes of a file.
std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

SafetensorsFile parse(const std::string& bytes) { return SafetensorsFile(std::as_bytes(std::span(bytes)), "x.safetensors"); }

struct Fault {
  const char* name;
  std::string header;
  size_t data_bytes;
  std::initializer_list<const char*> says;
};

TEST(Safetensors, RefusesFaultyHeaders) {
  const Fault faults[] = {
      {"not JSON", "{\"a\":", 0, {"header", "JSON"}},
      {"a list", "[]", 0, {"object"}},
      {"key twice", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, {"'a'", "twice"}},
      {"unknown dtype", R"({"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}})", 1, {"'a'", "dtype", "Q4", "F32"}},
      {"dtype is a number", R"({"a":{"dtype":4,"shape":[1],"data_offsets":[0,1]}})", 1, {"'a'", "dtype", "4"}},
      {"no shape", R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, {"'a'", "'shape'"}},
      {"negative size", R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, {"'a'", "shape", "-1"}},
      {"size not whole", R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, {"'a'", "shape", "1.5"}},
      {"product overflows", R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, {"'a'", "shape", "64 bits"}},
      {"size overflows", R"({"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}})", 0, {"'a'", "shape"}},
      {"fewer bytes than the shape", R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, {"'a'", "span 4", "expected 8"}},
      {"offsets out of file", R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 4, {"'a'", "data_offsets", "[0,9]", "4"}},
      {"offsets backwards", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[3,2]}})", 4, {"'a'", "data_offsets", "[3,2]"}},
      {"offsets huge", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,0]}})", 4, {"'a'", "data_offsets"}},
      {"one offset", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, {"'a'", "data_offsets"}},
      {"overlap", R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", 4, {"'b'", "overlaps", "'a'"}},
      {"hole", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})", 3, {"'b'", "byte 2", "expected 1"}},
      {"bytes behind the last", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 2, {"byte 1", "expected 2"}},
      {"unknown field", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"stride":[1]}})", 1, {"'a'", "stride"}},
      {"metadata not text", R"({"__metadata__":{"n":1}})", 0, {"__metadata__", "'n'"}},
      {"deep nesting", "{\"a\":" + std::string(100'000, '['), 0, {"nested"}},
  };
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.name);
    const std::string message = refusal([&] { parse(file_of(fault.header, std::string(fault.data_bytes, '\0'))); });
    expect_says(message, {"x.safetensors"});
    expect_says(message, fault.says);
  }
}

TEST(Safetensors, RefusesImpossibleLengths) {
  expect_says(refusal([] { parse("abc"); }), {"x.safetensors", "3 bytes"});
  std::string bytes = file_of("{}", "");
  bytes[0] = 100;
  expect_says(refusal([&] { parse(bytes); }), {"header length", "100", "2"});
  std::memset(bytes.data(), 0xFF, 8);
  expect_says(refusal([&] { parse(bytes); }), {"header length", "18446744073709551615", "100000000"});
}

TEST(Safetensors, SmallFloatsAreUnsupported) {
  const std::string header = R"({"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}})";
  expect_says(refusal<Unsupported>([&] { parse(file_of(header, "x")); }), {"'a'", "F8_E4M3"});
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"I8","shape":[3],"data_offsets":[16,19]}})";
  const std::string whole = file_of(header, std::string(19, '\1'));
  EXPECT_NO_THROW(parse(whole));
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string part = whole.substr(0, n);
    EXPECT_THROW(parse(part), CorruptData) << n;
  }
}

TEST(Safetensors, MisalignedTensorsAreCopied) {
  // Found by old writers, which did not pad the header: here data begin at an odd address.
  std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  const float values[2] = {1.5f, -2.0f};
  std::string data(9, '\7');
  std::memcpy(data.data() + 1, values, 8);
  for (int pad = 0; pad < 8; ++pad, header += ' ') {
    const std::string bytes = file_of(header, data);
    const SafetensorsFile file = parse(bytes);
    const Tensor a = file.get("a");
    EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data) % 4, 0u);
    EXPECT_EQ(a.as<float>()[0], 1.5f);
    EXPECT_EQ(a.as<float>()[1], -2.0f);
    EXPECT_EQ(file.get("b").as<uint8_t>()[0], 7);
    EXPECT_GE(file.bytes(), bytes.size());
  }
}

TEST(Safetensors, TooManyDimensionsAreUnsupportedWhenAskedFor) {
  const SafetensorsFile file = parse(file_of(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1],"data_offsets":[0,1]}})", "x"));
  expect_says(refusal<Unsupported>([&] { file.get("a"); }), {"'a'", "6 dimensions"});
  expect_says(refusal([&] { file.get("c"); }), {"x.safetensors", "'c'"});
}

TEST(Safetensors, FindsTheFirstValueThatIsNotFinite) {
  std::vector<float> f(10'000, 1.0f);
  const Tensor tensor(f.data(), DType::kF32, {100, 100});
  EXPECT_NO_THROW(check_finite(tensor, "t", "f"));
  f[9'000] = std::numeric_limits<float>::infinity();
  f[7'777] = std::nanf("");
  expect_says(refusal([&] { check_finite(tensor, "t", "f.safetensors"); }), {"f.safetensors", "'t'", "[100, 100]", "7777"});
  std::vector<BF16> b(5'000, to_bf16(-3.0f));
  EXPECT_NO_THROW(check_finite(Tensor(b.data(), DType::kBF16, {5'000}), "t", "f"));
  b[4'999] = to_bf16(-std::numeric_limits<float>::infinity());
  expect_says(refusal([&] { check_finite(Tensor(b.data(), DType::kBF16, {5'000}), "t", "f"); }), {"4999"});
  std::vector<F16> h(3, F16{0x7bff});
  EXPECT_NO_THROW(check_finite(Tensor(h.data(), DType::kF16, {3}), "t", "f"));
  h[0] = F16{0x7e00};
  EXPECT_THROW(check_finite(Tensor(h.data(), DType::kF16, {3}), "t", "f"), CorruptData);
  std::vector<double> d(2, 1.0);
  d[1] = std::nan("");
  expect_says(refusal([&] { check_finite(Tensor(d.data(), DType::kF64, {2}), "t", "f"); }), {"index 1"});
  const int8_t bytes[2] = {-1, 127};
  EXPECT_NO_THROW(check_finite(Tensor(bytes, DType::kI8, {2}), "t", "f"));
}

class Folder : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lacuna-safetensors-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }
  // A file of f32 tensors, each of two values.
  void shard(const std::string& name, const std::vector<std::string>& tensors) {
    std::vector<SafetensorsWriter::Spec> specs;
    for (const auto& tensor : tensors) specs.push_back({tensor, DType::kF32, {2}});
    SafetensorsWriter writer(dir_ / name, specs);
    const float values[2] = {1, 2};
    for (const auto& tensor : tensors) writer.write(tensor, Tensor(values, DType::kF32, {2}));
    writer.commit();
  }
  void index(const std::string& map) {
    write_file(dir_ / "model.safetensors.index.json", "{\"metadata\":{\"total_size\":16},\"weight_map\":" + map + "}");
  }
  std::string open_refusal() {
    return refusal([&] { ModelFiles::open(dir_); });
  }
  fs::path dir_;
};

TEST_F(Folder, SingleFile) {
  shard("model.safetensors", {"a", "b"});
  const auto model = ModelFiles::open(dir_);
  EXPECT_TRUE(model.has("a"));
  EXPECT_FALSE(model.has("c"));
  EXPECT_EQ(model.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(model.get("b", {2}).as<float>()[1], 2.0f);
  EXPECT_EQ(model.file_of("a"), dir_ / "model.safetensors");
  EXPECT_EQ(model.file_bytes(), fs::file_size(dir_ / "model.safetensors"));
  expect_says(refusal([&] { model.get("b", {2, 1}); }), {"model.safetensors", "'b'", "[2]", "[2, 1]", "config.json"});
  expect_says(refusal([&] { model.get("c"); }), {dir_.c_str(), "'c'"});
}

TEST_F(Folder, OneFileOfAnyName) {
  shard("diffusion.safetensors", {"a"});
  EXPECT_TRUE(ModelFiles::open(dir_).has("a"));
  EXPECT_TRUE(ModelFiles::open(dir_ / "diffusion.safetensors").has("a"));
  shard("second.safetensors", {"b"});
  expect_says(refusal<BadInput>([&] { ModelFiles::open(dir_); }), {"diffusion.safetensors", "second.safetensors"});
}

TEST_F(Folder, NothingToRead) {
  expect_says(refusal<BadInput>([&] { ModelFiles::open(dir_); }), {dir_.c_str(), "model.safetensors"});
  write_file(dir_ / "pytorch_model.bin", "x");
  expect_says(refusal<Unsupported>([&] { ModelFiles::open(dir_); }), {"pickle"});
  EXPECT_THROW(ModelFiles::open(dir_ / "none"), IoError);
}

TEST_F(Folder, Shards) {
  shard("model-00001-of-00002.safetensors", {"a"});
  shard("model-00002-of-00002.safetensors", {"b"});
  index(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  const auto model = ModelFiles::open(dir_);
  EXPECT_EQ(model.file_of("b").filename(), "model-00002-of-00002.safetensors");
  EXPECT_EQ(model.files().size(), 2u);
}

TEST_F(Folder, ShardFaults) {
  shard("1.safetensors", {"a"});
  shard("2.safetensors", {"b"});
  index(R"({"a":"1.safetensors","b":"3.safetensors"})");
  expect_says(open_refusal(), {"index.json", "3.safetensors"});
  index(R"({"a":"1.safetensors","c":"2.safetensors"})");
  expect_says(open_refusal(), {"index.json", "'c'", "2.safetensors"});
  index(R"({"a":"2.safetensors","b":"2.safetensors"})");
  expect_says(open_refusal(), {"'a'", "2.safetensors"});
  index(R"({"a":"../1.safetensors"})");
  expect_says(open_refusal(), {"plain file name"});
  index(R"({"a":7})");
  expect_says(open_refusal(), {"'a'", "7"});
  index("[]");
  expect_says(open_refusal(), {"weight_map"});
  shard("2.safetensors", {"a", "b"});
  index(R"({"a":"1.safetensors","b":"2.safetensors"})");
  expect_says(open_refusal(), {"'a'", "two files"});
}

TEST_F(Folder, WriterLeavesNothingWithoutCommit) {
  {
    SafetensorsWriter writer(dir_ / "m.safetensors", {{"a", DType::kF32, {2}}});
    EXPECT_THROW(writer.commit(), InternalError) << "a is not written yet";
  }
  EXPECT_TRUE(fs::is_empty(dir_));
  EXPECT_THROW(SafetensorsWriter(dir_ / "m", {{"a", DType::kI8, {1}}, {"a", DType::kI8, {1}}}), BadInput);
  EXPECT_THROW(SafetensorsWriter(dir_ / "m", {{"\xFF", DType::kI8, {1}}}), BadInput);
  EXPECT_TRUE(fs::is_empty(dir_));
}

RC_GTEST_PROP(SafetensorsWriter, WhatIsWrittenIsRead, ()) {
  static const std::vector<DType> kAll = {DType::kF32, DType::kF16, DType::kBF16, DType::kI8,  DType::kU8,
                                          DType::kI16, DType::kI32, DType::kI64,  DType::kF64, DType::kBool};
  const auto path = fs::temp_directory_path() / ("lacuna-writer-" + std::to_string(getpid()) + ".safetensors");
  std::vector<SafetensorsWriter::Spec> specs;
  std::vector<std::string> contents;
  const int count = *rc::gen::inRange(0, 6);
  for (int i = 0; i < count; ++i) {
    SafetensorsWriter::Spec spec{"t" + std::to_string(i) + *rc::gen::element<std::string>("", ".weight", "é\"\\"),
                                 *rc::gen::elementOf(kAll), {}};
    size_t bytes = dtype_size(spec.dtype);
    for (int r = *rc::gen::inRange(0, 4); r > 0; --r) {
      spec.shape.push_back(*rc::gen::inRange(0, 4));
      bytes *= static_cast<size_t>(spec.shape.back());
    }
    contents.push_back(*rc::gen::container<std::string>(bytes, rc::gen::arbitrary<char>()));
    specs.push_back(std::move(spec));
  }
  {
    SafetensorsWriter writer(path, specs, {{"format", "pt"}});
    for (size_t i = 0; i < specs.size(); ++i) {
      const size_t cut = contents[i].empty() ? 0 : *rc::gen::inRange<size_t>(0, contents[i].size());
      writer.write(specs[i].name, contents[i].data(), cut);
      writer.write(specs[i].name, contents[i].data() + cut, contents[i].size() - cut);
    }
    writer.commit();
  }
  const SafetensorsFile file(path);
  RC_ASSERT(file.entries().size() == specs.size());
  RC_ASSERT(file.metadata().at("format") == "pt");
  RC_ASSERT(file.bytes() == fs::file_size(path));  // nothing had to be copied: all aligned
  for (size_t i = 0; i < specs.size(); ++i) {
    const Tensor t = file.get(specs[i].name);
    RC_ASSERT(t.dtype == specs[i].dtype);
    RC_ASSERT(std::vector<int64_t>(t.shape.begin(), t.shape.begin() + t.rank) == specs[i].shape);
    RC_ASSERT(std::string(t.as<char>(), t.bytes()) == contents[i]);
  }
  fs::remove(path);
}

// Word-wise search against one element at a time, at every length and place.
RC_GTEST_PROP(CheckFinite, AgreesWithIsfinite, ()) {
  const auto n = *rc::gen::inRange<int64_t>(0, 9'000);
  const auto kind = *rc::gen::element(DType::kF32, DType::kBF16, DType::kF16, DType::kF64);
  std::vector<double> storage(static_cast<size_t>(n));  // room for any of them
  auto* bytes = reinterpret_cast<uint8_t*>(storage.data());
  uint64_t state = *rc::gen::arbitrary<uint32_t>();
  const auto size = static_cast<int64_t>(dtype_size(kind));
  const auto finite = [&](int64_t i) {
    switch (kind) {
      case DType::kF32: return std::isfinite(reinterpret_cast<const float*>(bytes)[i]);
      case DType::kBF16: return std::isfinite(to_float(reinterpret_cast<const BF16*>(bytes)[i]));
      case DType::kF16: return std::isfinite(to_float(reinterpret_cast<const F16*>(bytes)[i]));
      default: return std::isfinite(storage[static_cast<size_t>(i)]);
    }
  };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t b = 0; b < size; ++b) bytes[i * size + b] = static_cast<uint8_t>((state = state * 6364136223846793005u + 1) >> 56);
    if (!finite(i)) bytes[i * size + size - 1] = 0;  // random bits, all finite
  }
  int64_t bad = -1;
  if (n > 0 && *rc::gen::arbitrary<bool>()) {
    bad = *rc::gen::inRange<int64_t>(0, n);
    bytes[bad * size + size - 1] = 0x7F;
    bytes[bad * size + size - 2] |= 0xF0;
  }
  std::string message;
  try {
    check_finite(Tensor(bytes, kind, {n}), "t", "f");
  } catch (const CorruptData& error) {
    message = error.what();
  }
  RC_ASSERT((bad < 0 ? message.empty() : message.find(" index " + std::to_string(bad) + ",") != std::string::npos));
}

// Any change to one byte of a file either leaves it readable or is refused with a typed error.
RC_GTEST_PROP(Safetensors, OneChangedByteNeverCrashes, ()) {
  static const std::string whole = file_of(
      R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"I8","shape":[3],"data_offsets":[16,19]}})",
      std::string(19, '\1'));
  std::string bytes = whole;
  bytes[*rc::gen::inRange<size_t>(0, bytes.size())] = *rc::gen::arbitrary<char>();
  try {
    const SafetensorsFile file = parse(bytes);
    for (const auto& [name, unused] : file.entries()) check_finite(file.get(name), name, "x");
  } catch (const CorruptData&) {
  } catch (const Unsupported&) {
  }
}

}  // namespace
}  // namespace lacuna

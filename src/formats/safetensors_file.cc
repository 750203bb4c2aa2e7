#include "formats/safetensors_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "base/error.h"
#include "formats/json.h"

namespace lacuna {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian and is mapped as it is");

// The official reader's own bound; a header of this size describes about a million tensors.
constexpr uint64_t kMaxHeader = 100'000'000;

constexpr std::array<std::pair<std::string_view, DType>, 13> kDTypes{{{"F32", DType::kF32},
                                                                      {"F16", DType::kF16},
                                                                      {"BF16", DType::kBF16},
                                                                      {"F64", DType::kF64},
                                                                      {"I8", DType::kI8},
                                                                      {"U8", DType::kU8},
                                                                      {"I16", DType::kI16},
                                                                      {"U16", DType::kU16},
                                                                      {"I32", DType::kI32},
                                                                      {"U32", DType::kU32},
                                                                      {"I64", DType::kI64},
                                                                      {"U64", DType::kU64},
                                                                      {"BOOL", DType::kBool}}};
// Part of the format, but nothing here computes with them.
constexpr std::array<std::string_view, 8> kForeignDTypes{"F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ",
                                                         "F8_E4M3FNUZ", "F4", "F6_E2M3", "F6_E3M2"};

struct Range {
  uint64_t begin, end;
  const std::string* tensor;
};

class HeaderReader {
 public:
  HeaderReader(const std::string& file, uint64_t data_bytes) : file_(file), data_bytes_(data_bytes) {}

  // dtype, shape and byte range of one tensor, each checked against the others.
  std::pair<SafetensorsFile::Entry, Range> read(const std::string& tensor, const Json& value) const {
    if (!value.is_object()) wrong(tensor, "entry", value, "an object with dtype, shape and data_offsets");
    for (const auto& [key, unused] : value.items())
      if (key != "dtype" && key != "shape" && key != "data_offsets")
        throw CorruptData("{}: tensor '{}' has the unknown field '{}', expected dtype, shape and data_offsets", file_,
                          name_excerpt(tensor), name_excerpt(key));
    SafetensorsFile::Entry entry;
    entry.dtype = dtype(tensor, member(tensor, value, "dtype"));
    uint64_t expected = dtype_size(entry.dtype);
    const Json& shape = member(tensor, value, "shape");
    if (!shape.is_array()) wrong(tensor, "shape", shape, "a list of sizes");
    for (const Json& size : shape) {
      if (!size.is_number_unsigned()) wrong(tensor, "shape", shape, "a list of sizes ≥ 0");
      const uint64_t n = size.get<uint64_t>();
      // Sizes must fit int64 even where another size of 0 makes the product small.
      if (n > uint64_t{1} << 62 || __builtin_mul_overflow(expected, n, &expected))
        wrong(tensor, "shape", shape, "a product that fits 64 bits");
      entry.shape.push_back(static_cast<int64_t>(n));
    }
    const Json& offsets = member(tensor, value, "data_offsets");
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned())
      wrong(tensor, "data_offsets", offsets, "two byte offsets [begin, end]");
    const Range range{offsets[0].get<uint64_t>(), offsets[1].get<uint64_t>(), &tensor};
    if (range.begin > range.end || range.end > data_bytes_)
      wrong(tensor, "data_offsets", offsets, fmt::format("begin ≤ end ≤ {}, the bytes of data in the file", data_bytes_));
    if (range.end - range.begin != expected)
      throw CorruptData("{}: tensor '{}': data_offsets {} span {} bytes, expected {} for dtype {} and shape {}", file_,
                        name_excerpt(tensor), json_excerpt(offsets), range.end - range.begin, expected,
                        safetensors_dtype(entry.dtype), json_excerpt(shape));
    return {std::move(entry), range};
  }

 private:
  const Json& member(const std::string& tensor, const Json& value, const char* field) const {
    const auto found = value.find(field);
    if (found == value.end()) throw CorruptData("{}: tensor '{}' has no field '{}'", file_, name_excerpt(tensor), field);
    return *found;
  }
  DType dtype(const std::string& tensor, const Json& value) const {
    if (!value.is_string()) wrong(tensor, "dtype", value, "a name such as \"F32\"");
    const auto& text = value.get_ref<const std::string&>();
    for (const auto& [name, dtype] : kDTypes)
      if (name == text) return dtype;
    if (std::find(kForeignDTypes.begin(), kForeignDTypes.end(), text) != kForeignDTypes.end())
      throw Unsupported("{}: tensor '{}' has dtype {}, which this build cannot read", file_, name_excerpt(tensor), text);
    wrong(tensor, "dtype", value, "F32, F16, BF16, F64, BOOL, or I or U with 8, 16, 32 or 64");
  }
  [[noreturn]] void wrong(const std::string& tensor, const char* field, const Json& found,
                          std::string_view expected) const {
    throw CorruptData("{}: tensor '{}': {} is {}, expected {}", file_, name_excerpt(tensor), field, json_excerpt(found), expected);
  }

  const std::string& file_;
  uint64_t data_bytes_;
};

}  // namespace

std::string_view safetensors_dtype(DType dtype) {
  for (const auto& [name, known] : kDTypes)
    if (known == dtype) return name;
  throw InternalError("dtype {} has no safetensors name", static_cast<int>(dtype));
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : name_(path.string()), file_(path), bytes_(file_.bytes()) {
  parse();
}

SafetensorsFile::SafetensorsFile(std::span<const std::byte> bytes, std::string name)
    : name_(std::move(name)), bytes_(bytes) {
  parse();
}

void SafetensorsFile::parse() {
  if (bytes_.size() < 8)
    throw CorruptData("{}: has {} bytes, expected at least the 8 of a safetensors header length", name_, bytes_.size());
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes_.data(), 8);
  if (header_bytes > kMaxHeader)
    throw CorruptData("{}: header length is {} bytes, expected at most {}", name_, header_bytes, kMaxHeader);
  if (header_bytes > bytes_.size() - 8)
    throw CorruptData("{}: header length is {} bytes, expected at most the {} left in the file", name_, header_bytes,
                      bytes_.size() - 8);
  const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + 8, header_bytes);
  const Json header = parse_json(text, name_ + " (header)");
  if (!header.is_object())
    throw CorruptData("{}: header is {}, expected a JSON object", name_, json_excerpt(header));

  const auto data = bytes_.subspan(8 + header_bytes);
  const HeaderReader reader(name_, data.size());
  std::vector<Range> ranges;
  for (const auto& [tensor, value] : header.items()) {
    if (tensor == "__metadata__") {
      if (!value.is_object()) throw CorruptData("{}: __metadata__ is not an object of texts", name_);
      for (const auto& [key, item] : value.items()) {
        if (!item.is_string()) throw CorruptData("{}: __metadata__ field '{}' is not a text", name_, name_excerpt(key));
        metadata_.emplace(key, item.get<std::string>());
      }
      continue;
    }
    auto [entry, range] = reader.read(tensor, value);
    entry.data = data.subspan(range.begin, range.end - range.begin);
    range.tensor = &entries_.emplace(tensor, std::move(entry)).first->first;
    ranges.push_back(range);
  }

  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  uint64_t at = 0;
  const std::string* before = nullptr;
  for (const Range& range : ranges) {
    if (range.begin < at)
      throw CorruptData("{}: tensor '{}' begins at byte {} and overlaps tensor '{}', which ends at {}", name_,
                        name_excerpt(*range.tensor), range.begin, name_excerpt(*before), at);
    if (range.begin > at)
      throw CorruptData("{}: tensor '{}' begins at byte {}, expected {}: no tensor covers the bytes between", name_,
                        name_excerpt(*range.tensor), range.begin, at);
    at = range.end;
    before = range.tensor;
  }
  if (at != data.size())
    throw CorruptData("{}: tensors end at byte {} of the data, expected {}, the end of the file", name_, at,
                      data.size());

  for (auto& [tensor, entry] : entries_) {
    if (reinterpret_cast<uintptr_t>(entry.data.data()) % dtype_size(entry.dtype) == 0) continue;
    try {
      copies_.push_back(std::make_unique_for_overwrite<std::byte[]>(entry.data.size()));
    } catch (const std::bad_alloc&) {
      throw OutOfMemory("{}: no memory to copy the misaligned tensor '{}' of {} bytes", name_, name_excerpt(tensor),
                        entry.data.size());
    }
    std::copy(entry.data.begin(), entry.data.end(), copies_.back().get());
    entry.data = {copies_.back().get(), entry.data.size()};
    copied_bytes_ += entry.data.size();
  }
}

void SafetensorsFile::copy_to_memory(MemoryAccount& account, ThreadPool& pool) {
  constexpr size_t kPiece = size_t{8} << 20;  // the file's own pages that are resident beside the copy, a thread
  const size_t bytes = file_.bytes().size();
  if (copy_ || bytes == 0) return;
  Buffer copy(account, MemoryTag::kWeights, bytes);
  pool.parallel_for(static_cast<int64_t>((bytes + kPiece - 1) / kPiece), [&](int64_t index, int) {
    const size_t begin = static_cast<size_t>(index) * kPiece, end = std::min(bytes, begin + kPiece);
    std::memcpy(copy.as() + begin, bytes_.data() + begin, end - begin);
    file_.forget(begin, end);
  });
  for (auto& [tensor, entry] : entries_) {
    const std::byte* from = entry.data.data();
    const bool within = from >= bytes_.data() && from + entry.data.size() <= bytes_.data() + bytes;
    if (!within) continue;  // a misaligned tensor's own copy
    entry.data = {copy.as() + (from - bytes_.data()), entry.data.size()};
  }
  bytes_ = {copy.as(), bytes};
  copy_ = std::move(copy);
  file_ = MappedFile();
}

Tensor SafetensorsFile::get(std::string_view tensor) const {
  const auto found = entries_.find(tensor);
  if (found == entries_.end()) throw CorruptData("{}: has no tensor '{}'", name_, tensor);
  const Entry& entry = found->second;
  if (entry.shape.size() > static_cast<size_t>(Tensor::kMaxRank))
    throw Unsupported("{}: tensor '{}' has {} dimensions, expected at most {}", name_, tensor, entry.shape.size(),
                      Tensor::kMaxRank);
  Tensor view;
  view.data = entry.data.data();
  view.dtype = entry.dtype;
  view.rank = static_cast<int>(entry.shape.size());
  std::copy(entry.shape.begin(), entry.shape.end(), view.shape.begin());
  return view;
}

namespace {

// Index of the first element whose exponent bits are all ones (NaN or infinity).
template <typename Bits>
std::optional<int64_t> first_not_finite(const void* data, int64_t n, Bits exponent) {
  const Bits* bits = static_cast<const Bits*>(data);
  // Elements are tested a 64-bit word at a time: adding the exponent's lowest bit carries into the
  // sign's place exactly where the exponent is all ones, and never into the next element.
  constexpr int64_t kLanes = sizeof(uint64_t) / sizeof(Bits), kBlock = 4096;  // a block stays in L1
  constexpr uint64_t kEach = ~uint64_t{0} / static_cast<Bits>(~Bits{0});     // 1 in every lane
  const uint64_t mask = kEach * exponent, low = kEach * (exponent & (~exponent + 1u)),
                 sign = kEach * static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    int64_t i = begin;
    uint64_t bad = 0;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      uint64_t words[4];
      std::memcpy(words, bits + i, sizeof words);
      for (uint64_t word : words) bad |= (word & mask) + low;
    }
    bad &= sign;
    for (; i < end; ++i) bad |= (bits[i] & exponent) == exponent;
    if (!bad) continue;
    for (i = begin; i < end; ++i)
      if ((bits[i] & exponent) == exponent) return i;
  }
  return std::nullopt;
}

}  // namespace

void check_finite(const Tensor& tensor, std::string_view name, const std::filesystem::path& file) {
  std::optional<int64_t> bad;
  const int64_t n = tensor.elements();
  switch (tensor.dtype) {
    case DType::kF64: bad = first_not_finite<uint64_t>(tensor.data, n, 0x7ff0000000000000u); break;
    case DType::kF32: bad = first_not_finite<uint32_t>(tensor.data, n, 0x7f800000u); break;
    case DType::kBF16: bad = first_not_finite<uint16_t>(tensor.data, n, 0x7f80u); break;
    case DType::kF16: bad = first_not_finite<uint16_t>(tensor.data, n, 0x7c00u); break;
    default: return;
  }
  if (bad)
    throw CorruptData("{}: tensor '{}' of shape {} holds a value that is not finite at flat index {}, expected finite "
                      "numbers",
                      file.string(), name, tensor.shape_string(), *bad);
}

}  // namespace lacuna

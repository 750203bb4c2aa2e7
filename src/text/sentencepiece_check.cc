#include "text/sentencepiece_check.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "base/error.h"

namespace lacuna {
namespace {

// Protocol buffers' wire format (protobuf.dev/programming-guides/encoding), as far as it takes to
// find the fields of a message that hold bytes.
class Fields {
 public:
  Fields(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  // The next field of wire type "length-delimited"; others are skipped. False at the end.
  bool next(uint64_t& number, std::string_view& value) {
    while (!bytes_.empty()) {
      const uint64_t tag = varint();
      number = tag >> 3;
      switch (tag & 7) {
        case 0: varint(); break;
        case 1: take(8); break;
        case 2: value = take(varint()); return true;
        case 5: take(4); break;
        default: throw CorruptData("{}: is not a SentencePiece model: wire type {}", where_, tag & 7);
      }
    }
    return false;
  }

 private:
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<uint8_t>(take(1)[0]);
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    throw CorruptData("{}: is not a SentencePiece model: an integer of more than 10 bytes", where_);
  }
  std::string_view take(uint64_t n) {
    if (n > bytes_.size())
      throw CorruptData("{}: is not a SentencePiece model: a field of {} bytes where {} are left", where_, n,
                        bytes_.size());
    const auto taken = bytes_.substr(0, n);
    bytes_.remove_prefix(n);
    return taken;
  }

  std::string_view bytes_;
  const std::string& where_;
};

// u32 size of the trie, a Darts-clone double array of u32 units, then NUL-terminated replacements
// that the trie's values point to (sentencepiece normalizer.cc, DecodePrecompiledCharsMap; unit
// layout: darts.h, class DoubleArrayUnit).
void check_charsmap(std::string_view blob, const std::string& where) {
  if (blob.empty()) return;
  uint32_t trie_bytes = 0;
  if (blob.size() > 4) std::memcpy(&trie_bytes, blob.data(), 4);
  if (blob.size() <= 4 || trie_bytes % 4 != 0 || trie_bytes == 0 || trie_bytes >= blob.size() - 4)
    throw CorruptData("{}: the normaliser's table has {} bytes, and a trie of {}", where, blob.size(), trie_bytes);
  std::vector<uint32_t> units(trie_bytes / 4);
  std::memcpy(units.data(), blob.data() + 4, trie_bytes);
  const std::string_view replacements = blob.substr(4 + trie_bytes);
  if (replacements.back() != '\0')
    throw CorruptData("{}: the normaliser's replacements do not end with a NUL byte", where);
  for (size_t i = 0; i < units.size(); ++i) {
    const uint32_t unit = units[i];
    // A leaf: its value is checked from the node it belongs to. The library starts at the root without looking
    // whether it is one.
    if (i > 0 && unit >> 31) continue;
    const size_t base = i ^ (size_t{unit >> 10} << ((unit & (1u << 9)) >> 6));
    // A step reads base ^ label for any label of one byte.
    if ((base | 0xFF) >= units.size())
      throw CorruptData("{}: unit {} of the normaliser's trie leads to {}, expected below {}", where, i, base | 0xFF,
                        units.size());
    const bool has_leaf = (unit >> 8) & 1;
    if (has_leaf && (units[base] & 0x7FFFFFFFu) >= replacements.size())
      throw CorruptData("{}: the normaliser's trie points to byte {} of {} of replacements", where,
                        units[base] & 0x7FFFFFFFu, replacements.size());
  }
}

}  // namespace

void check_sentencepiece_model(std::string_view model, const std::string& where) {
  constexpr uint64_t kNormalizerSpec = 3, kDenormalizerSpec = 5, kCharsmap = 2;  // sentencepiece_model.proto
  Fields fields(model, where);
  uint64_t number;
  std::string_view value;
  while (fields.next(number, value)) {
    if (number != kNormalizerSpec && number != kDenormalizerSpec) continue;
    Fields inner(value, where);
    while (inner.next(number, value))
      if (number == kCharsmap) check_charsmap(value, where);
  }
}

}  // namespace lacuna

#include "text/bpe.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "formats/json.h"
#include "text/utf8.h"

namespace lacuna {
namespace {

constexpr int32_t kUnknown = -2;  // no token and no unknown token either: left out
constexpr int32_t kMergedAway = -1;

// Fibonacci hashing: the high bits of the product depend on all bits of the pair.
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// A heap's top is the pair to merge next: lowest rank, then leftmost.
bool later(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
}

}  // namespace

Bpe::Bpe(const Vocabulary& vocabulary, const std::vector<std::pair<std::string, std::string>>& merges,
         const Options& options, const std::string& where)
    : vocabulary_(vocabulary), options_(options) {
  byte_ids_.fill(-1);
  for (int byte = 0; byte < 256 && !options.byte_level; ++byte)
    byte_ids_[static_cast<size_t>(byte)] = vocabulary.id(fmt::format("<0x{:02X}>", byte)).value_or(-1);
  for (int32_t id = 0; id < vocabulary.size() && options.byte_level; ++id) {
    if (vocabulary.piece(id).empty()) continue;
    auto bytes = bytes_of_byte_level(vocabulary.piece(id));
    if (!bytes) continue;
    if (bytes->size() == 1) byte_ids_[static_cast<uint8_t>((*bytes)[0])] = id;
    if (options.ignore_merges) words_.emplace(std::move(*bytes), id);
  }

  const size_t slots = std::bit_ceil(std::max<size_t>(2 * merges.size(), 16));
  merges_.resize(slots);
  shift_ = 64 - std::countr_zero(slots);
  const auto id_of = [&](const std::string& piece, size_t rank) {
    const auto id = vocabulary.id(piece);
    if (!id)
      throw CorruptData("{}: merge {} ('{}' + '{}') needs the token '{}', which the vocabulary does not have", where,
                        rank, name_excerpt(merges[rank].first), name_excerpt(merges[rank].second), name_excerpt(piece));
    return *id;
  };
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const uint64_t pair = uint64_t{static_cast<uint32_t>(id_of(left, rank))} << 32 |
                          static_cast<uint32_t>(id_of(right, rank));
    size_t slot = (pair * kGolden) >> shift_;
    while (merges_[slot].pair != kEmpty && merges_[slot].pair != pair) slot = (slot + 1) & (slots - 1);
    merges_[slot] = {pair, static_cast<uint32_t>(rank), id_of(left + right, rank)};
  }
}

const Bpe::Merge* Bpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  for (size_t slot = (pair * kGolden) >> shift_;; slot = (slot + 1) & (merges_.size() - 1)) {
    if (merges_[slot].pair == pair) return &merges_[slot];
    if (merges_[slot].pair == kEmpty) return nullptr;
  }
}

void Bpe::split(std::string_view word, std::vector<Scratch::Symbol>& symbols) const {
  symbols.clear();
  const auto push = [&](int32_t id) {
    const auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  };
  bool after_unknown = false;
  const auto unknown = [&] {
    if (options_.unk && !(after_unknown && options_.fuse_unk)) push(*options_.unk);
    after_unknown = true;
  };
  for (size_t at = 0; at < word.size();) {
    const size_t begin = at;
    int32_t id = kUnknown;
    if (options_.byte_level) {
      id = byte_ids_[static_cast<uint8_t>(word[at++])];
    } else {
      utf8_next(word, at);
      id = vocabulary_.id(word.substr(begin, at - begin)).value_or(-1);
    }
    if (id >= 0) {
      push(id);
      after_unknown = false;
      continue;
    }
    const std::string_view character = word.substr(begin, at - begin);
    const auto byte_id = [&](char byte) { return byte_ids_[static_cast<uint8_t>(byte)]; };
    if (options_.byte_fallback && !options_.byte_level &&
        std::all_of(character.begin(), character.end(), [&](char byte) { return byte_id(byte) >= 0; })) {
      for (char byte : character) push(byte_id(byte));
      after_unknown = false;
    } else {
      unknown();
    }
  }
  if (!symbols.empty()) symbols.back().next = -1;
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& ids, Scratch& scratch) const {
  if (options_.ignore_merges) {
    if (options_.byte_level) {
      if (const auto found = words_.find(std::string(word)); found != words_.end()) {
        ids.push_back(found->second);
        return;
      }
    } else if (const auto id = vocabulary_.id(word)) {
      ids.push_back(*id);
      return;
    }
  }
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  split(word, symbols);
  heap.clear();
  const auto consider = [&](int32_t left) {
    const Merge* merge = find(symbols[static_cast<size_t>(left)].id,
                              symbols[static_cast<size_t>(symbols[static_cast<size_t>(left)].next)].id);
    if (merge) heap.push_back({merge->rank, left, merge->merged});
    return merge != nullptr;
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i) consider(static_cast<int32_t>(i));
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    const Scratch::Candidate top = heap.front();
    std::pop_heap(heap.begin(), heap.end(), later);
    heap.pop_back();
    auto& left = symbols[static_cast<size_t>(top.left)];
    if (left.id == kMergedAway || left.next < 0) continue;
    auto& right = symbols[static_cast<size_t>(left.next)];
    // Either side may have been merged since; the pair that stands there now has its own entry.
    const Merge* merge = find(left.id, right.id);
    if (!merge || merge->merged != top.merged) continue;
    left.id = top.merged;
    right.id = kMergedAway;
    left.next = right.next;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].previous = top.left;
    if (left.previous >= 0 && consider(left.previous)) std::push_heap(heap.begin(), heap.end(), later);
    if (left.next >= 0 && consider(top.left)) std::push_heap(heap.begin(), heap.end(), later);
  }
  for (const auto& symbol : symbols)
    if (symbol.id != kMergedAway) ids.push_back(symbol.id);
}

}  // namespace lacuna

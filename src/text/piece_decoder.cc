#include "text/piece_decoder.h"

#include <charconv>
#include <limits>

#include "text/replace.h"
#include "text/vocabulary.h"

namespace lacuna {

PieceDecoder::PieceDecoder(const ConfigFile& tokenizer) {
  if (const auto step = tokenizer.object("decoder"))
    add(*step);
  else
    joined_by_blanks_ = true;
}

void PieceDecoder::add(const ConfigFile& step) {
  const std::string type = step.text("type");
  if (type == "Sequence") {
    for (const ConfigFile& inner : step.objects("decoders")) add(inner);
  } else if (type == "ByteLevel") {
    byte_level_ = true;
  } else if (type == "ByteFallback") {
    byte_fallback_ = true;
  } else if (type == "Replace") {
    const auto pattern = step.object("pattern");
    if (!pattern || !pattern->has("String") || pattern->text("String").empty())
      step.unsupported("pattern", "a String that is not empty");
    replace_.emplace_back(pattern->text("String"), step.text("content"));
  } else if (type == "Strip") {
    if (step.text("content") != " ") step.unsupported("content", "a blank");
    if (step.integer("stop", 0, 1 << 20, 0) != 0) step.unsupported("stop", "0");
    leading_blanks_lost_ = static_cast<size_t>(step.integer("start", 0, 1 << 20, 0));
  } else if (type == "Metaspace") {
    replace_.emplace_back(step.text("replacement", "\xE2\x96\x81"), " ");  // ▁
    if (replace_.back().first.empty()) step.wrong("replacement", "a text that is not empty");
    const bool never =
        step.text("prepend_scheme", step.boolean("add_prefix_space", true) ? "always" : "never") == "never";
    // The reference drops every mark of the first token, not only the one it prepended.
    if (!never) leading_blanks_lost_ = std::numeric_limits<size_t>::max();
  } else if (type != "Fuse") {
    step.unsupported("type", "the decoders ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip and Sequence");
  }
}

std::string PieceDecoder::bytes(std::string_view piece) const {
  if (byte_level_) {
    // Added tokens may hold characters outside the byte-level alphabet; they stand for themselves.
    if (auto bytes = bytes_of_byte_level(piece)) return *std::move(bytes);
    return std::string(piece);
  }
  if (byte_fallback_)
    if (const int byte = byte_of_fallback_piece(piece); byte >= 0) return std::string(1, static_cast<char>(byte));
  std::string text(piece);
  for (const auto& [from, to] : replace_) replace_all(text, from, to, replacement_limit(piece.size()));
  return text;
}

int byte_of_fallback_piece(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
  int byte = 0;
  const auto [end, error] = std::from_chars(piece.data() + 3, piece.data() + 5, byte, 16);
  return error == std::errc() && end == piece.data() + 5 ? byte : -1;
}

}  // namespace lacuna

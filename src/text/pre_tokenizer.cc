#include "text/pre_tokenizer.h"

#include <cctype>
#include <memory>

#include "text/regex.h"
#include "text/utf8.h"

namespace lacuna {
namespace {

// GPT-2's pattern, the one ByteLevel uses on its own (huggingface/tokenizers byte_level.rs).
constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Segment {
  size_t begin, end;
  bool match;
};

// Matches and what lies between them, in order, covering the whole text.
void segments(std::string_view text, const Regex& pattern, bool invert, std::vector<Segment>& out) {
  out.clear();
  size_t covered = 0, from = 0, last_end = std::string_view::npos;
  std::pair<size_t, size_t> match;
  while (from <= text.size() && pattern.find(text, from, match)) {
    const auto [begin, end] = match;
    if (begin == end && end == last_end) {  // an empty match right behind a match does not count
      if (from >= text.size()) break;
      utf8_next(text, from);
      continue;
    }
    if (covered != begin) out.push_back({covered, begin, invert});
    out.push_back({begin, end, !invert});
    covered = from = last_end = end;
  }
  if (covered != text.size()) out.push_back({covered, text.size(), invert});
}

// What becomes a piece, by behavior (huggingface/tokenizers normalizer.rs, split()).
void keep(std::vector<Segment>& s, Behavior behavior) {
  size_t n = 0;  // s[0, n) is the result so far; it never overtakes the reading position
  switch (behavior) {
    case Behavior::kIsolated: return;
    case Behavior::kRemoved:
      std::erase_if(s, [](const Segment& x) { return x.match; });
      return;
    case Behavior::kContiguous: {
      for (const Segment x : std::vector(s))
        if (n > 0 && s[n - 1].match == x.match)
          s[n - 1].end = x.end;
        else
          s[n++] = x;
      break;
    }
    case Behavior::kMergedWithPrevious: {
      bool after_match = false;
      for (const Segment x : std::vector(s)) {
        if (x.match && !after_match && n > 0)
          s[n - 1].end = x.end;
        else
          s[n++] = x;
        after_match = x.match;
      }
      break;
    }
    case Behavior::kMergedWithNext: {
      // From the back, so that of several matches in a row only the last joins what follows.
      std::vector<Segment> reversed;
      bool after_match = false;
      for (auto x = s.rbegin(); x != s.rend(); ++x) {
        if (x->match && !after_match && !reversed.empty())
          reversed.back().begin = x->begin;
        else
          reversed.push_back(*x);
        after_match = x->match;
      }
      s.assign(reversed.rbegin(), reversed.rend());
      return;
    }
  }
  s.resize(n);
}

void split(Pieces& pieces, const Regex& pattern, bool invert, Behavior behavior) {
  std::vector<Pieces::Range> cut;
  cut.reserve(pieces.ranges.size() > 1 ? pieces.ranges.size() * 2 : pieces.text.size() / 4);
  std::vector<Segment> scratch;
  for (const auto& range : pieces.ranges) {
    // A piece is matched on its own: look-behind and look-ahead must not see its neighbours.
    const std::string_view text = std::string_view(pieces.text).substr(range.begin, range.end - range.begin);
    segments(text, pattern, invert, scratch);
    keep(scratch, behavior);
    for (const Segment& s : scratch)
      if (s.begin != s.end) cut.push_back({range.begin + s.begin, range.begin + s.end});
  }
  pieces.ranges = std::move(cut);
}

Behavior behavior_of(const ConfigFile& step, std::string_view fallback) {
  const std::string name = step.text("behavior", fallback);
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  step.wrong("behavior", "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

std::string escaped(std::string_view text) {
  std::string out;
  for (char c : text) {
    if (static_cast<uint8_t>(c) < 0x80 && !std::isalnum(static_cast<uint8_t>(c))) out += '\\';
    out += c;
  }
  return out;
}

std::function<void(Pieces&)> splitter(const std::string& pattern, const std::string& where, bool invert,
                                      Behavior behavior) {
  auto regex = std::make_shared<const Regex>(pattern, where);
  return [regex, invert, behavior](Pieces& pieces) { split(pieces, *regex, invert, behavior); };
}

// Rebuilds the text piece by piece; `change` appends a piece's new form.
template <typename Change>
void rewrite(Pieces& pieces, const Change& change) {
  std::string text;
  text.reserve(pieces.text.size() + pieces.ranges.size());
  for (auto& range : pieces.ranges) {
    const size_t begin = text.size();
    change(std::string_view(pieces.text).substr(range.begin, range.end - range.begin), range.begin == 0, text);
    range = {begin, text.size()};
  }
  pieces.text = std::move(text);
}

}  // namespace

PreTokenizer::PreTokenizer(const ConfigFile& tokenizer) {
  if (const auto step = tokenizer.object("pre_tokenizer")) add(*step);
}

void PreTokenizer::add(const ConfigFile& step) {
  const std::string type = step.text("type");
  if (byte_level_ && type != "Sequence") step.unsupported("type", "nothing behind ByteLevel");
  if (type == "Sequence") {
    for (const ConfigFile& inner : step.objects("pretokenizers")) add(inner);
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    if (step.boolean("add_prefix_space", true))
      steps_.push_back([](Pieces& pieces) {
        rewrite(pieces, [](std::string_view piece, bool, std::string& out) {
          if (!piece.starts_with(' ')) out += ' ';
          out += piece;
        });
      });
    if (step.boolean("use_regex", true)) steps_.push_back(splitter(kGpt2, step.file(), false, Behavior::kIsolated));
  } else if (type == "Split") {
    const auto pattern = step.object("pattern");
    if (!pattern) step.wrong("pattern", "an object with String or Regex");
    const bool plain = pattern->has("String");
    const std::string text = plain ? pattern->text("String") : pattern->text("Regex");
    if (text.empty()) step.wrong("pattern", "a pattern that is not empty");
    steps_.push_back(splitter(plain ? escaped(text) : text, step.file(), step.boolean("invert", false),
                              behavior_of(step, "Isolated")));
  } else if (type == "Digits") {
    steps_.push_back(splitter(R"(\p{N})", step.file(), false,
                              step.boolean("individual_digits", false) ? Behavior::kIsolated : Behavior::kContiguous));
  } else if (type == "Whitespace") {
    steps_.push_back(splitter(R"(\w+|[^\w\s]+)", step.file(), true, Behavior::kRemoved));
  } else if (type == "WhitespaceSplit") {
    steps_.push_back(splitter(R"(\s)", step.file(), false, Behavior::kRemoved));
  } else if (type == "Punctuation") {
    steps_.push_back(splitter(R"([\p{P}$+<=>^`|~])", step.file(), false, behavior_of(step, "Isolated")));
  } else if (type == "CharDelimiterSplit") {
    steps_.push_back(splitter(escaped(step.text("delimiter")), step.file(), false, Behavior::kRemoved));
  } else if (type == "Metaspace") {
    const std::string mark = step.text("replacement", "\xE2\x96\x81");  // ▁
    if (mark.empty() || utf8_step(mark).bytes != mark.size()) step.wrong("replacement", "one character");
    // Old files say add_prefix_space where new ones say prepend_scheme.
    const std::string scheme =
        step.text("prepend_scheme", step.boolean("add_prefix_space", true) ? "always" : "never");
    if (scheme != "always" && scheme != "first" && scheme != "never")
      step.wrong("prepend_scheme", "always, first or never");
    steps_.push_back([mark, scheme](Pieces& pieces) {
      const bool at_start = pieces.at_start;
      rewrite(pieces, [&](std::string_view piece, bool first, std::string& out) {
        const bool prepend = scheme == "always" || (scheme == "first" && first && at_start);
        if (prepend && !piece.starts_with(' ') && !piece.starts_with(mark)) out += mark;
        for (char c : piece)
          if (c == ' ')
            out += mark;
          else
            out += c;
      });
    });
    if (step.boolean("split", true))
      steps_.push_back(splitter(escaped(mark), step.file(), false, Behavior::kMergedWithNext));
  } else {
    step.unsupported("type", "the pre-tokenizers Split, ByteLevel, Metaspace, Digits, Whitespace, WhitespaceSplit, "
                             "Punctuation, CharDelimiterSplit and Sequence");
  }
}

void PreTokenizer::apply(Pieces& pieces) const {
  pieces.ranges.clear();
  if (!pieces.text.empty()) pieces.ranges.push_back({0, pieces.text.size()});
  for (const auto& step : steps_) step(pieces);
}

}  // namespace lacuna

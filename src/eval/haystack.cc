#include "eval/haystack.h"

#include <algorithm>

#include "eval/jsonl.h"

namespace lacuna {
namespace {

bool capital(char c) { return c >= 'A' && c <= 'Z'; }

std::string clean(std::string_view raw) {
  std::string out;
  out.reserve(raw.size());
  int newlines = 0;
  for (size_t i = 0; i < raw.size(); ++i) {
    if (raw.substr(i, 3) == "\xef\xbb\xbf") {
      i += 2;
      continue;
    }
    char c = raw[i];
    if (c == '\r') {
      if (i + 1 < raw.size() && raw[i + 1] == '\n') continue;
      c = '\n';
    }
    newlines = c == '\n' ? newlines + 1 : 0;
    if (newlines <= 2) out.push_back(c);
  }
  return out;
}

// The length of a closing quotation mark at `at`: " ' ” ’, else 0.
size_t closing_quote(std::string_view text, size_t at) {
  if (at >= text.size()) return 0;
  if (text[at] == '"' || text[at] == '\'') return 1;
  const std::string_view three = text.substr(at, 3);
  return three == "\xe2\x80\x9d" || three == "\xe2\x80\x99" ? 3 : 0;
}

}  // namespace

void Haystack::add(std::string name, std::string_view raw) {
  Book book{std::move(name), clean(raw), {}, {}};
  const std::string& text = book.text;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\n' && (i == 0 || (i >= 2 && text[i - 1] == '\n' && text[i - 2] == '\n'))) book.starts.push_back(i);
    if (text[i] != '.' && text[i] != '!' && text[i] != '?') continue;
    const size_t end = i + 1 + closing_quote(text, i + 1);
    if (end + 1 < text.size() && text[end] == ' ' && capital(text[end + 1])) book.ends.push_back(end);
  }
  if (!book.starts.empty() && !book.ends.empty()) books_.push_back(std::move(book));
}

Haystack Haystack::open(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> files;
  std::error_code failed;
  if (std::filesystem::is_directory(path, failed)) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path, failed))
      if (entry.is_regular_file() && entry.path().extension() == ".txt") files.push_back(entry.path());
    if (failed) throw IoError("cannot list {}: {}", path.string(), failed.message());
    std::sort(files.begin(), files.end());
    if (files.empty()) throw BadInput("{} holds no .txt files to take text from", path.string());
  } else {
    files.push_back(path);
  }
  Haystack out;
  for (const auto& file : files) out.add(file.filename().string(), read_text_file(file));
  if (out.books_.empty()) throw BadInput("{}: no sentences found, expected prose", path.string());
  return out;
}

Haystack::Passage Haystack::passage(EvalRandom& random, int64_t room, const EncodeFn& encode) const {
  // Starts with at least two bytes a token behind them: no text is denser than that in tokens of use
  // here, and a draw that turns out too short is drawn again.
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(room, 1)) * 2;
  std::vector<std::pair<size_t, size_t>> eligible;  // (book, how many of its starts)
  int64_t total = 0;
  for (size_t b = 0; b < books_.size(); ++b) {
    const Book& book = books_[b];
    if (book.text.size() < bytes) continue;
    const size_t latest = book.text.size() - bytes;
    const size_t count = static_cast<size_t>(std::upper_bound(book.starts.begin(), book.starts.end(), latest) - book.starts.begin());
    eligible.emplace_back(b, count);
    total += static_cast<int64_t>(count);
  }
  for (int draw = 0; draw < 200 && total > 0; ++draw) {
    int64_t pick = random.below(total);
    size_t e = 0;
    while (pick >= static_cast<int64_t>(eligible[e].second)) pick -= static_cast<int64_t>(eligible[e++].second);
    const Book& book = books_[eligible[e].first];
    const std::string_view text = book.text;
    const size_t start = book.starts[static_cast<size_t>(pick)];
    Passage out;
    size_t last = start;
    for (auto end = std::upper_bound(book.ends.begin(), book.ends.end(), start); end != book.ends.end(); ++end) {
      const std::string_view sentence = text.substr(last, *end - last);
      const int64_t tokens = static_cast<int64_t>(encode(sentence).size());
      if (out.tokens + tokens > room) break;
      out.tokens += tokens;
      out.sentences.push_back(sentence);
      last = *end;
    }
    if (out.sentences.empty() || static_cast<double>(out.tokens) < 0.8 * static_cast<double>(room) - 16) continue;
    out.text = text.substr(start, last - start);
    return out;
  }
  throw BadInput("no passage of {} tokens that ends with a sentence was found in {} book(s); give longer text with --haystack", room,
                 books_.size());
}

}  // namespace lacuna

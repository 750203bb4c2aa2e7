#include "generate/text_stream.h"

#include <algorithm>

namespace lacuna {

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop, bool skip_special)
    : decoder_(tokenizer, skip_special), stop_(std::move(stop)) {
  std::erase_if(stop_, [](const std::string& s) { return s.empty(); });
}

std::string TextStream::release(bool last) {
  size_t cut = std::string::npos;
  for (const auto& s : stop_) cut = std::min(cut, held_.find(s));
  std::string out;
  if (cut != std::string::npos) {
    out = held_.substr(0, cut);
    held_.clear();
    stopped_ = true;
  } else {
    size_t keep = 0;  // longest suffix that begins some stop string
    if (!last)
      for (const auto& s : stop_)
        for (size_t n = std::min(s.size() - 1, held_.size()); n > keep; --n)
          if (held_.compare(held_.size() - n, n, s, 0, n) == 0) keep = n;
    out = held_.substr(0, held_.size() - keep);
    held_.erase(0, held_.size() - keep);
  }
  text_ += out;
  return out;
}

std::string TextStream::push(int32_t id) {
  if (stopped_) return {};
  held_ += decoder_.push(id);
  return release(false);
}

std::string TextStream::finish() {
  if (stopped_) return {};
  held_ += decoder_.finish();
  return release(true);
}

}  // namespace lacuna

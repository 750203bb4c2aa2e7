#pragma once

#include <string>
#include <vector>

#include "text/tokenizer.h"

namespace lacuna {

// Turns ids into text as they come: whole UTF-8 characters only, and never a piece of a stop string.
// Text that may be the beginning of a stop string is held back until it is known.
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop, bool skip_special = true);

  // Text that became certain with this id.
  std::string push(int32_t id);
  // Text still held back when generation ends without a stop string.
  std::string finish();

  bool stopped() const { return stopped_; }         // a stop string has appeared
  const std::string& text() const { return text_; }  // all text emitted so far

 private:
  std::string release(bool last);

  StreamDecoder decoder_;
  std::vector<std::string> stop_;
  std::string held_, text_;
  bool stopped_ = false;
};

}  // namespace lacuna

#pragma once

#include <functional>
#include <string>
#include <vector>

#include "formats/config_file.h"

namespace lacuna {

// The "normalizer" of a tokenizer.json: NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip and
// sequences of them. Others are Unsupported.
class Normalizer {
 public:
  // `tokenizer` is the whole file.
  explicit Normalizer(const ConfigFile& tokenizer);
  bool empty() const { return steps_.empty(); }
  // Valid UTF-8 to valid UTF-8.
  void apply(std::string& text) const;

 private:
  void add(const ConfigFile& step);
  std::vector<std::function<void(std::string&)>> steps_;
};

}  // namespace lacuna

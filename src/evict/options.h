#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// The switches of one policy, "key=value,key=value". Asking for a switch declares it: done() refuses
// those that nobody asked for, with the names that exist. Every message names policy and switch.
class PolicyOptions {
 public:
  PolicyOptions(std::string_view policy, std::string_view text);

  int integer(std::string_view key, int otherwise, int least, int most);
  double number(std::string_view key, double otherwise, double least, double most);
  bool flag(std::string_view key, bool otherwise);
  // Index of the value among `values`; `otherwise` is the default's.
  int choice(std::string_view key, std::span<const std::string_view> values, int otherwise = 0);
  int odd(std::string_view key, int otherwise);  // a pooling kernel
  void done() const;

  // Policy and the switches that were given, in the order in which they were asked for.
  std::string canonical() const;

 private:
  struct Entry {
    std::string key, value;
    bool used = false;
  };
  const std::string* take(std::string_view key);

  std::string policy_;
  std::vector<Entry> entries_;
  std::vector<std::string> known_;
  std::string given_;
};

}  // namespace lacuna

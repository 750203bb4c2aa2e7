#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace lacuna {

// One line on standard error that rewrites itself: done/total, rate, time left. Silent when standard
// error is not a terminal, and at most ten updates a second.
class Progress {
 public:
  // unit: what is counted ("tokens"); rate_scale: divides the rate printed (layer-tokens to tokens).
  Progress(std::string label, std::string unit, double rate_scale = 1.0, bool enabled = true);
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done, int64_t total, const std::string& note = {});
  void finish();  // clears the line

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_, unit_;
  double rate_scale_;
  bool enabled_, drawn_ = false;
  Clock::time_point start_, last_;
};

// Set by Ctrl-C (SIGINT) and SIGTERM once install_interrupt_handler has run; a second Ctrl-C kills.
void install_interrupt_handler();
bool interrupted();

}  // namespace lacuna

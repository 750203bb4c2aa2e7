#include "base/progress.h"

#include <csignal>
#include <cstdio>
#include <unistd.h>

#include <algorithm>

#include <fmt/format.h>

namespace lacuna {
namespace {

volatile std::sig_atomic_t g_interrupted = 0;

void on_signal(int signal) {
  g_interrupted = 1;
  std::signal(signal, SIG_DFL);
}

}  // namespace

void install_interrupt_handler() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

bool interrupted() { return g_interrupted != 0; }

Progress::Progress(std::string label, std::string unit, double rate_scale, bool enabled)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      rate_scale_(rate_scale),
      enabled_(enabled && isatty(STDERR_FILENO)),
      start_(Clock::now()),
      last_(start_) {}

void Progress::update(int64_t done, int64_t total, const std::string& note) {
  if (!enabled_) return;
  const auto now = Clock::now();
  if (done < total && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double rate = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 0;
  constexpr int kWidth = 24;
  const int filled = std::clamp(static_cast<int>(share * kWidth), 0, kWidth);
  const double left = rate > 0 ? static_cast<double>(total - done) / rate : 0;
  fmt::print(stderr, "\r\033[K{} [{}{}] {:3.0f} %  {:.0f} {}/s  {:.0f} s left{}{}", label_, std::string(static_cast<size_t>(filled), '='),
             std::string(static_cast<size_t>(kWidth - filled), ' '), 100 * share, rate / rate_scale_, unit_, left,
             note.empty() ? "" : "  ", note);
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::finish() {
  if (!drawn_) return;
  fmt::print(stderr, "\r\033[K");
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace lacuna

// base: typed errors, threads, progress and clocks that every other floor stands on.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace lacuna {

// What kind of thing went wrong. Exit codes and the C API are derived from it.
enum class ErrorKind { kBadInput, kUnsupported, kOutOfMemory, kIo, kCorruptData, kCancelled, kInternal };

// "bad input", "corrupt data", …: the word a message starts with.
const char* error_kind_name(ErrorKind kind);

// Every error that leaves a Lacuna function. what() is one sentence that says what was wrong,
// where (file, tensor, field), what was found and what was expected.
class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}
  ErrorKind kind() const noexcept { return kind_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  std::string message_;
};

template <ErrorKind K>
class ErrorOf : public Error {
 public:
  template <typename... Args>
  explicit ErrorOf(fmt::format_string<Args...> format, Args&&... args)
      : Error(K, fmt::format(format, std::forward<Args>(args)...)) {}
};

// The caller's arguments or request cannot be served as asked (exit code 2).
using BadInput = ErrorOf<ErrorKind::kBadInput>;
// Well-formed, but outside what this build can do.
using Unsupported = ErrorOf<ErrorKind::kUnsupported>;
// A hard memory limit, ours or the machine's, would be exceeded.
using OutOfMemory = ErrorOf<ErrorKind::kOutOfMemory>;
// The operating system refused a read or write.
using IoError = ErrorOf<ErrorKind::kIo>;
// Bytes from outside that contradict their format or their own metadata.
using CorruptData = ErrorOf<ErrorKind::kCorruptData>;
// The user asked to stop (Ctrl-C).
using Cancelled = ErrorOf<ErrorKind::kCancelled>;
// Our own bug.
using InternalError = ErrorOf<ErrorKind::kInternal>;

// Checks for our own bugs; never reachable from outside input.
#define LACUNA_CHECK(condition)                                                                  \
  do {                                                                                           \
    if (!(condition))                                                                            \
      throw ::lacuna::InternalError("{}:{}: check failed: {}", __FILE__, __LINE__, #condition);  \
  } while (false)

}  // namespace lacuna

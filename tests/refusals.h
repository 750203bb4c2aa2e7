// What tests of typed errors share.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <initializer_list>
#include <string>

#include "base/error.h"

namespace lacuna::refusals {

// What the error of kind E says that call() ends in; another text, which no test expects, if it ends otherwise.
template <typename E = CorruptData, typename Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

// The message must hold every one of `parts`.
inline void expect_says(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts) EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
}

}  // namespace lacuna::refusals

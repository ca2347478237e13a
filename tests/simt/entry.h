// How test kernels are started from Python (build.py's Library.call): ENTRY name(arguments)
// returns null, or the message of what the launch threw.
#pragma once

#include <exception>
#include <string>

#define ENTRY extern "C" __attribute__((visibility("default"))) const char*

template <class Body>
const char* guarded(Body body) noexcept {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

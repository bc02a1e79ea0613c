// Errors of the library. Every wrong argument is an Error whose message names the operation, the argument, what was given and what is
// allowed. Nothing is written to any output before all arguments have been checked. The library never prints and never ends the process.
#pragma once

#include <bnb/export.h>

#include <stdexcept>
#include <string>

namespace bnb {

enum class Errc {
  invalid_argument,  // a size, shape, type or pointer that the operation does not accept
  unsupported,       // well-formed, but not available on this machine or in this build
  out_of_memory,     // scratch memory could not be had
};

class BNB_API Error : public std::runtime_error {
 public:
  Error(Errc code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Errc code() const noexcept { return code_; }

 private:
  Errc code_;
};

}  // namespace bnb

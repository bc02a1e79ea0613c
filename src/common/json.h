// A strict reader of the JSON text of one object, such as the states of quantized tensors have. It takes what Python's json module takes
// (NaN, Infinity and -Infinity are numbers), except that values nest 32 deep at most.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bnb::json {

struct Value {
  enum class Kind : uint8_t { null, boolean, integer, real, string, array, object };
  Kind kind = Kind::null;
  std::string text = {};          // of a string what it says, in UTF-8; else as it was written
  double number = 0;              // of integers too; infinite beyond the largest double
  std::vector<Value> items = {};  // of an array
};
using Object = std::vector<std::pair<std::string, Value>>;

struct SyntaxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The members in their order. SyntaxError: it is not the text of one object, or has a key twice.
Object read_object(std::string_view text);

// As Python's json module writes a number: the shortest digits that give it back.
std::string write_number(double);

}  // namespace bnb::json

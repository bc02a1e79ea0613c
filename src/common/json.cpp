#include "common/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace bnb::json {
namespace {

constexpr int kDeepest = 32;
bool is_digit(char c) { return c >= '0' && c <= '9'; }

// `code` in UTF-8; halves of a surrogate pair that stand alone as three bytes each.
void append_utf8(std::string& to, uint32_t code) {
  const auto tail = [&](int shift) { to += static_cast<char>(0x80 | (code >> shift & 0x3f)); };
  if (code < 0x80) {
    to += static_cast<char>(code);
  } else if (code < 0x800) {
    to += static_cast<char>(0xc0 | code >> 6);
    tail(0);
  } else if (code < 0x10000) {
    to += static_cast<char>(0xe0 | code >> 12);
    tail(6);
    tail(0);
  } else {
    to += static_cast<char>(0xf0 | code >> 18);
    tail(12);
    tail(6);
    tail(0);
  }
}

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  Object whole() {
    space();
    Object found;
    const bool is_object = peek() == '{';
    if (is_object)
      object(0, &found);
    else
      value(0);
    space();
    if (at_ < text_.size()) fail("it goes on after its end");
    if (!is_object) fail("it is no object");
    return found;
  }

 private:
  std::string_view text_;
  size_t at_ = 0;

  [[noreturn]] void fail(const std::string& what) const { throw SyntaxError(what + ", at byte " + std::to_string(at_)); }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(std::string_view word) {
    if (!text_.substr(at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }
  void expect(char c) {
    if (!take({&c, 1})) fail(std::string("no ") + c);
  }
  void space() { at_ = std::min(text_.find_first_not_of(" \t\n\r", at_), text_.size()); }

  void object(int depth, Object* found) {
    expect('{');
    space();
    if (take("}")) return;
    do {
      space();
      std::string key = string();
      space();
      expect(':');
      Value member = value(depth + 1);
      if (!found) continue;
      if (std::ranges::any_of(*found, [&](const auto& known) { return known.first == key; }))
        fail("it has the key '" + key.substr(0, 40) + "' twice");
      found->emplace_back(std::move(key), std::move(member));
    } while (take(","));
    expect('}');
  }

  // With the space around it.
  Value value(int depth) {
    if (depth > kDeepest) fail("it is nested too deeply");
    space();
    const size_t begin = at_;
    Value v;
    if (peek() == '{') {
      v.kind = Value::Kind::object;
      object(depth, nullptr);
    } else if (take("[")) {
      v.kind = Value::Kind::array;
      space();
      if (!take("]")) {
        do v.items.push_back(value(depth + 1));
        while (take(","));
        expect(']');
      }
    } else if (peek() == '"') {
      v.kind = Value::Kind::string;
      v.text = string();
      space();
      return v;
    } else if (take("true") || take("false")) {
      v.kind = Value::Kind::boolean;
    } else if (!take("null")) {
      number(v);
    }
    v.text = text_.substr(begin, at_ - begin);
    space();
    return v;
  }

  void digits() {
    if (!is_digit(peek())) fail("no value");
    while (is_digit(peek())) ++at_;
  }

  void number(Value& v) {
    const size_t begin = at_;
    const bool negative = take("-");
    v.kind = Value::Kind::real;
    if (take("Infinity")) {
      v.number = negative ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
      return;
    }
    if (!negative && take("NaN")) {
      v.number = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    v.kind = Value::Kind::integer;
    if (!take("0")) digits();
    if (at_ + 1 < text_.size() && peek() == '.' && is_digit(text_[at_ + 1])) {
      v.kind = Value::Kind::real;
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      v.kind = Value::Kind::real;
      ++at_;
      if (!take("-")) take("+");
      digits();
    }
    v.number = parse(text_.substr(begin, at_ - begin));
  }

  // from_chars leaves open whether a number out of range is too large or too small.
  static double parse(std::string_view text) {
    double x = 0;
    if (std::from_chars(text.data(), text.data() + text.size(), x).ec == std::errc()) return x;
    const bool negative = text.starts_with('-');
    const size_t e = text.find_first_of("eE");
    const std::string_view mantissa = text.substr(negative, e - negative);  // e may be npos
    const bool small = e != text.npos ? text.substr(e + 1).starts_with('-') : mantissa.starts_with("0.");
    return std::copysign(small ? 0 : std::numeric_limits<double>::infinity(), negative ? -1.0 : 1.0);
  }

  std::string string() {
    expect('"');
    std::string found;
    for (;;) {
      if (at_ >= text_.size()) fail("a string does not end");
      const char c = text_[at_++];
      if (c == '"') return found;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c != '\\') {
        found += c;
        continue;
      }
      const char escaped = peek();
      ++at_;
      constexpr std::string_view names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      if (const size_t i = names.find(escaped); i != names.npos && at_ <= text_.size())
        found += meant[i];
      else if (escaped == 'u')
        append_utf8(found, code_point());
      else
        fail("an unknown escape in a string");
    }
  }

  uint32_t code_unit() {
    uint32_t unit = 0;
    const char* begin = text_.data() + at_;
    if (text_.size() - at_ < 4 || std::from_chars(begin, begin + 4, unit, 16).ptr != begin + 4) fail("four hexadecimal digits are missing");
    at_ += 4;
    return unit;
  }
  uint32_t code_point() {
    const uint32_t high = code_unit();
    if (high >> 10 != 0xd800 >> 10 || !text_.substr(at_).starts_with("\\u")) return high;
    const size_t before = at_;
    at_ += 2;
    const uint32_t low = code_unit();
    if (low >> 10 == 0xdc00 >> 10) return 0x10000 + ((high & 0x3ff) << 10 | (low & 0x3ff));
    at_ = before;
    return high;
  }
};

}  // namespace

Object read_object(std::string_view text) { return Reader(text).whole(); }

std::string write_number(double x) {
  if (std::isnan(x)) return "NaN";
  if (std::isinf(x)) return x < 0 ? "-Infinity" : "Infinity";
  char buffer[40];
  const std::string_view text(buffer, std::to_chars(buffer, buffer + sizeof buffer, x, std::chars_format::scientific).ptr - buffer);
  const std::string sign = std::signbit(x) ? "-" : "";
  const size_t e = text.find('e');
  std::string digits(text.substr(sign.size(), e - sign.size()));
  std::erase(digits, '.');
  const bool small = text[e + 1] == '-';
  int exponent = 0;
  std::from_chars(text.data() + e + 2, text.data() + text.size(), exponent);
  if (small) exponent = -exponent;
  const auto count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    const std::string power = std::to_string(std::abs(exponent));
    const std::string fraction = count > 1 ? "." + digits.substr(1) : "";
    return sign + digits[0] + fraction + (exponent < 0 ? "e-" : "e+") + (power.size() < 2 ? "0" : "") + power;
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  if (count <= exponent + 1) return sign + digits + std::string(static_cast<size_t>(exponent + 1 - count), '0') + ".0";
  return sign + digits.substr(0, static_cast<size_t>(exponent + 1)) + "." + digits.substr(static_cast<size_t>(exponent + 1));
}

}  // namespace bnb::json

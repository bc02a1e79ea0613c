// Every wrong argument is an Error that names the operation and the argument, and nothing is written.
#include <regex>

#include "cases/cases.h"

namespace bnb::test {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max(), kLow = std::numeric_limits<int64_t>::min();
constexpr int64_t kBadBlocksizes[] = {0, -1, -64, 1, 16, 31, 33, 48, 63, 65, 4095, 8192, kHuge, kLow};
// 8-bit codes on the CPU take any of 1 or more.
constexpr int64_t kBadBlockwise[] = {0, -1, -64, kLow};
constexpr auto kNoType = static_cast<DType>(7);
constexpr auto kNoFormat = static_cast<QuantType>(9);

// A right call on n = 100 elements (gemm: m = 3, n = 5, k = 20), spoiled in one place.
struct Buffers {
  std::vector<float> x = normals(1, 100), map = create_dynamic_map(), absmax = random_absmax(2, 4), nested = {0.5f}, bias = normals(3, 5);
  std::vector<uint8_t> codes = random_bytes(4, 100), absmax_codes = random_bytes(5, 4);
  Output<uint8_t> codes_out{100};
  Output<float> absmax_out{4}, out{100};

  Quantize4bit quantize_4bit() {
    return {.type = QuantType::nf4,
            .blocksize = 32,
            .x = std::span<const float>(x),
            .codes = codes_out.span().first(50),
            .absmax = absmax_out.span()};
  }
  Dequantize4bit dequantize_4bit() {
    return {.type = QuantType::fp4, .blocksize = 32, .codes = std::span(codes).first(50), .absmax = absmax, .out = out.view()};
  }
  QuantizeBlockwise quantize_blockwise() {
    return {.blocksize = 32, .code = map, .x = std::span<const float>(x), .codes = codes_out.span(), .absmax = absmax_out.span()};
  }
  DequantizeBlockwise dequantize_blockwise() { return {.blocksize = 32, .code = map, .codes = codes, .absmax = absmax, .out = out.view()}; }
  Gemm4bit gemm_4bit() {
    return {.type = QuantType::nf4,
            .blocksize = 32,
            .m = 3,
            .n = 5,
            .k = 20,
            .a = {x.data(), DType::f32, 60},
            .codes = std::span(codes).first(50),
            .absmax = {.values = absmax, .codes = {}, .code = {}, .nested = {}},
            .bias = std::span<const float>(bias),
            .out = {out.span().data(), DType::f32, 15}};
  }
  Gemm4bit nested_gemm() {
    auto d = gemm_4bit();
    d.absmax = {.values = {}, .codes = absmax_codes, .code = map, .nested = nested, .nested_blocksize = 256, .offset = 0.1f};
    return d;
  }
  bool untouched() const { return codes_out.untouched() && absmax_out.untouched() && out.untouched(); }
};

template <class D> struct Case {
  const char* argument;
  const char* what;
  std::function<void(D&)> spoil;
};

template <class D> void check(const char* op, void (*run)(const D&), D (Buffers::*valid)(), const std::vector<Case<D>>& cases) {
  {
    Buffers buffers;
    EXPECT_NO_THROW(run((buffers.*valid)())) << op;
    EXPECT_FALSE(buffers.untouched()) << op;
  }
  for (const auto& c : cases) {
    SCOPED_TRACE(::testing::Message() << op << ", " << c.argument << ": " << c.what);
    Buffers buffers;
    D d = (buffers.*valid)();
    c.spoil(d);
    try {
      run(d);
      ADD_FAILURE() << "was accepted";
    } catch (const Error& e) {
      const std::string message = e.what();
      EXPECT_EQ(e.code(), Errc::invalid_argument) << message;
      EXPECT_TRUE(message.starts_with(std::string(op) + ": " + c.argument)) << message;
      EXPECT_NE(message.find("expected"), std::string::npos) << message;
    }
    EXPECT_TRUE(buffers.untouched()) << "something was written";
  }
}

template <class D> std::vector<Case<D>> with_blocksizes(std::vector<Case<D>> cases, std::span<const int64_t> bad = kBadBlocksizes) {
  for (const int64_t b : bad) cases.push_back({"blocksize", "not allowed", [b](D& d) { d.blocksize = b; }});
  return cases;
}

template <class T> std::span<T> shorter(std::span<T> s) { return s.first(s.size() - 1); }
template <class T> T* inside(const ConstView& v, int64_t at) { return static_cast<T*>(const_cast<void*>(v.data)) + at; }
template <class T> uint8_t* mutable_bytes(std::span<T> s) {
  return reinterpret_cast<uint8_t*>(const_cast<std::remove_const_t<T>*>(s.data()));
}
template <class T> std::span<T> null(std::span<T> s) { return {static_cast<T*>(nullptr), s.size()}; }

TEST(Errors, Quantize4bit) {
  using D = Quantize4bit;
  check<D>("quantize_4bit", quantize_4bit, &Buffers::quantize_4bit,
           with_blocksizes<D>({{"type", "unknown", [](D& d) { d.type = kNoFormat; }},
                               {"x", "null", [](D& d) { d.x.data = nullptr; }},
                               {"x", "negative", [](D& d) { d.x.size = -1; }},
                               {"x", "most negative", [](D& d) { d.x.size = kLow; }},
                               {"x", "unknown type", [](D& d) { d.x.dtype = kNoType; }},
                               {"codes", "of a larger x", [](D& d) { d.x.size = kHuge; }},
                               {"codes", "short", [](D& d) { d.codes = shorter(d.codes); }},
                               {"codes", "none", [](D& d) { d.codes = {}; }},
                               {"codes", "null", [](D& d) { d.codes = null(d.codes); }},
                               {"absmax", "short", [](D& d) { d.absmax = shorter(d.absmax); }},
                               {"absmax", "none", [](D& d) { d.absmax = {}; }},
                               {"absmax", "null", [](D& d) { d.absmax = null(d.absmax); }},
                               {"codes", "in x", [](D& d) { d.codes = {inside<uint8_t>(d.x, 4), 50}; }},
                               {"absmax", "in x", [](D& d) { d.absmax = {inside<float>(d.x, 99), 4}; }},
                               {"codes", "in absmax", [](D& d) { d.codes = {reinterpret_cast<uint8_t*>(&d.absmax[3]), 50}; }}}));
}

TEST(Errors, Dequantize4bit) {
  using D = Dequantize4bit;
  check<D>("dequantize_4bit", dequantize_4bit, &Buffers::dequantize_4bit,
           with_blocksizes<D>({{"type", "unknown", [](D& d) { d.type = kNoFormat; }},
                               {"out", "null", [](D& d) { d.out.data = nullptr; }},
                               {"out", "negative", [](D& d) { d.out.size = -1; }},
                               {"out", "unknown type", [](D& d) { d.out.dtype = kNoType; }},
                               {"codes", "of a larger output", [](D& d) { d.out.size = kHuge; }},
                               {"codes", "short", [](D& d) { d.codes = shorter(d.codes); }},
                               {"codes", "null", [](D& d) { d.codes = null(d.codes); }},
                               {"absmax", "short", [](D& d) { d.absmax = shorter(d.absmax); }},
                               {"absmax", "null", [](D& d) { d.absmax = null(d.absmax); }},
                               {"out", "also the codes", [](D& d) { d.codes = {inside<uint8_t>(d.out, 4), d.codes.size()}; }},
                               {"out", "also absmax", [](D& d) { d.absmax = {inside<float>(d.out, 99), 4}; }}}));
}

// Maps that are not ascending.
const std::vector<float>& unsorted() {
  static const auto map = [] {
    auto m = create_dynamic_map();
    std::swap(m[10], m[11]);
    return m;
  }();
  return map;
}
const std::vector<float>& with_nan(size_t at) {
  static std::vector<float> map;
  map = create_dynamic_map();
  map[at] = std::nanf("");
  return map;
}

TEST(Errors, QuantizeBlockwise) {
  using D = QuantizeBlockwise;
  check<D>("quantize_blockwise", quantize_blockwise, &Buffers::quantize_blockwise,
           with_blocksizes<D>({{"x", "null", [](D& d) { d.x.data = nullptr; }},
                               {"x", "negative", [](D& d) { d.x.size = -1; }},
                               {"x", "unknown type", [](D& d) { d.x.dtype = kNoType; }},
                               {"code", "short", [](D& d) { d.code = shorter(d.code); }},
                               {"code", "none", [](D& d) { d.code = {}; }},
                               {"code", "null", [](D& d) { d.code = null(d.code); }},
                               {"code", "unsorted", [](D& d) { d.code = unsorted(); }},
                               {"code", "NaN first", [](D& d) { d.code = with_nan(0); }},
                               {"code", "NaN inside", [](D& d) { d.code = with_nan(100); }},
                               {"code", "NaN last", [](D& d) { d.code = with_nan(255); }},
                               {"codes", "of a larger x", [](D& d) { d.x.size = kHuge; }},
                               {"codes", "short", [](D& d) { d.codes = shorter(d.codes); }},
                               {"codes", "null", [](D& d) { d.codes = null(d.codes); }},
                               {"absmax", "short", [](D& d) { d.absmax = shorter(d.absmax); }},
                               {"absmax", "null", [](D& d) { d.absmax = null(d.absmax); }},
                               {"codes", "in x", [](D& d) { d.codes = {inside<uint8_t>(d.x, 4), d.codes.size()}; }},
                               {"codes", "in the map", [](D& d) { d.codes = {mutable_bytes(d.code), d.codes.size()}; }},
                               {"absmax", "in x", [](D& d) { d.absmax = {inside<float>(d.x, 99), 4}; }}},
                              kBadBlockwise));
}

TEST(Errors, DequantizeBlockwise) {
  using D = DequantizeBlockwise;
  check<D>("dequantize_blockwise", dequantize_blockwise, &Buffers::dequantize_blockwise,
           with_blocksizes<D>({{"out", "null", [](D& d) { d.out.data = nullptr; }},
                               {"out", "negative", [](D& d) { d.out.size = -1; }},
                               {"out", "unknown type", [](D& d) { d.out.dtype = kNoType; }},
                               {"code", "short", [](D& d) { d.code = shorter(d.code); }},
                               {"code", "null", [](D& d) { d.code = null(d.code); }},
                               {"codes", "of a larger output", [](D& d) { d.out.size = kHuge; }},
                               {"codes", "short", [](D& d) { d.codes = shorter(d.codes); }},
                               {"codes", "null", [](D& d) { d.codes = null(d.codes); }},
                               {"absmax", "short", [](D& d) { d.absmax = shorter(d.absmax); }},
                               {"absmax", "null", [](D& d) { d.absmax = null(d.absmax); }},
                               {"out", "also the codes", [](D& d) { d.codes = {inside<uint8_t>(d.out, 4), d.codes.size()}; }},
                               {"out", "also absmax", [](D& d) { d.absmax = {inside<float>(d.out, 99), 4}; }},
                               {"out", "also the map", [](D& d) { d.out.data = mutable_bytes(d.code); }}},
                              kBadBlockwise));
}

TEST(Errors, Gemm4bit) {
  using D = Gemm4bit;
  check<D>("gemm_4bit", gemm_4bit, &Buffers::gemm_4bit,
           with_blocksizes<D>({{"type", "unknown", [](D& d) { d.type = kNoFormat; }},
                               {"n * k", "negative n", [](D& d) { d.n = -1; }},
                               {"n * k", "negative k", [](D& d) { d.k = -1; }},
                               {"n * k", "both negative", [](D& d) { d.n = -5, d.k = -20; }},
                               {"n * k", "too large", [](D& d) { d.n = kHuge; }},
                               {"n * k", "too large by one bit", [](D& d) { d.n = d.k = int64_t{1} << 32; }},
                               {"m * k", "negative m", [](D& d) { d.m = -3; }},
                               {"m * k", "too large", [](D& d) { d.m = kHuge; }},
                               {"m * n", "too large", [](D& d) { d.m = kHuge / 2, d.k = 0, d.a.size = 0; }},
                               {"a", "null", [](D& d) { d.a.data = nullptr; }},
                               {"a", "negative", [](D& d) { d.a.size = -60; }},
                               {"a", "short", [](D& d) { d.a.size = 59; }},
                               {"a", "long", [](D& d) { d.a.size = 61; }},
                               {"a", "unknown type", [](D& d) { d.a.dtype = kNoType; }},
                               {"out", "null", [](D& d) { d.out.data = nullptr; }},
                               {"out", "short", [](D& d) { d.out.size = 14; }},
                               {"out", "long", [](D& d) { d.out.size = 16; }},
                               {"out", "unknown type", [](D& d) { d.out.dtype = kNoType; }},
                               {"out", "another type", [](D& d) { d.out.dtype = DType::bf16; }},
                               {"codes", "short", [](D& d) { d.codes = shorter(d.codes); }},
                               {"codes", "null", [](D& d) { d.codes = null(d.codes); }},
                               {"absmax.values", "short", [](D& d) { d.absmax.values = shorter(d.absmax.values); }},
                               {"absmax.values", "none", [](D& d) { d.absmax.values = {}; }},
                               {"absmax.values", "null", [](D& d) { d.absmax.values = null(d.absmax.values); }},
                               {"out", "also a", [](D& d) { d.out.data = inside<float>(d.a, 59); }},
                               {"out", "also the codes", [](D& d) { d.out.data = mutable_bytes(d.codes) + 8; }},
                               {"out", "also absmax", [](D& d) { d.out.data = mutable_bytes(d.absmax.values); }},
                               {"out", "also the bias", [](D& d) { d.out.data = inside<float>(d.bias, 4); }},
                               {"bias", "null", [](D& d) { d.bias.data = nullptr; }},
                               {"bias", "negative", [](D& d) { d.bias.size = -5; }},
                               {"bias", "short", [](D& d) { d.bias.size = 4; }},
                               {"bias", "long", [](D& d) { d.bias.size = 6; }},
                               {"bias", "unknown type", [](D& d) { d.bias.dtype = kNoType; }}}));
}

TEST(Errors, NestedAbsmax) {
  using D = Gemm4bit;
  std::vector<Case<D>> cases = {{"absmax.codes", "short", [](D& d) { d.absmax.codes = shorter(d.absmax.codes); }},
                                {"absmax.codes", "null", [](D& d) { d.absmax.codes = null(d.absmax.codes); }},
                                {"absmax.code", "short", [](D& d) { d.absmax.code = shorter(d.absmax.code); }},
                                {"absmax.code", "null", [](D& d) { d.absmax.code = null(d.absmax.code); }},
                                {"absmax.nested", "none", [](D& d) { d.absmax.nested = {}; }},
                                {"out", "also absmax.codes", [](D& d) { d.out.data = mutable_bytes(d.absmax.codes); }},
                                {"out", "also absmax.code", [](D& d) { d.out.data = mutable_bytes(d.absmax.code) + 1000; }},
                                {"out", "also absmax.nested", [](D& d) { d.out.data = mutable_bytes(d.absmax.nested); }},
                                {"absmax.nested", "null", [](D& d) { d.absmax.nested = null(d.absmax.nested); }}};
  for (const int64_t b : kBadBlocksizes)
    cases.push_back({"absmax.nested_blocksize", "not allowed", [b](D& d) { d.absmax.nested_blocksize = b; }});
  check<D>("gemm_4bit", gemm_4bit, &Buffers::nested_gemm, cases);
}

// Empty calls need no memory at all; more room than needed is allowed.
TEST(Errors, WhatIsAllowed) {
  EXPECT_NO_THROW(quantize_4bit({}));
  EXPECT_NO_THROW(dequantize_4bit({}));
  const auto map = create_dynamic_map();
  EXPECT_NO_THROW(quantize_blockwise({.code = map, .x = {}, .codes = {}, .absmax = {}}));
  EXPECT_NO_THROW(dequantize_blockwise({.code = map, .codes = {}, .absmax = {}, .out = {}}));
  EXPECT_NO_THROW(gemm_4bit({}));
  Buffers buffers;
  auto d = buffers.quantize_4bit();
  d.x.size = 64;
  EXPECT_NO_THROW(quantize_4bit(d));
  EXPECT_EQ(buffers.codes_out.span()[32], 0xA5);
  // Parts of one buffer, as long as they are different ones; nothing lies anywhere.
  std::vector<float> memory(32 + 1 + 8);
  Quantize4bit parts{.blocksize = 32,
                     .x = std::span<const float>(memory).first(32),
                     .codes = {reinterpret_cast<uint8_t*>(&memory[33]), 16},
                     .absmax = {&memory[32], 1}};
  EXPECT_NO_THROW(quantize_4bit(parts));
  EXPECT_NO_THROW(
      quantize_4bit({.x = std::span<const float>(memory).subspan(1, 0), .codes = {reinterpret_cast<uint8_t*>(memory.data()), 16}}));
}

// Scratch memory that cannot be had is an Error of the operation too (k = 0, so that no operand is large).
TEST(Errors, OutOfMemory) {
  if (BNB_TEST_SANITIZED) GTEST_SKIP() << "sanitizers end the process on such sizes";
  const int64_t m = int64_t{1} << 55;
  Buffers buffers;
  const auto check = [&](std::string_view op, auto&& run) {
    try {
      run();
      ADD_FAILURE() << op << ": 2^55 rows were computed";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Errc::out_of_memory) << e.what();
      EXPECT_TRUE(std::regex_match(e.what(), std::regex(std::string(op) + ": [0-9]+ bytes of scratch memory could not be allocated")))
          << e.what();
    }
    EXPECT_TRUE(buffers.untouched());
  };
  auto d = buffers.gemm_4bit();
  d.m = m, d.n = 1, d.k = 0, d.a = {nullptr, DType::f32, 0}, d.codes = {}, d.absmax = {}, d.bias = {};
  d.out.size = m;  // never reached
  check("gemm_4bit", [&] { gemm_4bit(d); });
  const float one = 1;
  // Addresses apart from each other and from all that is there; nothing is looked at.
  const auto place = [](uintptr_t at) { return reinterpret_cast<float*>(at << 56); };
  const View out{place(1), DType::f32, m};
  check("linear_int8", [&] { linear_int8({.m = m, .n = 1, .weight_scale = {&one, 1}, .out = out}); });
}

}  // namespace
}  // namespace bnb::test

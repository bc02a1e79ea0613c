// Quantized tensors that own their memory, and their form in a checkpoint.
#include <array>

#include "cases/cases.h"
#include "common/json.h"

namespace bnb::test {
namespace {

// Any contiguous range of elements is a view; only one that can be written and stays is a View.
template <class From, class To> constexpr bool kConverts = std::is_convertible_v<From, To>;
static_assert(kConverts<std::vector<float>&, View> && kConverts<std::array<BFloat16, 4>&, View> && kConverts<Half (&)[4], View>);
static_assert(kConverts<std::span<float>, View> && kConverts<std::span<float, 4>, View>);
static_assert(kConverts<std::vector<Half>, ConstView> && kConverts<const std::vector<float>&, ConstView>);
static_assert(kConverts<const float (&)[4], ConstView> && kConverts<std::span<const float>, ConstView> && kConverts<View, ConstView>);
static_assert(!kConverts<std::vector<float>, View> && !kConverts<const std::vector<float>&, View> &&
              !kConverts<std::span<const float>, View>);
static_assert(!kConverts<std::vector<double>&, ConstView> && !kConverts<std::vector<int>&, View> && !kConverts<ConstView, View>);

std::vector<ConstItem> views(const std::vector<Item>& items) { return {items.begin(), items.end()}; }
std::string text_of(const Item& item) { return {reinterpret_cast<const char*>(item.bytes.data()), item.bytes.size()}; }
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) { return e.what(); }
  return "accepted";
}

TEST(State, FourBitsAreThoseOfTheOperations) {
  for (const QuantType type : kFormats)
    for (const int64_t n : {0, 1, 63, 64, 65, 4097}) {
      const auto x = waves<BFloat16>(1, n);
      const auto q = quantize(x, Options4bit{.type = type, .blocksize = 64});
      std::vector<uint8_t> codes(packed_size(n));
      std::vector<float> absmax(blocks_of(n, 64));
      quantize_4bit({.type = type, .x = x, .codes = codes, .absmax = absmax});
      EXPECT_EQ(q.codes, codes);
      EXPECT_EQ(digest(q.scales.values), digest(absmax));
      EXPECT_EQ(q.shape, Shape{n});
      EXPECT_EQ(q.dtype, DType::bf16);
      std::vector<Half> out(n);
      dequantize_4bit({.type = type, .codes = codes, .absmax = absmax, .out = out});
      EXPECT_EQ(digest(dequantize<Half>(q)), digest(out));
    }
}

TEST(State, EightBitsAndRowsAreThoseOfTheOperations) {
  const auto x = normals(1, 5000);
  const auto q = quantize(x, Options8bit{.blocksize = 512});
  std::vector<uint8_t> codes(5000);
  std::vector<float> absmax(10), out(5000);
  const auto map = create_dynamic_map();
  quantize_blockwise({.blocksize = 512, .code = map, .x = x, .codes = codes, .absmax = absmax});
  dequantize_blockwise({.blocksize = 512, .code = map, .codes = codes, .absmax = absmax, .out = out});
  EXPECT_EQ(q.codes, codes);
  EXPECT_EQ(q.scales.values, absmax);
  EXPECT_FALSE(q.shape);
  EXPECT_EQ(dequantize(q), out);

  const auto rows = quantize(x, OptionsInt8{.shape = {50, 100}});
  std::vector<int8_t> codes8(5000);
  std::vector<float> scale(50);
  quantize_int8({.rows = 50, .columns = 100, .x = x, .codes = codes8, .scale = scale});
  dequantize_int8({.rows = 50, .columns = 100, .codes = codes8, .scale = scale, .out = out});
  EXPECT_EQ(rows.codes, codes8);
  EXPECT_EQ(rows.scale, scale);
  EXPECT_EQ(dequantize(rows), out);
}

// The scales are those of the formula, and near the plain ones; the offset is their mean.
TEST(State, NestedScales) {
  for (const int64_t blocksize : {256, 100}) {
    const auto plain = random_absmax(3, 1000);
    const auto s = nest(plain, blocksize);
    double mean = 0, most = 0;
    for (const float v : plain) mean += v / 1000.0;
    EXPECT_NEAR(s.offset, mean, 1e-6 * std::abs(mean));
    EXPECT_EQ(std::ssize(s.second), blocks_of(1000, blocksize));
    const auto decoded = decode(s);
    for (size_t i = 0; i < plain.size(); ++i) {
      const float scaled = s.code[s.codes[i]] * s.second[i / static_cast<size_t>(blocksize)];
      EXPECT_EQ(decoded[i], scaled + s.offset);
      most = std::max<double>(most, s.second[i / static_cast<size_t>(blocksize)]);
      EXPECT_NEAR(decoded[i], plain[i], 0.02 * most);
    }
  }
  EXPECT_EQ(nest({}).offset, 0);
}

// The mean in the order of torch.mean on one thread, by its bits: n, then that of fp32 numbers 1 / (1 + i % 97) + i * 1e-4.
TEST(State, MeanOfScalesIsThatOfTorch) {
  constexpr std::pair<int64_t, uint32_t> kMeans[] = {{1, 0x3f800000},     {3, 0x3f1c7855},      {5, 0x3ee9ea6d},      {7, 0x3ebdcd76},
                                                     {8, 0x3eae1f40},     {9, 0x3ea12444},      {31, 0x3e0690a5},     {32, 0x3e037584},
                                                     {33, 0x3e0083da},    {100, 0x3d994d16},    {255, 0x3d929053},    {256, 0x3d925306},
                                                     {1000, 0x3dd818a0},  {4097, 0x3e84646e},   {32767, 0x3fd882be},  {65536, 0x40551db3},
                                                     {65537, 0x40551e82}, {300000, 0x4170d993}, {1048577, 0x4251ed89}};
  for (const auto& [n, bits] : kMeans) {
    std::vector<float> x(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i)] = 1.0f / static_cast<float>(1 + i % 97) + static_cast<float>(i) * 1e-4f;
    EXPECT_EQ(std::bit_cast<uint32_t>(nest(x).offset), bits) << n;
  }
}

TEST(State, Products) {
  const int64_t m = 3, n = 40, k = 96;
  const auto weight = normals(1, n * k), x = normals(2, m * k), bias = normals(3, n);
  for (const bool nested : {false, true})
    for (const int64_t second : {256, 100}) {
      auto w = quantize(weight, Options4bit{.nested = nested, .shape = {n, k}});
      if (nested) w.scales = nest(quantize(weight, Options4bit{}).scales.values, second);
      const auto decoded = dequantize(w), y = gemm(x, w, bias);
      ASSERT_EQ(std::ssize(y), m * n);
      for (int64_t i = 0; i < m * n; ++i) {
        double sum = bias[i % n];
        for (int64_t l = 0; l < k; ++l) sum += double{x[i / n * k + l]} * decoded[i % n * k + l];
        EXPECT_NEAR(y[i], sum, 1e-4);
      }
    }
  const auto w = quantize(weight, OptionsInt8{.shape = {n, k}});
  std::vector<float> expected(m * n);
  linear_int8({.m = m, .n = n, .k = k, .x = x, .threshold = 2, .weight = w.codes, .weight_scale = w.scale, .bias = bias, .out = expected});
  EXPECT_EQ(gemm(x, w, {.bias = bias, .threshold = 2}), expected);
  // Rows without elements: the bias is left.
  std::vector<float> out(6);
  gemm_into(ConstView(), quantize(std::vector<float>(), Options4bit{.shape = {3, 0}}), out, std::vector<float>{1, 2, 3});
  EXPECT_EQ(out, (std::vector<float>{1, 2, 3, 1, 2, 3}));
}

TEST(State, TextOfAState) {
  auto q = quantize(normals(1, 40 * 96), Options4bit{.type = QuantType::fp4, .blocksize = 128, .shape = {40, 96}});
  auto items = state_items(q, "a.b.");
  ASSERT_EQ(items.size(), 3u);
  EXPECT_EQ(items[0].name, "a.b.absmax");
  EXPECT_EQ(items[1].name, "a.b.quant_map");
  EXPECT_EQ(items[2].name, "a.b.quant_state.bitsandbytes__fp4");
  EXPECT_EQ(text_of(items[2]), R"({"quant_type": "fp4", "blocksize": 128, "dtype": "float32", "shape": [40, 96]})");
  q.scales = nest(q.scales.values);
  q.scales.offset = 0.1f;
  items = state_items(q);
  ASSERT_EQ(items.size(), 5u);
  EXPECT_EQ(items[2].name, "nested_absmax");
  EXPECT_EQ(items[3].name, "nested_quant_map");
  EXPECT_EQ(text_of(items[4]), R"({"quant_type": "fp4", "blocksize": 128, "dtype": "float32", "shape": [40, 96], "nested_blocksize": 256, )"
                               R"("nested_dtype": "float32", "nested_offset": 0.10000000149011612})");
  EXPECT_EQ(read_4bit(q.codes, views(items)), q);
  const auto eight = quantize(waves<BFloat16>(1, 300), Options8bit{.blocksize = 64, .nested = true});
  items = state_items(eight);
  EXPECT_EQ(text_of(items[4]).substr(0, 72), R"({"quant_type": null, "blocksize": 64, "dtype": "bfloat16", "shape": null)");
  EXPECT_EQ(read_8bit(eight.codes, views(items)), eight);
}

// As Python prints them.
TEST(State, NumbersAreWrittenAsPythonDoes) {
  constexpr std::pair<double, const char*> kNumbers[] = {{0.0, "0.0"},
                                                         {-0.0, "-0.0"},
                                                         {1.0, "1.0"},
                                                         {0.1, "0.1"},
                                                         {-2.5, "-2.5"},
                                                         {1e15, "1000000000000000.0"},
                                                         {1e16, "1e+16"},
                                                         {1e-4, "0.0001"},
                                                         {1e-5, "1e-05"},
                                                         {1.5e-7, "1.5e-07"},
                                                         {1e100, "1e+100"},
                                                         {1.25e22, "1.25e+22"},
                                                         {5e-324, "5e-324"},
                                                         {123456.789, "123456.789"},
                                                         {double{0.1f}, "0.10000000149011612"},
                                                         {1.7976931348623157e308, "1.7976931348623157e+308"},
                                                         {INFINITY, "Infinity"},
                                                         {-INFINITY, "-Infinity"},
                                                         {NAN, "NaN"}};
  for (const auto& [x, text] : kNumbers) EXPECT_EQ(json::write_number(x), text);
}

// ---- what is refused

struct Broken {
  std::vector<Item> items;
  std::vector<uint8_t> codes;
  Item& operator[](std::string_view name) {
    return *std::ranges::find_if(items, [&](const Item& i) { return i.name == name; });
  }
  std::string text() { return text_of(items.back()); }
  void replace(std::string_view from, std::string_view to) {
    std::string t = text();
    const size_t at = t.find(from);
    ASSERT_NE(at, t.npos) << from;
    set(t.replace(at, from.size(), to));
  }
  void set(std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text));
    items.back().bytes.assign(bytes.begin(), bytes.end());
  }
};
Broken whole() {
  const auto q = quantize(normals(1, 40 * 96), Options4bit{.nested = true, .shape = {40, 96}});
  return {state_items(q), q.codes};
}

TEST(State, BrokenStatesAreRefused) {
  using Spoil = std::function<void(Broken&)>;
  const auto text = [](const char* from, const char* to) { return Spoil([=](Broken& b) { b.replace(from, to); }); };
  const auto offset = [](std::string value) {
    return Spoil([=](Broken& b) {
      const std::string before = b.text();
      b.set(before.substr(0, before.find(", \"nested_offset\"")) + ", \"nested_offset\": " + value + "}");
    });
  };
  const auto all = [](std::string t) { return Spoil([=](Broken& b) { b.set(t); }); };
  const std::pair<Spoil, const char*> kCases[] = {
      {text("\"nf4\"", "\"fp4\""), "quant_type in quant_state.bitsandbytes__nf4 is 'fp4', expected that of the entry"},
      {text("\"nf4\"", "null"), "quant_type in quant_state.bitsandbytes__nf4 is null, expected that of the entry"},
      {text("\"nf4\"", "\"int8\""), "is 'int8', expected one of nf4, fp4"},
      {text("\"nf4\"", "4"), "is 4, expected one of nf4, fp4"},
      {text("64", "48"), "blocksize in quant_state.bitsandbytes__nf4 is 48, expected a power of two"},
      {text("64", "64.0"), "blocksize in quant_state.bitsandbytes__nf4 is 64.0"},
      {text("64", "true"), "blocksize in quant_state.bitsandbytes__nf4 is true"},
      {text("64", "18446744073709551680"), "blocksize in"},
      {text("64", "-64"), "blocksize in"},
      {text("64", "064"), "not the JSON text"},
      {text("64", "128"), "absmax has 60 elements, expected 30"},
      {text("[40, 96]", "[40, 97]"), "absmax has 60 elements, expected 61"},
      {text("[40, 96]", "[40, -96]"), "expected a list of sizes of 0 or more"},
      {text("[40, 96]", "[40, 96.0]"), "expected a list of sizes"},
      {text("[40, 96]", "[40, [96]]"), "expected a list of sizes"},
      {text("[40, 96]", "3840"), "expected a list of sizes"},
      {text("[40, 96]", "null"), "shape in quant_state.bitsandbytes__nf4 is null"},
      {text("[40, 96]", "[4294967296, 4294967296]"), "sizes whose product fits 63 bits"},
      {text("[40, 96]", "[0, 4294967296, 4294967296]"), "sizes whose product fits 63 bits"},
      {text("[40, 96]", "[40, 95]"), "codes is 1920 elements, expected 1900"},
      {text("float32", "float99"), "dtype in quant_state.bitsandbytes__nf4 is 'float99'"},
      {text("float32", "float64"), "is 'float64', expected the name of a torch dtype"},
      {text("256", "0"), "nested_blocksize in"},
      {text("256", "32"), "nested_absmax has 1 elements, expected 2"},
      {offset("1e39"), "nested_offset in quant_state.bitsandbytes__nf4 is 1e39, expected a number of fp32"},
      {offset("1" + std::string(400, '0')), "expected a number of fp32"},
      {offset("\"1\""), "nested_offset in quant_state.bitsandbytes__nf4 is '1', expected a number"},
      {offset("true"), "nested_offset in quant_state.bitsandbytes__nf4 is true, expected a number"},
      {offset("+1"), "not the JSON text"},
      {offset(".5"), "not the JSON text"},
      {offset("1."), "not the JSON text"},
      {offset("1e"), "not the JSON text"},
      {offset("-NaN"), "not the JSON text"},
      {offset("0, \"surprise\": 1"), "one with surprise"},
      {text("\"nested_offset\": ", "\"offset\": "), "one with offset"},
      {text("\"blocksize\": 64", "\"blocksize\": 64, \"blocksize\": 64"), "it has the key 'blocksize' twice"},
      {text("\"blocksize\": 64", "\"absmax\": 64"), "one with absmax and absmax in quant_state.bitsandbytes__nf4, expected one absmax"},
      {text("\"blocksize\": 64, ", ""), "one without blocksize"},
      {text("}", ""), "not the JSON text of a state"},
      {text("}", "} x"), "it goes on after its end"},
      {all(""), "not the JSON text"},
      {all("[]"), "it is no object"},
      {all("nul"), "not the JSON text"},
      {all("{\"a\": \"\\x\"}"), "an unknown escape"},
      {all("{\"a\": \"\n\"}"), "a control character"},
      {all("{\"a\": \"\\ud8\"}"), "four hexadecimal digits"},
      {all("{\"a\": \"b"), "a string does not end"},
      {all("{\"a\": 1,}"), "not the JSON text"},
      {all(std::string(20000, '[')), "nested too deeply"},
      {all(std::string(70000, ' ')), "70000 bytes, expected at most 65536"},
      {[](Broken& b) { b["absmax"].type = ItemType::i8; }, "absmax has dtype int8, expected uint8"},
      {[](Broken& b) { b["nested_absmax"].type = ItemType::u8; }, "nested_absmax has dtype uint8, expected floating point"},
      {[](Broken& b) { b["quant_map"].bytes.resize(60); }, "quant_map has 15 elements, expected 16"},
      {[](Broken& b) { b["nested_quant_map"].bytes.resize(64); }, "nested_quant_map has 16 elements, expected 256"},
      {[](Broken& b) { b["absmax"].bytes.pop_back(); }, "absmax has 59 elements, expected 60"},
      {[](Broken& b) { b["absmax"].name = "surprise"; }, "one with surprise"},
      {[](Broken& b) { b["absmax"].name = "quant_map"; }, "one with quant_map and quant_map, expected one quant_map"},
      {[](Broken& b) { b["nested_quant_map"].name = "quant_state"; }, "one without nested_quant_map"},
      {[](Broken& b) { b.items.back().name = "x.bitsandbytes__int8"; }, "without a state"},
      {[](Broken& b) { b.items.back().type = ItemType::i8; }, "int8, expected uint8"},
      {[](Broken& b) { b.items.push_back(b.items.back()), b.items.back().name = "bitsandbytes__fp4"; }, "one of the states"},
      {[](Broken& b) { b.items.clear(); }, "without a state"},
      {[](Broken& b) { b.codes.pop_back(); }, "codes is 1919 elements, expected 1920"},
      {[](Broken& b) { b.codes.push_back(0); }, "codes is 1921 elements, expected 1920"},
  };
  for (const auto& [spoil, words] : kCases) {
    auto b = whole();
    spoil(b);
    const auto message = message_of([&] { read_4bit(b.codes, views(b.items)); });
    EXPECT_TRUE(message.starts_with("read_4bit: ")) << message;
    EXPECT_NE(message.find(words), message.npos) << message << "\nexpected: " << words;
  }
  auto b = whole();
  EXPECT_NE(message_of([&] { read_8bit(b.codes, views(b.items)); }).find("read_4bit"), std::string::npos);
}

TEST(State, WhatIsTaken) {
  const auto expected = read_4bit(whole().codes, views(whole().items));
  const std::function<void(Broken&)> kCases[] = {
      [](Broken& b) { b.replace("{", " \t\r\n{ "), b.replace("}", " } "); },
      [](Broken& b) { b.replace("nf4", "\\u006ef4"); },
      [](Broken& b) { b.replace("[40, 96]", "[40 ,96 ]"); },
      [](Broken& b) { b.replace("float32", "float"); },
      [](Broken& b) {
        for (auto& item : b.items) item.name = "model.layers.0.weight." + item.name;
      },
      [](Broken& b) { std::ranges::reverse(b.items); },
  };
  for (const auto& change : kCases) {
    auto b = whole();
    change(b);
    EXPECT_EQ(read_4bit(b.codes, views(b.items)), expected);
  }
  // Statistics of another type, as a model that was cast has them; an offset that is a tensor; one that is not finite.
  auto b = whole();
  const auto& map = b["nested_quant_map"];
  std::vector<BFloat16> cast(256);
  convert({map.bytes.data(), DType::f32, 256}, cast);
  const auto bytes = std::as_bytes(std::span(cast));
  b["nested_quant_map"] = {"nested_quant_map", ItemType::bf16, {bytes.begin(), bytes.end()}};
  std::string text = b.text();
  b.set(text.substr(0, text.find(", \"nested_offset\"")) + ", \"nested_offset\": -Infinity}");
  const auto q = read_4bit(b.codes, views(b.items));
  EXPECT_EQ(q.scales.offset, -INFINITY);
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(q.scales.code[i], to_fp32(cast[i]));
  b.set(text.substr(0, text.find(", \"nested_offset\"")) + "}");
  const double offset = 0.25;
  b.items.insert(b.items.begin(), {"x.nested_offset", ItemType::f64, {}});
  b.items[0].bytes.resize(8);
  std::memcpy(b.items[0].bytes.data(), &offset, 8);
  EXPECT_EQ(read_4bit(b.codes, views(b.items)).scales.offset, 0.25f);
}

TEST(State, ValuesThatDoNotFitAreRefused) {
  const auto q = quantize(normals(1, 128), Options4bit{.nested = true});
  const std::pair<std::function<void(Quantized4bit&)>, const char*> kCases[] = {
      {[](auto& v) { v.codes.pop_back(); }, "codes is 63 elements"},
      {[](auto& v) { v.shape = {-1}; }, "shape"},
      {[](auto& v) { v.shape = {int64_t{1} << 40, int64_t{1} << 40}; }, "shape"},
      {[](auto& v) { v.blocksize = 0; }, "blocksize is 0"},
      {[](auto& v) { v.type = static_cast<QuantType>(9); }, "type"},
      {[](auto& v) { v.scales.codes.pop_back(); }, "scales.codes"},
      {[](auto& v) { v.scales.second.clear(); }, "scales.second"},
      {[](auto& v) { v.scales.code.pop_back(); }, "scales.code"},
      {[](auto& v) { v.scales.second_blocksize = 0; }, "scales.second_blocksize"},
      {[](auto& v) { v.scales.nested = false; }, "scales.values"},
  };
  for (const auto& [spoil, words] : kCases) {
    auto broken = q;
    spoil(broken);
    for (const auto& call : {std::function<void()>([&] { dequantize(broken); }), std::function<void()>([&] { state_items(broken); })}) {
      const auto message = message_of(call);
      EXPECT_NE(message.find(words), message.npos) << message << "\nexpected: " << words;
    }
  }
  const auto x = normals(1, 128);
  EXPECT_NE(message_of([&] { gemm(x, q); }).find("[n, k]"), std::string::npos);
  EXPECT_NE(message_of([&] { quantize(x, Options4bit{.shape = {5, 25}}); }).find("x is 128 elements, expected 125"), std::string::npos);
  EXPECT_NE(message_of([&] { quantize(x, OptionsInt8{.shape = {128}}); }).find("[rows, columns]"), std::string::npos);
  std::vector<float> small(127);
  EXPECT_NE(message_of([&] { dequantize_into(q, small); }).find("out is 127 elements, expected 128"), std::string::npos);
}

// ---- conversions: every number of 16 bits, there and back; every rounding against the plain rule
TEST(Convert, EveryNumberOf16Bits) {
  std::vector<Half> half(65536), half_back(65536);
  std::vector<BFloat16> brain(65536), brain_back(65536);
  for (uint32_t i = 0; i < 65536; ++i) half[i].bits = brain[i].bits = static_cast<uint16_t>(i);
  std::vector<float> a(65536), b(65536);
  convert(half, a);
  convert(brain, b);
  convert(a, half_back);
  convert(b, brain_back);
  for (uint32_t i = 0; i < 65536; ++i) {
    const bool nan_half = std::isnan(a[i]), nan_brain = std::isnan(b[i]);
    EXPECT_EQ(half_back[i].bits, nan_half ? i | 0x200 : i);
    EXPECT_EQ(brain_back[i].bits, nan_brain ? i | 0x40 : i);
    if (!nan_half) {
      EXPECT_EQ(a[i], reference::to_float(half[i]));
      EXPECT_EQ(to_fp32(half[i]), a[i]);
    }
    if (!nan_brain) { EXPECT_EQ(to_fp32(brain[i]), b[i]); }
  }
  for (const float x : waves<float>(5, 10000)) {
    EXPECT_EQ(to_bf16(x).bits, reference::rounded<BFloat16>(x).bits);
    EXPECT_EQ(to_fp16(x).bits, reference::rounded<Half>(x).bits);
  }
  EXPECT_NE(message_of([&] { convert(half, std::span(a).first(5)); }).find("convert: to is 5 elements"), std::string::npos);
  EXPECT_NE(message_of([&] { convert(a, {a.data(), DType::bf16, 65536}); }).find("memory of its own"), std::string::npos);
}

}  // namespace
}  // namespace bnb::test

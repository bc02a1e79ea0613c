// The published vectors (tests/conformance/README.md) are those that the core makes today, on every instruction set, and its products are
// within their tolerance. BNB_WRITE_CONFORMANCE=1 writes the files anew, for a case that has been added.
#include <fstream>
#include <iterator>

#include "cases/cases.h"

namespace bnb::test {
namespace {

const std::string kFolder = BNB_GOLDEN_DIR "/../conformance/";

class Vectors {
 public:
  std::vector<std::byte> blob;
  std::string json() const { return "{\"version\": 1, \"blob\": \"vectors.bin\", \"cases\": [\n" + cases_ + "\n]}\n"; }

  // What describes a case, as the members of a JSON object; then its tensors.
  void begin(const std::string& members) { cases_ += (cases_.empty() ? "{" : ",\n{") + members + ", \"tensors\": {", first_ = true; }
  void end() { cases_ += "}}"; }
  template <class T> void add(std::string_view name, const std::vector<T>& values, Shape shape = {}) {
    if (shape.empty()) shape = {std::ssize(values)};
    std::string sizes;
    for (const int64_t size : shape) sizes.append(sizes.empty() ? "" : ", ").append(std::to_string(size));
    cases_.append(first_ ? "\n  \"" : ",\n  \"")
        .append(name)
        .append("\": {\"dtype\": \"")
        .append(type_name<T>())
        .append("\", \"shape\": [");
    cases_ += sizes + "], \"offset\": " + std::to_string(blob.size()) + "}";
    first_ = false;
    const auto bytes = std::as_bytes(std::span(values));
    blob.insert(blob.end(), bytes.begin(), bytes.end());
    blob.resize((blob.size() + 7) / 8 * 8);
  }

 private:
  std::string cases_;
  bool first_ = true;

  template <class T> static std::string_view type_name() {
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, double>) return "float64";
    if constexpr (std::is_same_v<T, Half>) return "float16";
    if constexpr (std::is_same_v<T, BFloat16>) return "bfloat16";
    if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
    if constexpr (std::is_same_v<T, int8_t>) return "int8";
    if constexpr (std::is_same_v<T, int32_t>) return "int32";
    if constexpr (std::is_same_v<T, int64_t>) return "int64";
  }
};

std::string json_string(std::string_view text) { return "\"" + std::string(text) + "\""; }

// sum a * w and sum |a * w|, in fp64, for every element of a * W^T + bias.
struct Exact {
  std::vector<double> sums, sizes;
};
template <class T, class W> Exact exact(const std::vector<T>& a, const std::vector<W>& w, int64_t n, int64_t k) {
  Exact e;
  for (int64_t i = 0; i < std::ssize(a) / k; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double term = to_double(a[static_cast<size_t>(i * k + l)]) * to_double(w[static_cast<size_t>(j * k + l)]);
        sum += term, size += std::abs(term);
      }
      e.sums.push_back(sum), e.sizes.push_back(size);
    }
  return e;
}
template <class T> constexpr double kTolerance = dtype_of<T> == DType::f32 ? 0x1p-20 : dtype_of<T> == DType::f16 ? 0x1p-10 : 0x1p-7;
template <class T> void expect_near(const std::vector<T>& y, const Exact& e) {
  ASSERT_EQ(y.size(), e.sums.size());
  for (size_t i = 0; i < y.size(); ++i) EXPECT_NEAR(to_double(y[i]), e.sums[i], kTolerance<T> * e.sizes[i]) << i;
}

void add_items(Vectors& v, const std::vector<Item>& items) {
  for (const Item& item : items) {
    if (item.type == ItemType::f32) {
      std::vector<float> values(static_cast<size_t>(item.size()));
      std::memcpy(values.data(), item.bytes.data(), item.bytes.size());
      v.add(item.name, values);
    } else {
      std::vector<uint8_t> values(static_cast<size_t>(item.size()));
      std::memcpy(values.data(), item.bytes.data(), item.bytes.size());
      v.add(item.name, values);
    }
  }
}

template <class T>
void four_bits(Vectors& v, std::string name, QuantType type, int64_t blocksize, bool nested, Shape shape, const std::vector<float>& x,
               std::string_view released = "equal") {
  const auto elements = rounded_all<T>(x);
  const auto q = quantize(elements, Options4bit{.type = type, .blocksize = blocksize, .nested = nested, .shape = shape});
  v.begin("\"name\": " + json_string(name) + ", \"kind\": \"4bit\", \"quant_type\": " + json_string(bnb::name(type)) + ", \"blocksize\": " +
          std::to_string(blocksize) + ", \"nested\": " + (nested ? "true" : "false") + ", \"released\": " + json_string(released));
  v.add("x", elements, shape);
  v.add("codes", q.codes);
  add_items(v, state_items(q));
  if (nested) v.add("scales", decode(q.scales));
  const auto decoded = dequantize<T>(q);
  v.add("decoded", decoded, shape);
  if (shape.size() == 2) {
    const auto a = rounded_all<T>(normals(77, 3 * shape[1]));
    const Exact e = exact(a, decoded, shape[0], shape[1]);
    v.add("a", a, {3, shape[1]});
    v.add("product", e.sums, {3, shape[0]});
    expect_near(gemm(a, q), e);
  }
  v.end();
}

void eight_bits(Vectors& v, std::string name, int64_t n, int64_t blocksize, bool nested) {
  const auto x = normals(31, n);
  const auto q = quantize(x, Options8bit{.blocksize = blocksize, .nested = nested});
  v.begin("\"name\": " + json_string(name) + ", \"kind\": \"8bit\", \"blocksize\": " + std::to_string(blocksize) +
          ", \"nested\": " + (nested ? "true" : "false") + ", \"released\": \"near\"");
  v.add("x", x);
  v.add("codes", q.codes);
  add_items(v, state_items(q));
  v.add("decoded", dequantize(q));
  v.end();
}

// Weight, activations with outlier columns, and their product.
template <class T> void int8_rows(Vectors& v, std::string name, float threshold) {
  const int64_t m = 5, n = 12, k = 160;
  const auto weight = rounded_all<T>(normals(41, n * k));
  auto wide = normals(42, m * k);
  for (const int64_t c : {7, 90}) wide[static_cast<size_t>(2 * k + c)] = c == 7 ? 9.0f : -6.5f;
  const auto x = rounded_all<T>(wide);
  const auto w = quantize(weight, OptionsInt8{.shape = {n, k}});
  std::vector<int8_t> codes(static_cast<size_t>(m * k));
  std::vector<float> scale(static_cast<size_t>(m));
  std::vector<uint64_t> words(static_cast<size_t>(outlier_words(k)));
  quantize_int8({.rows = m, .columns = k, .x = x, .threshold = threshold, .codes = codes, .scale = scale, .outliers = words});
  std::vector<int32_t> sums(static_cast<size_t>(m * n));
  gemm_int8({.m = m, .n = n, .k = k, .a = codes, .b = w.codes, .sums = sums});
  v.begin("\"name\": " + json_string(name) + ", \"kind\": \"int8\", \"threshold\": " + std::to_string(threshold) +
          ", \"released\": \"equal\"");
  v.add("weight", weight, {n, k});
  v.add("weight_codes", w.codes, {n, k});
  v.add("weight_scale", w.scale);
  v.add("decoded", dequantize<float>(w), {n, k});
  v.add("x", x, {m, k});
  v.add("codes", codes, {m, k});
  v.add("scale", scale);
  const auto outliers = threshold > 0 ? outlier_columns(words) : std::vector<int64_t>();
  v.add("outliers", outliers);
  v.add("sums", sums, {m, n});
  // What the scales, the outlier columns and the decoded weight say, in fp64.
  const auto decoded = dequantize<float>(w);
  Exact e;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double y =
          sums[static_cast<size_t>(i * n + j)] * double{scale[static_cast<size_t>(i)]} * w.scale[static_cast<size_t>(j)] / (127.0 * 127.0);
      double size = 0;
      for (const int64_t c : outliers) y += to_double(x[static_cast<size_t>(i * k + c)]) * decoded[static_cast<size_t>(j * k + c)];
      for (int64_t l = 0; l < k; ++l)
        size += std::abs(to_double(x[static_cast<size_t>(i * k + l)]) * decoded[static_cast<size_t>(j * k + l)]);
      e.sums.push_back(y), e.sizes.push_back(size);
    }
  v.add("product", e.sums, {m, n});
  expect_near(gemm(x, w, {.threshold = threshold}), e);
  v.end();
}

// A block each: zeros, one element, negative zero, subnormal numbers, the smallest normal, large numbers, values at and beside thresholds.
std::vector<float> special_values(QuantType type) {
  std::vector<float> x(64 * 6, 0.0f);
  x[64 + 5] = -3.0f, x[64 + 6] = -0.0f;
  for (size_t i = 0; i < 64; ++i) {
    x[128 + i] = static_cast<float>(i) * 0x1p-120f;
    x[192 + i] = static_cast<float>(i) * (i % 2 ? 1e30f : -1e30f);
    x[256 + i] = values_of(type)[i % 16] * 0.5f;
    x[320 + i] = i == 0 ? 1.0f : std::nextafter((values_of(type)[i % 16] + values_of(type)[(i + 1) % 16]) / 2, i < 32 ? 2.0f : -2.0f);
  }
  return x;
}

Vectors make_vectors() {
  Vectors v;
  for (const QuantType type : kFormats) {
    const std::string t(name(type));
    const auto x = normals(11, 8 * 128);
    four_bits<float>(v, t + "_f32_64", type, 64, false, {8, 128}, x);
    four_bits<Half>(v, t + "_f16_128", type, 128, false, {8, 128}, x);
    four_bits<BFloat16>(v, t + "_bf16_32", type, 32, false, {8, 128}, x);
    four_bits<float>(v, t + "_special_values", type, 64, false, {6, 64}, special_values(type));
    four_bits<float>(v, t + "_short_last_block", type, 64, false, {97}, normals(12, 97),
                     "differs in the last block, which it divides by absmax");
  }
  // 288 scales: two blocks of them.
  four_bits<BFloat16>(v, "nf4_nested_bf16", QuantType::nf4, 32, true, {72, 128}, normals(13, 72 * 128));
  four_bits<Half>(v, "fp4_nested_f16", QuantType::fp4, 32, true, {72, 128}, normals(14, 72 * 128));
  eight_bits(v, "dynamic8", 1024, 256, false);
  eight_bits(v, "dynamic8_nested", 2048, 32, true);
  int8_rows<float>(v, "int8_f32", 0);
  int8_rows<Half>(v, "int8_f16_outliers", 6);
  return v;
}

std::string read_file(const std::string& name) {
  std::ifstream file(kFolder + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Conformance, PublishedVectors) {
  if (std::getenv("BNB_WRITE_CONFORMANCE")) {
    const Vectors v = make_vectors();
    std::ofstream(kFolder + "vectors.json", std::ios::binary) << v.json();
    std::ofstream(kFolder + "vectors.bin", std::ios::binary).write(reinterpret_cast<const char*>(v.blob.data()), std::ssize(v.blob));
  }
  const std::string json = read_file("vectors.json"), blob = read_file("vectors.bin");
  ASSERT_GT(json.size(), 1000u);
  for (const auto isa : supported_isas()) {
    force_isa(isa);
    const Vectors v = make_vectors();
    EXPECT_EQ(v.json(), json) << isa;
    ASSERT_EQ(v.blob.size(), blob.size()) << isa;
    const auto* made = reinterpret_cast<const char*>(v.blob.data());
    const auto differs = std::mismatch(blob.begin(), blob.end(), made).first - blob.begin();
    EXPECT_EQ(differs, std::ssize(blob)) << "the first byte that differs, on " << isa;
  }
  force_isa("");
}

}  // namespace
}  // namespace bnb::test

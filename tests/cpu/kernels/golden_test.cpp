// The bytes of the released package (tests/golden/make_golden.py).
#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>

#include "cases/cases.h"

namespace bnb::test {
namespace {

// The lines of a golden file as words, without its first line.
std::vector<std::vector<std::string>> golden(const std::string& file) {
  std::ifstream in(BNB_GOLDEN_DIR "/" + file);
  EXPECT_TRUE(in) << file;
  std::vector<std::vector<std::string>> lines;
  std::string line, word;
  for (std::getline(in, line); std::getline(in, line);) {
    std::istringstream words(line);
    lines.emplace_back();
    while (words >> word) lines.back().push_back(word);
  }
  EXPECT_FALSE(lines.empty()) << file;
  return lines;
}

QuantType format_of(const std::string& word) { return word == "nf4" ? QuantType::nf4 : QuantType::fp4; }
uint64_t hash_of(const std::string& word) { return std::stoull(word, nullptr, 16); }

void with_type(const std::string& word, const auto& body) {
  if (word == "f32") return body(float{});
  if (word == "f16") return body(Half{});
  body(BFloat16{});
}

const std::vector<float>& map_of(const std::string& word) {
  static const std::map<std::string, std::vector<float>> maps = {{"dynamic", create_dynamic_map()},
                                                                 {"dynamic_unsigned", create_dynamic_map(false)},
                                                                 {"linear", create_linear_map()},
                                                                 {"fp8", create_fp8_map()}};
  return maps.at(word);
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (size_t i = 0; i < std::min<size_t>(words.size(), 6); ++i) text += words[i] + " ";
  return text;
}

TEST(Golden, Quantize4bit) {
  for (const auto& w : golden("quantize_4bit.txt")) {
    SCOPED_TRACE(joined(w));
    with_type(w[1], [&]<class T>(T) {
      const int64_t n = std::stoll(w[4]), blocksize = std::stoll(w[5]);
      if (quick() && n > 1 << 18) return;
      const auto seed = std::stoull(w[3]);
      const auto x = w[2] == "patterns" ? patterns<T>(seed) : waves<T>(seed, n);
      ASSERT_EQ(static_cast<int64_t>(x.size()), n);
      for_each_isa([&] {
        const auto q = run_quantize_4bit(format_of(w[0]), x, blocksize);
        EXPECT_EQ(digest(q.codes), hash_of(w[6]));
        EXPECT_EQ(digest(q.absmax), hash_of(w[7]));
      });
    });
  }
}

TEST(Golden, Dequantize4bit) {
  for (const auto& w : golden("dequantize_4bit.txt")) {
    SCOPED_TRACE(joined(w));
    with_type(w[1], [&]<class T>(T) {
      const auto seed = std::stoull(w[2]);
      const int64_t n = std::stoll(w[3]), blocksize = std::stoll(w[4]);
      if (quick() && n > 1 << 18) return;
      const auto codes = random_bytes(seed, packed_size(n));
      const auto absmax = random_absmax(seed + 1, blocks_of(n, blocksize));
      for_each_isa([&] { EXPECT_EQ(digest(run_dequantize_4bit<T>(format_of(w[0]), codes, absmax, n, blocksize)), hash_of(w[5])); });
    });
  }
}

TEST(Golden, QuantizeBlockwise) {
  for (const auto& w : golden("quantize_blockwise.txt")) {
    SCOPED_TRACE(joined(w));
    with_type(w[1], [&]<class T>(T) {
      const auto x = waves<T>(std::stoull(w[2]), std::stoll(w[3]));
      for_each_isa([&] {
        const auto q = run_quantize_blockwise<T>(map_of(w[0]), x, std::stoll(w[4]));
        EXPECT_EQ(digest(q.codes), hash_of(w[5]));
        EXPECT_EQ(digest(q.absmax), hash_of(w[6]));
      });
    });
  }
}

TEST(Golden, DequantizeBlockwise) {
  for (const auto& w : golden("dequantize_blockwise.txt")) {
    SCOPED_TRACE(joined(w));
    with_type(w[1], [&]<class T>(T) {
      const auto seed = std::stoull(w[2]);
      const int64_t n = std::stoll(w[3]), blocksize = std::stoll(w[4]);
      const auto absmax = random_absmax(seed + 1, blocks_of(n, blocksize));
      for_each_isa(
          [&] { EXPECT_EQ(digest(run_dequantize_blockwise<T>(map_of(w[0]), random_bytes(seed, n), absmax, blocksize)), hash_of(w[5])); });
    });
  }
}

std::vector<float> made(const std::vector<std::string>& w) {
  const auto integer = [&](size_t i) { return std::stoi(w[i]); };
  if (w[0] == "4bit") return create_4bit_map(w[1]);
  if (w[0] == "dynamic") return create_dynamic_map(integer(1), integer(2), integer(3));
  if (w[0] == "linear") return create_linear_map(integer(1), integer(2), integer(3));
  if (w[0] == "normal") return create_normal_map(std::stod(w[1]), integer(2));
  if (w[0] == "fp8") return create_fp8_map(integer(1), integer(2), integer(3), integer(4));
  ADD_FAILURE() << "unknown maker " << w[0];
  return {};
}

TEST(Golden, Codebooks) {
  for (const auto& w : golden("codebooks.txt")) {
    const auto colon = static_cast<size_t>(std::ranges::find(w, ":") - w.begin());
    ASSERT_LT(colon, w.size());
    SCOPED_TRACE(joined({w.begin(), w.begin() + static_cast<std::ptrdiff_t>(colon)}));
    const auto values = made(w);
    ASSERT_EQ(values.size(), w.size() - colon - 1);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto expected = from_bits<float>(hash_of(w[colon + 1 + i]));
      EXPECT_EQ(values[i], expected) << "value " << i;  // -0.0 equals 0.0
    }
  }
}

#if !defined(BNB_TEST_DEVICE)
TEST(Golden, QuantizeInt8) {
  for (const auto& w : golden("int8_rows.txt")) {
    SCOPED_TRACE(joined(w));
    with_type(w[0], [&]<class T>(T) {
      const int64_t rows = std::stoll(w[2]), columns = std::stoll(w[3]);
      const auto x = waves<T>(std::stoull(w[1]), rows * columns);
      for_each_isa([&] {
        const auto q = run_quantize_int8(x, rows, columns, std::stof(w[4]));
        EXPECT_EQ(digest(q.codes), hash_of(w[5]));
        EXPECT_EQ(digest(q.scale), hash_of(w[6]));
        EXPECT_EQ(digest(q.outliers), hash_of(w[7]));
      });
    });
  }
}

TEST(Golden, DequantizeInt8) {
  for (const auto& w : golden("int8_dequantize.txt")) {
    SCOPED_TRACE(joined(w));
    const auto seed = std::stoull(w[0]);
    const int64_t rows = std::stoll(w[1]), columns = std::stoll(w[2]);
    const auto bytes = random_bytes(seed, rows * columns);
    const std::vector<int8_t> codes(bytes.begin(), bytes.end());
    const auto scale = random_absmax(seed + 1, rows);
    for_each_isa([&] {
      Output<float> out(rows * columns);
      dequantize_int8({rows, columns, codes, scale, out.view()});
      EXPECT_EQ(digest(out.values()), hash_of(w[3]));
    });
  }
}
#endif

}  // namespace
}  // namespace bnb::test

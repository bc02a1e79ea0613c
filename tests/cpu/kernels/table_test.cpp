// Every member of every table: a kernel's units of work are independent (all at once, or one by one, the last first), and the bytes are
// those of the scalar table, except for the order in which a 4-bit product adds. A member that has no case here is a failure.
#include <bnb/codebook.h>
#include <bnb/gemm.h>

#include <map>

#include "cases/cases.h"
#include "common/optim_rules.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/kernels.h"

namespace bnb::test {
namespace {

using cpu::Kernels, cpu::Range;
using Bytes = std::vector<std::byte>;

template <class T> void append(Bytes& to, const std::vector<T>& values) {
  const size_t at = to.size(), bytes = values.size() * sizeof(T);
  to.resize(at + bytes);
  if (bytes) std::memcpy(to.data() + at, values.data(), bytes);
}
size_t size(int64_t n) { return static_cast<size_t>(n); }

// Units [0, units) in the ranges of one call or of many: f(Range).
struct Parts {
  bool one_by_one;
  template <class F> void operator()(int64_t units, F&& f, int64_t each = 1) const {
    if (!one_by_one) return f(Range{0, units});
    for (int64_t end = units; end > 0; end = (end - 1) / each * each) f(Range{(end - 1) / each * each, end});
  }
};
using Case = std::function<Bytes(const Kernels&, Parts)>;

template <class D> void multiply(const cpu::Product<D>& product, const D& d, Parts parts) {
  std::vector<std::byte> memory(size(product.pack_bytes(d)) + 64);
  std::byte* packed = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  parts(product.pack_units(d), [&](Range units) { product.pack(d, packed, units); });
  parts(d.n, [&](Range columns) { product.run(d, packed, columns); }, product.column_step);
}

constexpr int64_t kElements = 1000, kBlock = 64, kBlocks = 16, kRows = 9, kColumns = 150, kDepth = 192;

Bytes optimizer(const Kernels& kernels, Parts parts, Optimizer rule, bool coded, bool norms) {
  constexpr int64_t n = 5 * kOptimizerBlock - 7, blocks = 5;
  auto p = normals(50, n), g = normals(51, n), first = normals(52, 2 * n), second = normals(53, n);
  for (auto* state : {&first, &second})
    for (float& s : *state) s = std::fabs(s) * 1e-2f;
  auto codes1 = random_bytes(54, 2 * n), codes2 = random_bytes(55, n);
  auto absmax1 = random_absmax(56, 2 * blocks), absmax2 = absmax1;
  const auto map1 = create_dynamic_map(true), map2 = create_dynamic_map(false);
  const auto encoder1 = cpu::encoder_for(map1, 1 << 20), encoder2 = cpu::encoder_for(map2, 1 << 20);
  for (float& a : absmax1) a = std::min(a, 1.0f);
  for (float& a : absmax2) a = std::min(a, 1.0f);
  OptimizerTensor tensor{.p = {p.data(), DType::f32, n}, .g = {g.data(), DType::f32, n}, .step = 3};
  if (coded)
    tensor.codes1 = codes1, tensor.codes2 = codes2, tensor.absmax1 = absmax1, tensor.absmax2 = absmax2;
  else
    tensor.state1 = first, tensor.state2 = second;
  OptimizerConfig config;
  config.rule = rule;
  const Hyper hyper = hyper_at(config, tensor.step, 1);
  const bool has_second = has_second_state(rule);
  const cpu::OptimizerTask task{.tensor = &tensor,
                                .rule = rule,
                                .hyper = hyper,
                                .rate = -hyper.rate,
                                .encoder1 = coded ? encoder1.get() : nullptr,
                                .encoder2 = coded ? (has_second ? encoder2.get() : encoder1.get()) : nullptr,
                                .code1 = map1.data(),
                                .code2 = has_second ? map2.data() : map1.data(),
                                .seed = {}};
  std::vector<double> sums(2 * blocks);
  if (norms)
    for (int64_t b = 0; b < blocks; ++b) {  // sums of several blocks depend on their order
      double of_block[2] = {};
      kernels.optimizer_norms(task, {b, b + 1}, of_block);
      sums[size(2 * b)] = of_block[0], sums[size(2 * b + 1)] = of_block[1];
    }
  else
    parts(blocks, [&](Range range) { kernels.optimizer_step(task, range); });
  Bytes result;
  append(result, p), append(result, first), append(result, second), append(result, codes1), append(result, codes2);
  append(result, absmax1), append(result, absmax2), append(result, sums);
  return result;
}
Bytes optimizers(const Kernels& kernels, Parts parts, bool norms) {
  Bytes result;
  for (int rule = 0; rule < kOptimizers; ++rule)
    for (const bool coded : {false, true}) {
      const auto one = optimizer(kernels, parts, static_cast<Optimizer>(rule), coded, norms);
      result.insert(result.end(), one.begin(), one.end());
    }
  return result;
}

std::vector<int8_t> signed_bytes(uint64_t seed, int64_t n) {
  const auto bytes = random_bytes(seed, n);
  return {bytes.begin(), bytes.end()};
}

const std::map<std::string_view, Case>& cases() {
  static const std::map<std::string_view, Case> all = {
      {"quantize_4bit",
       [](const Kernels& kernels, Parts parts) {
         Bytes result;
         for (const auto type : kFormats) {
           const auto x = rounded_all<BFloat16>(normals(60, kElements));
           std::vector<uint8_t> codes(size(packed_size(kElements)));
           std::vector<float> absmax(kBlocks);
           const Quantize4bit d{
               .type = type, .blocksize = kBlock, .x = {x.data(), DType::bf16, kElements}, .codes = codes, .absmax = absmax};
           parts(kBlocks, [&](Range blocks) { kernels.quantize_4bit(d, blocks); });
           append(result, codes), append(result, absmax);
         }
         return result;
       }},
      {"dequantize_4bit",
       [](const Kernels& kernels, Parts parts) {
         Bytes result;
         for (const auto stores : {cpu::Stores::cached, cpu::Stores::streaming}) {
           const auto codes = random_bytes(61, packed_size(kElements));
           const auto absmax = random_absmax(62, kBlocks);
           std::vector<Half> out(kElements + 32);
           Half* to = out.data() + (64 - reinterpret_cast<uintptr_t>(out.data()) % 64) % 64 / sizeof(Half);
           const Dequantize4bit d{.blocksize = kBlock, .codes = codes, .absmax = absmax, .out = {to, DType::f16, kElements}};
           parts(kBlocks, [&](Range blocks) { kernels.dequantize_4bit(d, stores, blocks); });
           append(result, std::vector<Half>(to, to + kElements));
         }
         return result;
       }},
      {"quantize_blockwise",
       [](const Kernels& kernels, Parts parts) {
         Bytes result;
         for (const auto& map : {create_dynamic_map(true), create_dynamic_map(false), create_linear_map(true)}) {
           const auto x = normals(63, kElements);
           std::vector<uint8_t> codes(kElements);
           std::vector<float> absmax(kBlocks);
           const QuantizeBlockwise d{
               .blocksize = kBlock, .code = map, .x = {x.data(), DType::f32, kElements}, .codes = codes, .absmax = absmax};
           const auto encoder = cpu::encoder_for(map, kElements);
           parts(kBlocks, [&](Range blocks) { kernels.quantize_blockwise(d, *encoder, blocks); });
           append(result, codes), append(result, absmax);
         }
         return result;
       }},
      {"dequantize_blockwise",
       [](const Kernels& kernels, Parts parts) {
         const auto codes = random_bytes(64, kElements);
         const auto absmax = random_absmax(65, kBlocks), map = create_dynamic_map(true);
         std::vector<BFloat16> out(kElements);
         const DequantizeBlockwise d{
             .blocksize = kBlock, .code = map, .codes = codes, .absmax = absmax, .out = {out.data(), DType::bf16, kElements}};
         parts(kBlocks, [&](Range blocks) { kernels.dequantize_blockwise(d, cpu::Stores::cached, blocks); });
         Bytes result;
         append(result, out);
         return result;
       }},
      {"gemm_4bit",
       [](const Kernels& kernels, Parts parts) {
         const auto a = normals(66, kRows * kDepth), bias = normals(67, kColumns);
         const auto codes = random_bytes(68, kColumns * kDepth / 2);
         const std::vector<float> absmax(size(kColumns * kDepth / kBlock), 0.5f);
         std::vector<float> y(size(kRows * kColumns));
         Gemm4bit d{
             .blocksize = kBlock, .m = kRows, .n = kColumns, .k = kDepth, .a = {a.data(), DType::f32, kRows * kDepth}, .codes = codes};
         d.absmax.values = absmax;
         d.bias = {bias.data(), DType::f32, kColumns};
         d.out = {y.data(), DType::f32, kRows * kColumns};
         multiply(kernels.gemm_4bit, d, parts);
         Bytes result;
         append(result, y);
         return result;
       }},
      {"quantize_int8",
       [](const Kernels& kernels, Parts parts) {
         const auto x = normals(69, kRows * kColumns);
         std::vector<int8_t> codes(x.size());
         std::vector<float> scale(kRows);
         std::vector<uint64_t> outliers(size(outlier_words(kColumns)));
         const QuantizeInt8 d{.rows = kRows,
                              .columns = kColumns,
                              .x = {x.data(), DType::f32, kRows * kColumns},
                              .threshold = 2.5f,
                              .codes = codes,
                              .scale = scale,
                              .outliers = outliers};
         parts(kRows, [&](Range rows) { kernels.quantize_int8(d, outliers.data(), rows); });
         for (size_t i = 0; i < codes.size(); ++i)
           if (std::fabs(x[i]) >= d.threshold) codes[i] = 0;  // those of outliers are undefined
         Bytes result;
         append(result, codes), append(result, scale), append(result, outliers);
         return result;
       }},
      {"quantize_columns_int8",
       [](const Kernels& kernels, Parts parts) {
         const auto x = normals(70, kRows * kColumns);
         std::vector<int8_t> codes(x.size());
         std::vector<float> scale(kColumns);
         const QuantizeColumnsInt8 d{.rows = kRows,
                                     .columns = kColumns,
                                     .x = {x.data(), DType::f32, kRows * kColumns},
                                     .threshold = 2.5f,
                                     .codes = codes,
                                     .scale = scale};
         parts(kColumns, [&](Range columns) { kernels.quantize_columns_int8(d, columns); }, cpu::kInt8Columns);
         Bytes result;
         append(result, codes), append(result, scale);
         return result;
       }},
      {"dequantize_int8",
       [](const Kernels& kernels, Parts parts) {
         const auto codes = signed_bytes(71, kRows * kColumns);
         const auto scale = random_absmax(72, kRows);
         std::vector<Half> out(codes.size());
         const DequantizeInt8 d{
             .rows = kRows, .columns = kColumns, .codes = codes, .scale = scale, .out = {out.data(), DType::f16, kRows * kColumns}};
         parts(kRows, [&](Range rows) { kernels.dequantize_int8(d, rows); });
         Bytes result;
         append(result, out);
         return result;
       }},
      {"dequantize_sums",
       [](const Kernels& kernels, Parts parts) {
         std::vector<int32_t> sums(size(kRows * kColumns));
         for (size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<int32_t>(random(73, i)) >> 8;
         const auto rows = random_absmax(74, kRows), columns = random_absmax(75, kColumns), bias = normals(76, kColumns);
         std::vector<BFloat16> out(sums.size());
         DequantizeSums d{.m = kRows, .n = kColumns, .sums = sums};
         d.to = {.row_scale = rows,
                 .column_scale = columns,
                 .bias = {bias.data(), DType::f32, kColumns},
                 .out = {out.data(), DType::bf16, kRows * kColumns}};
         parts(kRows, [&](Range range) { kernels.dequantize_sums(d, range); });
         Bytes result;
         append(result, out);
         return result;
       }},
      {"gemm_int8",
       [](const Kernels& kernels, Parts parts) {
         const auto a = signed_bytes(77, kRows * kDepth), b = signed_bytes(78, kColumns * kDepth);
         std::vector<int32_t> sums(size(kRows * kColumns));
         multiply(kernels.gemm_int8, GemmInt8{.m = kRows, .n = kColumns, .k = kDepth, .a = a, .b = b, .sums = sums}, parts);
         Bytes result;
         append(result, sums);
         return result;
       }},
      {"optimizer_step", [](const Kernels& kernels, Parts parts) { return optimizers(kernels, parts, false); }},
      {"optimizer_norms", [](const Kernels& kernels, Parts parts) { return optimizers(kernels, parts, true); }},
  };
  return all;
}

// As floats, near to each other.
void expect_near(const Bytes& actual, const Bytes& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); i += sizeof(float)) {
    float a, e;
    std::memcpy(&a, &actual[i], sizeof(a)), std::memcpy(&e, &expected[i], sizeof(e));
    ASSERT_NEAR(a, e, 1e-4) << "element " << i / sizeof(float);
  }
}

TEST(Tables, EveryKernelOfEveryTable) {
  const Kernels& scalar = *cpu::supported().back();
  cpu::for_each_kernel(scalar, [&](std::string_view name, const auto&) {
    ASSERT_TRUE(cases().contains(name)) << name << " has no case";
    SCOPED_TRACE(name);
    const Case& run = cases().at(name);
    const Bytes expected = run(scalar, {false});
    for (const Kernels* kernels : cpu::supported()) {
      SCOPED_TRACE(kernels->isa);
      const Bytes whole = run(*kernels, {false});
      EXPECT_TRUE(same(run(*kernels, {true}), whole)) << "other bytes unit by unit";
      if (name == "gemm_4bit")
        ASSERT_NO_FATAL_FAILURE(expect_near(whole, expected));
      else
        ASSERT_TRUE(same(whole, expected)) << "other bytes than scalar";
    }
  });
  EXPECT_EQ(cases().size(), std::tuple_size_v<decltype(cpu::kKernelMembers)>) << "a case of no member";
}

}  // namespace
}  // namespace bnb::test

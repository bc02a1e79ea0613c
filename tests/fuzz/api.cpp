#include "fuzz/api.h"

#include <cmath>

#include "fuzz/call.h"

namespace bnb::fuzz {
namespace {

void blockwise(Memory& memory, Bytes& bytes) {
  Call c{memory, bytes};
  const int64_t n = bytes.below(bytes.flip() ? 80 : 5000), blocksize = c.blocksize();
  const int64_t blocks = blocksize > 0 ? blocks_of(n, blocksize) : 0;
  switch (bytes.below(4)) {
    case 0: {
      const Quantize4bit d{c.format(), blocksize, c.elements(n, c.dtype(), false), c.out<uint8_t>(packed_size(n)), c.out<float>(blocks)};
      return c.run("quantize_4bit", true, [&] { quantize_4bit(d); });
    }
    case 1: {
      const Dequantize4bit d{c.format(), blocksize, c.in<uint8_t>(packed_size(n)), c.in<float>(blocks), c.elements(n, c.dtype(), true)};
      return c.run("dequantize_4bit", true, [&] { dequantize_4bit(d); });
    }
    case 2: {
      const QuantizeBlockwise d{blocksize, c.map(bytes.flip()), c.elements(n, c.dtype(), false), c.out<uint8_t>(n), c.out<float>(blocks)};
      return c.run("quantize_blockwise", true, [&] { quantize_blockwise(d); });
    }
    default: {
      const DequantizeBlockwise d{blocksize, c.map(bytes.flip()), c.in<uint8_t>(n), c.in<float>(blocks), c.elements(n, c.dtype(), true)};
      return c.run("dequantize_blockwise", true, [&] { dequantize_blockwise(d); });
    }
  }
}

struct Shape {
  int64_t m, n, k;
};
// Operands of at most some 40 KiB.
Shape shape(Bytes& bytes, int64_t bytes_of_a_weight) {
  const int64_t k = bytes.below(bytes.flip() ? 70 : 600);
  const int64_t most = Memory::kMost / 4 * bytes_of_a_weight / std::max<int64_t>(1, k);
  return {bytes.below(std::min<int64_t>(40, most + 1)), bytes.below(std::min<int64_t>(120, most + 1)), k};
}

void gemm(Memory& memory, Bytes& bytes) {
  Call c{memory, bytes};
  const auto [m, n, k] = shape(bytes, 1);
  Gemm4bit d{.type = c.format(), .blocksize = c.blocksize(), .m = c.size(m), .n = c.size(n), .k = c.size(k)};
  const int64_t blocks = d.blocksize > 0 ? blocks_of(n * k, d.blocksize) : 0;
  const DType type = c.dtype();
  d.a = c.elements(m * k, type, false);
  d.codes = c.in<uint8_t>(packed_size(n * k));
  if (bytes.flip()) {
    d.absmax.nested_blocksize = bytes.flip() ? 256 : c.blocksize();
    d.absmax.codes = c.in<uint8_t>(blocks);
    d.absmax.code = c.map(true);
    d.absmax.nested = c.in<float>(d.absmax.nested_blocksize > 0 ? blocks_of(blocks, d.absmax.nested_blocksize) : 0);
    d.absmax.offset = bytes.raw<float>();
  } else {
    d.absmax.values = c.in<float>(blocks);
  }
  d.bias = c.bias(n);
  d.out = c.elements(m * n, bytes.rarely() ? c.dtype() : type, true);
  d.batch_invariant = bytes.flip();
  c.run("gemm_4bit", false, [&] { gemm_4bit(d); });
}

void int8(Memory& memory, Bytes& bytes) {
  Call c{memory, bytes};
  const auto [m, n, k] = shape(bytes, 1);
  const float threshold = bytes.flip() ? 0 : bytes.flip() ? 6.0f : bytes.raw<float>();
  const auto epilogue = [&, m = m, n = n] {
    return Int8Epilogue{c.in<float>(m), c.in<float>(n), c.bias(n), c.elements(m * n, c.dtype(), true)};
  };
  switch (bytes.below(6)) {
    case 0: {
      const QuantizeInt8 d{c.size(m),
                           c.size(k),
                           c.elements(m * k, c.dtype(), false),
                           threshold,
                           c.out<int8_t>(m * k),
                           c.out<float>(m),
                           c.out<uint64_t>(outlier_words(k))};
      return c.run("quantize_int8", true, [&] { quantize_int8(d); });
    }
    case 1: {
      const QuantizeColumnsInt8 d{c.size(m),      c.size(k), c.elements(m * k, c.dtype(), false), threshold, c.out<int8_t>(m * k),
                                  c.out<float>(k)};
      return c.run("quantize_columns_int8", true, [&] { quantize_columns_int8(d); });
    }
    case 2: {
      const DequantizeInt8 d{c.size(m), c.size(k), c.in<int8_t>(m * k), c.in<float>(m), c.elements(m * k, c.dtype(), true)};
      return c.run("dequantize_int8", true, [&] { dequantize_int8(d); });
    }
    case 3: {
      const DequantizeSums d{c.size(m), c.size(n), c.in<int32_t>(m * n), epilogue()};
      return c.run("dequantize_sums", true, [&] { dequantize_sums(d); });
    }
    case 4: {
      GemmInt8 d{.m = c.size(m), .n = c.size(n), .k = c.size(k), .a = c.in<int8_t>(m * k), .b = c.in<int8_t>(n * k)};
      if (bytes.flip()) {
        d.sums = c.out<int32_t>(m * n);
      } else {
        d.to = epilogue();
        if (bytes.flip()) {
          const int64_t count = bytes.below(std::clamp<int64_t>(k, 1, 40));
          auto* columns = memory.take<int64_t>(bytes, count, false);
          for (int64_t i = 0; i < count; ++i) columns[i] = bytes.rarely() ? bytes.number() : i * (k / count);
          d.outliers = {columns, static_cast<size_t>(count)};
          d.x = c.elements(m * k, c.dtype(), false);
        }
      }
      return c.run("gemm_int8", true, [&] { gemm_int8(d); });
    }
    default: {
      const LinearInt8 d{c.size(m),           c.size(n),      c.size(k), c.elements(m * k, c.dtype(), false), threshold,
                         c.in<int8_t>(n * k), c.in<float>(n), c.bias(n), c.elements(m * n, c.dtype(), true)};
      return c.run("linear_int8", true, [&] { linear_int8(d); });
    }
  }
}

void optimizers(Memory& memory, Bytes& bytes) {
  Call c{memory, bytes};
  const auto rule = static_cast<Optimizer>(bytes.rarely() ? bytes.byte() : bytes.below(kOptimizers));
  OptimizerConfig config{.rule = rule};
  const auto change = [&](double& x) {
    if (bytes.byte() < 40) x = bytes.flip() ? bytes.raw<double>() : bytes.byte() / 64.0 - 0.5;
  };
  for (double* x : {&config.lr, &config.beta1, &config.beta2, &config.beta3, &config.alpha, &config.eps, &config.weight_decay,
                    &config.max_unorm, &config.dampening})
    change(*x);
  if (bytes.flip()) config.max_unorm = 0;
  if (bytes.rarely()) config.t_alpha = bytes.number(), config.t_beta3 = bytes.number();
  const uint8_t flags = bytes.byte();
  config.skip_zeros = flags & 1, config.nesterov = flags & 2, config.bias_correction = flags & 4, config.coupled_decay = flags & 8;
  if (flags & 16) config.seed = bytes.raw<uint64_t>();
  const bool second = has_second_state(rule);
  std::vector<OptimizerTensor> tensors(static_cast<size_t>(bytes.below(4)));
  for (auto& t : tensors) {
    const int64_t n = bytes.below(bytes.flip() ? 40 : 1200), first = first_states(rule), blocks = blocks_of(n, kOptimizerBlock);
    t.p = c.elements(n, c.dtype(), true);
    t.g = c.elements(n, c.dtype(), false);
    if (bytes.flip()) {
      t.codes1 = c.out<uint8_t>(first * n), t.absmax1 = c.out<float>(first * blocks);
      if (second) t.codes2 = c.out<uint8_t>(n), t.absmax2 = c.out<float>(blocks);
    } else {
      t.state1 = c.out<float>(first * n);
      if (second) t.state2 = c.out<float>(n);
    }
    t.step = bytes.rarely() ? bytes.number() : 1 + bytes.below(3000);
    if (bytes.rarely()) t.gnorm_scale = bytes.raw<float>();
    if (bytes.rarely()) t.p_norm = bytes.raw<float>();
    t.offset = bytes.rarely() ? bytes.number() : 0;
    if (bytes.flip()) t.u_norm = memory.take<float>(bytes, 1, true);
  }
  const OptimizerStep s{config, tensors, c.map(true), c.map(false)};
  c.run("optimizer_step", true, [&] { optimizer_step(s); });
}

void codebooks(Memory&, Bytes& bytes) {
  const auto small = [&] { return bytes.rarely() ? static_cast<int>(bytes.number()) : static_cast<int>(bytes.below(12)) - 1; };
  const bool is_signed = bytes.flip();
  const int a = small(), b = small(), total = small();
  const auto check = [](std::string_view op, auto&& make, size_t size, bool ascending = false) {
    try {
      const std::vector<float> values = make();
      if (values.size() != size) throw Fault(std::string(op) + ": " + std::to_string(values.size()) + " values");
      for (const float v : values)
        if (!std::isfinite(v)) throw Fault(std::string(op) + ": " + std::to_string(v));
      if (ascending && !std::is_sorted(values.begin(), values.end())) throw Fault(std::string(op) + ": not ascending");
    } catch (const Error& e) {
      if (!std::string_view(e.what()).starts_with(std::string(op) + ": ")) throw Fault(e.what());
    }
  };
  switch (bytes.below(5)) {
    case 0: {
      std::string name(bytes.one_of({"nf4", "fp4", "int4", "af4", "", "nf4 "}));
      if (bytes.rarely()) name += static_cast<char>(bytes.byte());
      return check("create_4bit_map", [&] { return create_4bit_map(name); }, 16);
    }
    case 1: return check("create_dynamic_map", [&] { return create_dynamic_map(is_signed, a, total); }, 256, true);
    case 2: return check("create_linear_map", [&] { return create_linear_map(is_signed, total, a > b); }, 256);
    case 3: {
      const double offset = bytes.flip() ? 0.5 + bytes.byte() / 512.0 : bytes.raw<double>();
      return check("create_normal_map", [&] { return create_normal_map(offset, is_signed); }, 256, true);
    }
    default: return check("create_fp8_map", [&] { return create_fp8_map(is_signed, a, b, total); }, 256, true);
  }
}

constexpr Target kTargets[] = {{"blockwise", blockwise},   {"gemm", gemm},           {"int8", int8},
                               {"optimizers", optimizers}, {"codebooks", codebooks}, {"values", values}};

}  // namespace

std::span<const Target> targets() { return kTargets; }

void run(const Target& target, std::span<const uint8_t> given) {
  static Memory& memory = *new Memory;
  memory.clear();
  Bytes bytes(given);
  target.run(memory, bytes);
}

}  // namespace bnb::fuzz

// Arithmetic and the operations of products (cpu/isa/isa.h) against plain code, on odd values: of what the machine has, and of vec4.
#include <bnb/codebook.h>

#include "common/formats.h"
#include "cpu/isa/ops_cases.h"

namespace bnb::test {
namespace {

constinit const Ops* g_first = nullptr;

TEST(Ops, EveryInstructionSetIsHere) {
  for (const auto isa : supported_isas()) {
    bool found = false;
    for (const Ops* ops = first_ops(); ops; ops = ops->next) found |= ops->isa == isa;
    EXPECT_TRUE(found) << isa << " has no bnb_ops(..) in tests/CMakeLists.txt";
  }
}

// ---- arithmetic
void expect_lanes(const Ops& ops, const Vector& y, const std::function<float(int)>& expected,
                  const std::function<std::string(int)>& of_what) {
  for (int i = 0; i < ops.lanes; ++i) {
    const float e = expected(i);
    ASSERT_TRUE(alike(y.at[i], e)) << std::hexfloat << y.at[i] << ", expected " << e << " of " << of_what(i);
  }
}
std::string hex(float x) { return rc::toString(x) + " = " + std::to_string(bits_of(x)); }

using Unary = void (*)(const float*, float*);
void expect_unary(Unary Ops::* op, float (*plain)(float)) {
  for_each_ops([&](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      const Vector a(20, round);
      Vector y;
      (ops.*op)(a.at, y.at);
      ASSERT_NO_FATAL_FAILURE(expect_lanes(ops, y, [&](int i) { return plain(a.at[i]); }, [&](int i) { return hex(a.at[i]); }));
    }
  });
}
using Binary = void (*)(const float*, const float*, float*);
void expect_binary(Binary Ops::* op, float (*plain)(float, float)) {
  for_each_ops([&](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      const Vector a(21, round), b(22, round);
      Vector y;
      (ops.*op)(a.at, b.at, y.at);
      ASSERT_NO_FATAL_FAILURE(expect_lanes(
          ops, y, [&](int i) { return plain(a.at[i], b.at[i]); }, [&](int i) { return hex(a.at[i]) + " and " + hex(b.at[i]); }));
    }
  });
}
using Ternary = void (*)(const float*, const float*, const float*, float*);
void expect_ternary(Ternary Ops::* op, const std::function<float(float, float, float, float)>& plain) {
  for_each_ops([&](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      const Vector a(23, round), b(24, round), c(25, round);
      Vector y;
      (ops.*op)(a.at, b.at, c.at, y.at);
      ASSERT_NO_FATAL_FAILURE(expect_lanes(
          ops, y, [&](int i) { return plain(a.at[i], b.at[i], c.at[i], y.at[i]); },
          [&](int i) { return hex(a.at[i]) + ", " + hex(b.at[i]) + ", " + hex(c.at[i]); }));
    }
  });
}

TEST(Ops, Sqrt) {
  expect_unary(&Ops::sqrt, [](float x) { return std::sqrt(x); });
}
TEST(Ops, Sign) {
  expect_unary(&Ops::sign, [](float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; });
}
TEST(Ops, Add) {
  expect_binary(&Ops::add, [](float a, float b) { return a + b; });
}
TEST(Ops, Mul) {
  expect_binary(&Ops::mul, [](float a, float b) { return a * b; });
}
TEST(Ops, Div) {
  expect_binary(&Ops::div, [](float a, float b) { return a / b; });
}
TEST(Ops, MinGivesTheSecondIfNotLess) {
  expect_binary(&Ops::min, [](float a, float b) { return a < b ? a : b; });
}
TEST(Ops, MaxGivesTheSecondIfNotGreater) {
  expect_binary(&Ops::max, [](float a, float b) { return a > b ? a : b; });
}
TEST(Ops, FmaRoundsOnce) {
  expect_ternary(&Ops::fma, [](float a, float b, float c, float) { return std::fma(a, b, c); });
}
TEST(Ops, MulAddRoundsOnceOrTwice) {
  expect_ternary(&Ops::mul_add, [](float a, float b, float c, float y) {
    const float product = a * b, twice = product + c;
    return alike(y, twice) ? twice : std::fma(a, b, c);
  });
}
TEST(Ops, FiniteAndSelect) {
  expect_ternary(&Ops::finite, [](float x, float a, float b, float) { return std::isfinite(x) ? a : b; });
}
TEST(Ops, NonzeroAndMask) {
  for_each_ops([](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      const Vector m(26, round), x(27, round), a(28, round, finite_odd), b(29, round, finite_odd);
      Vector y;
      ops.finite_and_nonzero(m.at, x.at, a.at, b.at, y.at);
      ASSERT_NO_FATAL_FAILURE(expect_lanes(
          ops, y, [&](int i) { return std::isfinite(m.at[i]) && x.at[i] != 0 ? a.at[i] : b.at[i]; },
          [&](int i) { return hex(m.at[i]) + ", " + hex(x.at[i]); }));
    }
  });
}
TEST(Ops, MaxMagnitudeSkipsNan) {
  for_each_ops([](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      Vector most(30, round, [](uint64_t seed, uint64_t i) { return std::fabs(finite_odd(seed, i)); });
      const Vector x(31, round, [](uint64_t seed, uint64_t i) {
        const float v = odd(seed, i);
        return std::isnan(v) ? NAN : v;
      });
      Vector y;
      ops.max_magnitude(most.at, x.at, y.at);
      ASSERT_NO_FATAL_FAILURE(expect_lanes(
          ops, y, [&](int i) { return std::fabs(x.at[i]) > most.at[i] ? std::fabs(x.at[i]) : most.at[i]; },
          [&](int i) { return hex(most.at[i]) + ", " + hex(x.at[i]); }));
      most.at[round % static_cast<uint64_t>(ops.lanes)] *= 1e6f;
      ASSERT_EQ(ops.greatest(most.at), *std::max_element(most.at, most.at + ops.lanes));
    }
  });
}
TEST(Ops, ConstantsAndIntegers) {
  for_each_ops([](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      int32_t n[kMostLanes];
      for (uint64_t i = 0; i < kMostLanes; ++i) n[i] = static_cast<int32_t>(random(32, round * kMostLanes + i)) >> (round % 32);
      Vector y, zero(33), all;
      ops.load_integers(n, y.at);
      const float x = odd(34, round);
      ops.constants(x, zero.at, all.at);
      for (int i = 0; i < ops.lanes; ++i) {
        ASSERT_EQ(y.at[i], static_cast<float>(n[i])) << n[i];
        ASSERT_EQ(bits_of(zero.at[i]), 0u);
        ASSERT_TRUE(alike(all.at[i], x));
      }
    }
  });
}

// ---- products. Small integers, so that any order of a sum is exact.
TEST(Ops, AddLanes) {
  for_each_ops([](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds; ++round) {
      float v[4 * kMostLanes], sums[5], before[4];
      for (uint64_t i = 0; i < std::size(v); ++i) v[i] = static_cast<float>(random(35, round * 64 + i) % 2001) - 1000;
      for (int i = 0; i < 4; ++i) before[i] = sums[i] = static_cast<float>(i * 100 - 50);
      sums[4] = 77;
      const bool first = round % 2 == 0;
      ops.add_lanes(v, first, sums);
      for (int i = 0; i < 4; ++i) {
        float expected = first ? 0 : before[i];
        for (int j = 0; j < ops.lanes; ++j) expected += v[i * ops.lanes + j];
        ASSERT_EQ(sums[i], expected) << i;
      }
      ASSERT_EQ(sums[4], 77);
    }
  });
}
TEST(Ops, NestedRoundsTwice) {
  for_each_ops([](const Ops& ops) {
    const auto map = create_dynamic_map(true);
    for (uint64_t round = 0; round < kRounds; ++round) {
      const auto codes = random_bytes(round + 1, kMostLanes);
      const float scale = std::fabs(finite_odd(36, round)), offset = finite_odd(37, round);
      Vector y;
      ops.nested(map.data(), codes.data(), scale, offset, y.at);
      for (int i = 0; i < ops.lanes; ++i) {
        const float scaled = map[codes[static_cast<size_t>(i)]] * scale;
        ASSERT_TRUE(alike(y.at[i], scaled + offset));
      }
    }
  });
}
TEST(Ops, DecodesStates) {
  for_each_ops([](const Ops& ops) {
    std::vector<float> any(256);
    for (uint64_t i = 0; i < 256; ++i) any[i] = finite_odd(38, i);
    const auto dynamic = create_dynamic_map(true);
    for (const bool is_dynamic : {false, true}) {
      const auto& map = is_dynamic ? dynamic : any;
      for (uint64_t round = 0; round < 64; ++round) {
        auto codes = random_bytes(round + 1, 64);
        for (size_t i = 0; i < 64; ++i)
          if (round < 4) codes[i] = static_cast<uint8_t>(64 * round + i);
        const float absmax = kScales[round % std::size(kScales)];
        float y[64];
        ops.decode_state[is_dynamic](map.data(), codes.data(), absmax, y);
        for (size_t i = 0; i < 64; ++i)
          ASSERT_EQ(bits_of(y[i]), bits_of(map[codes[i]] * absmax)) << "code " << int{codes[i]} << " * " << absmax;
      }
    }
  });
}
TEST(Ops, Bf16Dot) {
  for_each_ops([](const Ops& ops) {
    if (!ops.bf16_weights) return;
    for (uint64_t round = 0; round < 300; ++round) {
      const auto codes = random_bytes(round + 1, kGroup / 2);
      const float scale[] = {1.0f + static_cast<float>(round % 7), round % 2 ? 0.3f : 2.0f};
      BFloat16 x[kGroup];
      for (uint64_t i = 0; i < kGroup; ++i) x[i] = bnb::rounded<BFloat16>(static_cast<float>(random(39, round * kGroup + i) % 2001) - 1000);
      uint16_t w[kGroup], v[kGroup];
      ops.bf16_weights(Nf4::values.data(), codes.data(), scale[0], scale[1], w);
      ops.bf16_permute(x, v);
      double sum[2] = {}, size[2] = {};
      for (int e = 0; e < kGroup; ++e) {
        const float value = reference::value_of(QuantType::nf4, codes[static_cast<size_t>(e / 2)] >> (e % 2 ? 0 : 4) & 15);
        const int at = (e % 2 ^ 1) * kGroup / 2 + e / 2;  // byte j in lane j, odd elements first
        ASSERT_EQ(w[at], bnb::rounded<BFloat16>(value * scale[e >= kGroup / 2]).bits) << e;
        ASSERT_EQ(v[at], x[e].bits) << e;
        for (const bool split : {false, true}) {
          const double p = to_double(bnb::rounded<BFloat16>(value * scale[split && e >= kGroup / 2])) * to_double(x[e]);
          sum[split] += p, size[split] += std::fabs(p);
        }
      }
      for (const bool split : {false, true})
        ASSERT_NEAR(ops.bf16_dot[split](Nf4::values.data(), codes.data(), scale[0], scale[1], x), sum[split], 1e-6 * size[split]);
    }
  });
}
TEST(Ops, Int8Dot) {
  for_each_ops([](const Ops& ops) {
    const auto step = static_cast<int64_t>(ops.step), stride = step + 3;
    for (uint64_t round = 0; round < kRounds; ++round) {
      const int64_t n = round % 2 ? step : 1 + static_cast<int64_t>(random(40, round) % static_cast<uint64_t>(step));
      std::vector<int8_t> a(static_cast<size_t>(step)), b(static_cast<size_t>(4 * stride));
      const auto byte = [&](uint64_t seed, size_t i) {
        const auto r = random(seed + round, i);
        return static_cast<int8_t>(r % 4 ? r >> 8 : r & 4 ? -128 : 127);
      };
      for (size_t i = 0; i < b.size(); ++i) b[i] = byte(41000, i);
      int32_t sum_of_a = 0;
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) a[i] = byte(1000000, i), sum_of_a += a[i];
      int32_t sums[4];
      ops.dot(a.data(), b.data(), stride, n, sums);
      for (int64_t i = 0; i < 4; ++i) {
        int32_t expected = ops.shifted ? 128 * sum_of_a : 0;
        for (int64_t k = 0; k < n; ++k) expected += a[static_cast<size_t>(k)] * b[static_cast<size_t>(i * stride + k)];
        ASSERT_EQ(sums[i], expected) << "row " << i << ", the first " << n << " of " << step;
      }
    }
  });
}
TEST(Ops, Int8ByLanes) {
  for_each_ops([](const Ops& ops) {
    ASSERT_EQ(ops.add_bytes != nullptr, ops.shifted);
    ASSERT_EQ(ops.put_rows != nullptr, ops.lanes > 1);
    for (uint64_t round = 0; round < 500; ++round) {
      const auto line = random_bytes(round + 1, 64);
      if (ops.add_bytes) {
        int32_t sum = 0;
        for (const uint8_t byte : line) sum += static_cast<int8_t>(byte);
        ASSERT_EQ(ops.add_bytes(reinterpret_cast<const int8_t*>(line.data())), sum);
      }
      if (!ops.put_rows) continue;
      int32_t word, all[kMostLanes], v[4 * kMostLanes], rows[kMostLanes * 6];
      std::memcpy(&word, line.data() + 1, sizeof(word));
      ops.broadcast(line.data() + 1, all);
      for (int i = 0; i < ops.lanes; ++i) ASSERT_EQ(all[i], word);
      for (size_t i = 0; i < std::size(v); ++i) v[i] = static_cast<int32_t>(random(42 + round, i));
      for (int32_t& x : rows) x = -5;
      ops.put_rows(v, rows, 6);
      for (int i = 0; i < ops.lanes; ++i)
        for (int j = 0; j < 6; ++j) ASSERT_EQ(rows[6 * i + j], j < 4 ? v[j * ops.lanes + i] : -5) << i << ", " << j;
    }
  });
}

}  // namespace

const Ops* first_ops() { return g_first; }

void enter(Ops& ops) {
  ops.next = g_first;
  g_first = &ops;
}

}  // namespace bnb::test

// The operations on elements of a type (cpu/isa/isa.h) against plain code: conversions, block codes, groups of 64 weights.
#include <bnb/codebook.h>

#include "cpu/isa/ops_cases.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/plain.h"

namespace bnb::test {
namespace {

template <class T> class ElementOpsTest : public ::testing::Test {};
TYPED_TEST_SUITE(ElementOpsTest, AllTypes, TypeNames);

// Every pattern of 16 bits, fp32 as it is.
TYPED_TEST(ElementOpsTest, Load) {
  for_each_ops([](const Ops& ops) {
    std::vector<TypeParam> x(1 << 16);
    for (uint32_t i = 0; i < x.size(); ++i) x[i] = from_bits<TypeParam>(sizeof(TypeParam) == 4 ? bits_of(odd(1, i)) : i);
    for (size_t i = 0; i + static_cast<size_t>(ops.lanes) < x.size(); i += static_cast<size_t>(ops.lanes)) {
      Vector y;
      of<TypeParam>(ops).load(&x[i] + 1, y.at);
      for (int j = 0; j < ops.lanes; ++j) {
        const TypeParam from = x[i + 1 + static_cast<size_t>(j)];
        ASSERT_EQ(bits_of(y.at[j]), bits_of(bnb::to_float(from))) << "of " << std::hex << raw(from);
        ASSERT_TRUE(alike(y.at[j], static_cast<float>(to_double(from))));
      }
    }
  });
}

// All that rounding meets: each 16-bit number, the middles between them, and what lies on either side of those.
TYPED_TEST(ElementOpsTest, StoreRoundsToEven) {
  std::vector<float> x;
  for (uint32_t i = 0; i < 1 << 16; ++i) {
    const float a = bnb::to_float(from_bits<TypeParam>(sizeof(TypeParam) == 4 ? i << 16 : i));
    const float b = bnb::to_float(from_bits<TypeParam>(sizeof(TypeParam) == 4 ? i << 16 | 1 : (i + 1) & 0xffff));
    const auto middle = static_cast<float>((static_cast<double>(a) + static_cast<double>(b)) / 2);
    for (const float v : {a, middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY), odd(2, i)})
      if (!std::isnan(v) || quiet_nan(v)) x.push_back(v);
  }
  x.resize(x.size() / kMostLanes * kMostLanes);
  for_each_ops([&](const Ops& ops) {
    const auto check = [&](const float* from, const TypeParam* to, int n) {
      for (int i = 0; i < n; ++i) {
        ASSERT_EQ(raw(to[i]), raw(bnb::rounded<TypeParam>(from[i]))) << std::hex << bits_of(from[i]);
        ASSERT_TRUE(std::isnan(from[i]) || raw(to[i]) == raw(rounded<TypeParam>(from[i]))) << from[i];
      }
    };
    TypeParam y[2 * kMostLanes + 1];
    for (size_t i = 0; i < x.size(); i += static_cast<size_t>(ops.lanes)) {
      of<TypeParam>(ops).store(y + 1, &x[i]);
      ASSERT_NO_FATAL_FAILURE(check(&x[i], y + 1, ops.lanes));
    }
    for (size_t i = 0; i + static_cast<size_t>(2 * ops.lanes) <= x.size(); i += static_cast<size_t>(7 * ops.lanes)) {
      of<TypeParam>(ops).store_pair(y + 1, &x[i]);
      ASSERT_NO_FATAL_FAILURE(check(&x[i], y + 1, 2 * ops.lanes));
    }
  });
}

TYPED_TEST(ElementOpsTest, MaxBits) {
  for_each_ops([](const Ops& ops) {
    for (uint64_t round = 0; round < kRounds / 4; ++round) {
      const int64_t n = static_cast<int64_t>(random(3, round) % 9) * cpu::kChunk;
      std::vector<TypeParam> x;
      uint32_t most = 0;
      for (int64_t i = 0; i < n; ++i) {
        // Small ones, so that where the largest lies matters; a few odd ones.
        const float v = random(4, round) % 3 ? std::ldexp(finite_odd(5, round * 300 + static_cast<uint64_t>(i)), -100)
                                             : odd(5, round * 300 + static_cast<uint64_t>(i));
        x.push_back(bnb::rounded<TypeParam>(v));
        most = std::max(most, bits_of(bnb::to_float(x.back())) & 0x7fffffff);
      }
      const uint32_t got = of<TypeParam>(ops).max_bits(x.data(), n);
      ASSERT_EQ(got > 0x7f800000, most > 0x7f800000) << n << " elements";
      ASSERT_TRUE(got == most || most > 0x7f800000) << n << " elements: " << got << ", expected " << most;
    }
  });
}

TYPED_TEST(ElementOpsTest, AnyLarge) {
  for_each_ops([](const Ops& ops) {
    constexpr int n = 256;
    for (int at = 0; at < n; ++at)
      for (const float v : {1.99f, -1.99f, 0.0f, 1e-30f, 2.0f, -2.0f, 3e4f, -INFINITY, NAN}) {
        std::vector<TypeParam> x(n, bnb::rounded<TypeParam>(at % 2 ? 1.5f : -1e-3f));
        x[static_cast<size_t>(at)] = bnb::rounded<TypeParam>(v);
        ASSERT_EQ(of<TypeParam>(ops).any_large(x.data(), n), !(std::fabs(v) < 2)) << v << " at " << at;
      }
  });
}

// Around every threshold, where codes change.
TYPED_TEST(ElementOpsTest, Encode4bit) {
  for (const auto type : kFormats) {
    std::vector<TypeParam> x;
    for (uint64_t i = 0; i < 20000; ++i) {
      const float t = i % 2 ? reference::value_of(type, static_cast<int>(i / 2 % 16)) : reference::value_of(type, static_cast<int>(i % 16));
      const auto r = static_cast<float>(static_cast<int32_t>(random(6, i))) * 0x1p-31f;
      x.push_back(bnb::rounded<TypeParam>(i % 5 == 0   ? t
                                          : i % 5 == 1 ? std::clamp(t + r * 1e-3f, -1.0f, 1.0f)
                                          : i % 5 == 2 ? r * 1e-6f
                                                       : r));
    }
    if constexpr (sizeof(TypeParam) == 4)
      for (int i = 0; i < 15; ++i)
        for (const float threshold : {Nf4::thresholds[static_cast<size_t>(i)], Fp4::thresholds[static_cast<size_t>(i)]})
          for (const float v : {threshold, std::nextafter(threshold, 2.0f), std::nextafter(threshold, -2.0f)}) x.push_back(v);
    x.resize(x.size() / 96 * 96);
    for_each_ops([&](const Ops& ops) {
      for (const float inv : {1.0f, 0.75f, 0.01f})
        for (size_t i = 0; i < x.size(); i += 96) {
          uint8_t codes[48];
          of<TypeParam>(ops).encode_4bit[static_cast<int>(type)](&x[i], 96, inv, codes);
          for (size_t j = 0; j < 96; ++j)
            ASSERT_EQ(codes[j / 2] >> (j % 2 ? 0 : 4) & 15, reference::code_of(type, bnb::to_float(x[i + j]) * inv))
                << name(type) << " of " << bnb::to_float(x[i + j]) * inv;
        }
    });
  }
}

TYPED_TEST(ElementOpsTest, Decode4bit) {
  constexpr int64_t n = 192;
  alignas(64) TypeParam y[n];
  for_each_ops([&](const Ops& ops) {
    for (const auto type : kFormats)
      for (const bool stream : {false, true})
        for (const float absmax : kScales) {
          const auto codes = random_bytes(static_cast<uint64_t>(absmax * 8) + 7, n / 2);
          of<TypeParam>(ops).decode_4bit[static_cast<int>(type)][stream](codes.data(), n, absmax, y);
          for (int64_t i = 0; i < n; ++i) {
            const int code = codes[static_cast<size_t>(i / 2)] >> (i % 2 ? 0 : 4) & 15;
            ASSERT_EQ(raw(y[i]), raw(bnb::rounded<TypeParam>(reference::value_of(type, code) * absmax)))
                << name(type) << " code " << code << " * " << absmax;
          }
        }
  });
}

TYPED_TEST(ElementOpsTest, Decode8bit) {
  constexpr int64_t n = 192;
  alignas(64) TypeParam y[n];
  std::vector<float> map(256);
  for (uint64_t i = 0; i < 256; ++i) map[i] = finite_odd(8, i);
  for_each_ops([&](const Ops& ops) {
    for (const bool stream : {false, true})
      for (const float absmax : kScales)
        for (uint64_t seed = 1; seed < 20; ++seed) {
          const auto codes = random_bytes(seed, n);
          of<TypeParam>(ops).decode_8bit[stream](map.data(), codes.data(), n, absmax, y);
          for (int64_t i = 0; i < n; ++i) ASSERT_EQ(raw(y[i]), raw(bnb::rounded<TypeParam>(map[codes[static_cast<size_t>(i)]] * absmax)));
        }
  });
}

TYPED_TEST(ElementOpsTest, EncodeDynamic) {
  for (const bool is_signed : {false, true}) {
    const auto map = create_dynamic_map(is_signed);
    const auto encoder = cpu::encoder_for(map, 1 << 20);
    ASSERT_NE(encoder->dynamic, nullptr);
    std::vector<TypeParam> x;
    for (uint64_t i = 0; i < 30000; ++i) {
      const auto r = static_cast<float>(static_cast<int32_t>(random(9, i))) * 0x1p-31f;
      const float middle = (map[i % 255] + map[i % 255 + 1]) / 2;
      const float v = i % 3 ? std::ldexp(r, -static_cast<int>(random(10, i) % 40)) : middle * (1 + r * 1e-6f);
      x.push_back(bnb::rounded<TypeParam>(i % 11 == 0 ? float_of(bits_of(r) & 0x80000003) : v));
    }
    x.resize(x.size() / 96 * 96);
    for_each_ops([&](const Ops& ops) {
      const auto& encoders = is_signed ? of<TypeParam>(ops).encode_signed : of<TypeParam>(ops).encode_unsigned;
      for (int keep = 0; keep < 3; ++keep)
        for (size_t i = 0; encoders[keep] && i < x.size(); i += 96) {
          uint8_t codes[96];
          encoders[keep](*encoder, &x[i], 96, 0.75f, codes);
          for (size_t j = 0; j < 96; ++j) {
            const float v = bnb::to_float(x[i + j]);
            const uint8_t nearest = (*encoder)(v * 0.75f);
            using enum cpu::Keep;
            const auto& d = *encoder->dynamic;
            const uint8_t expected = keep == 0   ? nearest
                                     : keep == 1 ? cpu::kept<negative>(d, v, nearest)
                                                 : cpu::kept<positive>(d, v, nearest);
            ASSERT_EQ(codes[j], expected) << "of " << v << ", keep " << keep << ", signed " << is_signed;
          }
        }
    });
  }
}

// The code of element e of a group goes to lane e / (64 / lanes), vector (e % (64 / lanes)) ^ 1.
int place(int lanes, int e) { return (e % (kGroup / lanes) ^ 1) * lanes + e / (kGroup / lanes); }

TYPED_TEST(ElementOpsTest, GroupsOf64) {
  for_each_ops([](const Ops& ops) {
    for (uint64_t round = 0; round < 200; ++round) {
      std::vector<TypeParam> x;
      for (uint64_t i = 0; i < kGroup; ++i) x.push_back(bnb::rounded<TypeParam>(finite_odd(11, round * kGroup + i)));
      float y[kGroup];
      of<TypeParam>(ops).permute(x.data(), y);
      for (int e = 0; e < kGroup; ++e) ASSERT_EQ(bits_of(y[place(ops.lanes, e)]), bits_of(bnb::to_float(x[static_cast<size_t>(e)]))) << e;

      const auto codes = random_bytes(round + 1, kGroup / 2);
      const float scale[] = {kScales[round % std::size(kScales)], kScales[round / 9 % std::size(kScales)]};
      for (const bool split : {false, true}) {
        of<TypeParam>(ops).decode_group[split](Nf4::values.data(), codes.data(), scale[0], scale[1], y);
        for (int e = 0; e < kGroup; ++e) {
          const int code = codes[static_cast<size_t>(e / 2)] >> (e % 2 ? 0 : 4) & 15;
          const float w = reference::value_of(QuantType::nf4, code) * scale[split && e >= kGroup / 2];
          ASSERT_EQ(bits_of(y[place(ops.lanes, e)]), bits_of(bnb::to_float(bnb::rounded<TypeParam>(w))))
              << e << " of scale " << scale[0] << ", " << scale[1];
        }
      }
    }
  });
}

}  // namespace
}  // namespace bnb::test

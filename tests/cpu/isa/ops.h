// The operations of an instruction set as functions of plain memory: ops.cpp makes them with the compiler flags of that set, ops_test.cpp
// runs those of every set that the machine has. A vector is `lanes` elements; null is what a set need not have.
#pragma once

#include <bnb/types.h>

#include <cstdint>
#include <string_view>

namespace bnb::cpu {
struct Encoder8;
}

namespace bnb::test {

// Codes of a dynamic 8-bit map on its way through Isa::EncodeDynamic, by cpu::Keep.
template <class T> using EncodeDynamic = void (*)(const cpu::Encoder8&, const T* x, int64_t n, float inv, uint8_t* codes);

// Of elements of one type.
template <class T> struct ElementOps {
  void (*load)(const T*, float* to);
  void (*store)(T*, const float* x);
  void (*store_pair)(T*, const float* x);
  uint32_t (*max_bits)(const T*, int64_t n);
  bool (*any_large)(const T*, int n);
  void (*encode_4bit[2])(const T*, int64_t n, float inv, uint8_t* codes);        // by QuantType
  void (*decode_4bit[2][2])(const uint8_t* codes, int64_t n, float absmax, T*);  // by QuantType, and whether it streams
  void (*decode_8bit[2])(const float* map, const uint8_t* codes, int64_t n, float absmax, T*);
  EncodeDynamic<T> encode_unsigned[3], encode_signed[3];
  void (*permute)(const T*, float* to);
  void (*decode_group[2])(const float* values, const uint8_t* codes, float first, float second, float* w);  // whether it is split
};

struct Ops {
  std::string_view isa;
  int lanes;
  ElementOps<float> f32;
  ElementOps<Half> f16;
  ElementOps<BFloat16> bf16;

  void (*load_integers)(const int32_t*, float* to);
  void (*constants)(float x, float* zero, float* all_x);
  void (*sqrt)(const float*, float* to);
  void (*sign)(const float*, float* to);
  void (*add)(const float*, const float*, float* to);
  void (*mul)(const float*, const float*, float* to);
  void (*div)(const float*, const float*, float* to);
  void (*min)(const float*, const float*, float* to);
  void (*max)(const float*, const float*, float* to);
  void (*max_magnitude)(const float*, const float*, float* to);
  void (*fma)(const float*, const float*, const float*, float* to);
  void (*mul_add)(const float*, const float*, const float*, float* to);
  void (*finite)(const float* x, const float* a, const float* b, float* to);  // select(finite(x), a, b)
  void (*finite_and_nonzero)(const float* m, const float* x, const float* a, const float* b, float* to);
  float (*greatest)(const float*);
  void (*decode_state[2])(const float* map, const uint8_t* codes, float absmax, float* to);  // 64 codes; whether dynamic and signed

  void (*add_lanes)(const float* four, bool first, float* to);
  void (*nested)(const float* map, const uint8_t* codes, float scale, float offset, float* to);
  // 32 bytes of codes to 64 bf16 weights and as many activations, multiplied in pairs and added up.
  float (*bf16_dot[2])(const float* values, const uint8_t* codes, float first, float second, const BFloat16* x);
  void (*bf16_weights)(const float* values, const uint8_t* codes, float first, float second, uint16_t* w);
  void (*bf16_permute)(const BFloat16* x, uint16_t* to);

  int step;  // elements of k that an int8 dot product takes
  bool shifted;
  // to[i] = a row of `step` elements of a times the first n of row i of four of b
  void (*dot)(const int8_t* a, const int8_t* b, int64_t stride, int64_t n, int32_t* to);
  int32_t (*add_bytes)(const int8_t* line);
  void (*broadcast)(const void* word, int32_t* to);
  void (*put_rows)(const int32_t* four, int32_t* to, int64_t stride);

  const Ops* next;
};

// Enters one in the list, before main.
void enter(Ops&);

}  // namespace bnb::test

// A libcublasLt.so.13 for the emulated device: the functions that cuda/device/cublaslt.cpp looks up, for row-major y = a * w^T. It is
// strict: sizes of attributes are those of cublasLt.h, and unless told otherwise it only has algorithms that add partial sums in the type
// of y, or that need more alignment than there is.
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/convert.h"
#include "common/formats.h"

namespace {

using namespace bnb;

enum Status : int { kSuccess = 0, kInvalidValue = 7, kNotSupported = 15 };
constexpr int kHandle = 0x17;

struct Desc {
  int32_t transposed_a = 0;
  uint32_t epilogue = 1;
  const void* bias = nullptr;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t pitch;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 7, alignment[4] = {256, 256, 256, 256};
};
// cublasLtMatmulHeuristicResult_t. An algorithm is the alignments that it needs.
struct Result {
  uint32_t alignment[4];
  uint64_t rest[6];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

template <class T> int set(T& to, const void* from, size_t size) {
  if (size != sizeof to) return kInvalidValue;
  std::memcpy(&to, from, size);
  return kSuccess;
}

template <class T> std::vector<float> floats(const void* from, uint64_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = to_float(static_cast<const T*>(from)[i]);
  return x;
}

template <class T>
void product(const Desc& desc, const Layout& w, const Layout& a, const Layout& y, const void* from_w, const void* from_a, void* to) {
  const auto pitch = static_cast<uint64_t>(w.pitch), rows = static_cast<uint64_t>(a.pitch), out = static_cast<uint64_t>(y.pitch);
  for (uint64_t j = 0; j < w.columns; ++j) {
    const auto column = floats<T>(static_cast<const T*>(from_w) + j * pitch, w.rows);
    for (uint64_t i = 0; i < a.columns; ++i) {
      const auto row = floats<T>(static_cast<const T*>(from_a) + i * rows, a.rows);
      float sums[8] = {};
      for (size_t l = 0; l < row.size(); ++l) sums[l % 8] += row[l] * column[l];
      float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      if (desc.epilogue == 4) sum += to_float(static_cast<const T*>(desc.bias)[j]);
      static_cast<T*>(to)[i * out + j] = rounded<T>(sum);
    }
  }
}

}  // namespace

extern "C" {

int bnb_test_handles = 0;  // created so far

int cublasLtCreate(void** to) {
  static int handle = kHandle;
  ++bnb_test_handles;
  *to = &handle;
  return kSuccess;
}

int cublasLtMatmulDescCreate(void** to, int compute, int scale) {
  if (compute != 68 || scale != 0) return kNotSupported;
  *to = new Desc;
  return kSuccess;
}
int cublasLtMatmulDescDestroy(void* desc) {
  delete static_cast<Desc*>(desc);
  return kSuccess;
}
int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t size) {
  auto& d = *static_cast<Desc*>(desc);
  switch (attribute) {
    case 3: return set(d.transposed_a, value, size);
    case 7: return set(d.epilogue, value, size);
    case 8: return set(d.bias, value, size);
    default: return kInvalidValue;
  }
}

int cublasLtMatrixLayoutCreate(void** to, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
  if (pitch < static_cast<int64_t>(rows)) return kInvalidValue;
  *to = new Layout{type, rows, columns, pitch};
  return kSuccess;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return kSuccess;
}

int cublasLtMatmulPreferenceCreate(void** to) {
  *to = new Preference;
  return kSuccess;
}
int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<Preference*>(preference);
  return kSuccess;
}
int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t size) {
  auto& p = *static_cast<Preference*>(preference);
  if (attribute >= 5 && attribute <= 8) return set(p.alignment[attribute - 5], value, size);
  switch (attribute) {
    case 1: return set(p.workspace, value, size);
    case 3: return set(p.reductions, value, size);
    default: return kInvalidValue;
  }
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, void* desc, void* w, void* a, void* c, void* y, void* preference, int asked, void* to,
                                   int* found) {
  const auto& d = *static_cast<Desc*>(desc);
  const auto &in_w = *static_cast<Layout*>(w), &in_a = *static_cast<Layout*>(a), &out = *static_cast<Layout*>(y);
  const auto& p = *static_cast<Preference*>(preference);
  *found = 0;
  if (*static_cast<int*>(handle) != kHandle || c != y || asked != 1 || d.transposed_a != 1) return kInvalidValue;
  if (in_w.rows != in_a.rows || out.rows != in_w.columns || out.columns != in_a.columns) return kInvalidValue;
  if (in_w.type != in_a.type || in_w.type != out.type || (d.epilogue == 4) != (d.bias != nullptr)) return kInvalidValue;
  if (p.reductions & ~2u) return kNotSupported;
  auto& result = *static_cast<Result*>(to);
  std::memcpy(result.alignment, p.alignment, sizeof p.alignment);
  result.workspace = p.workspace;
  result.state = kSuccess;
  *found = 1;
  return kSuccess;
}

int cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* w, void* w_layout, const void* a, void* a_layout,
                   const void* beta, const void* c, void* c_layout, void* y, void* y_layout, const void* algorithm, void* workspace,
                   size_t bytes, void*) {
  const auto& best = *static_cast<const Result*>(algorithm);
  if (*static_cast<int*>(handle) != kHandle || *static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0)
    return kInvalidValue;
  if (c != y || c_layout != y_layout || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return kInvalidValue;
  const void* const at[] = {w, a, c, y};
  for (int i = 0; i < 4; ++i) {
    const auto address = reinterpret_cast<uintptr_t>(at[i]);
    const auto told = best.alignment[i];
    if (told == 0 || address % told != 0) return kNotSupported;
    if (told < 256 && address % (2 * told) == 0) return kInvalidValue;  // less than the address has: slower algorithms
  }
  std::memset(workspace, 0xff, bytes);
  const auto& d = *static_cast<Desc*>(desc);
  const auto &in_w = *static_cast<Layout*>(w_layout), &in_a = *static_cast<Layout*>(a_layout), &out = *static_cast<Layout*>(y_layout);
  switch (in_w.type) {
    case 0: product<float>(d, in_w, in_a, out, w, a, y); return kSuccess;
    case 2: product<Half>(d, in_w, in_a, out, w, a, y); return kSuccess;
    case 14: product<BFloat16>(d, in_w, in_a, out, w, a, y); return kSuccess;
    default: return kNotSupported;
  }
}
}

// The few functions of cuBLASLt that are needed, of version 12 or 13, whose interface is the same. The library caches its heuristics.
#include "cuda/device/cublaslt.h"

#include <bnb/error.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>

#include "cuda/device/device.h"
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>  // only to check the numbers below
#endif

namespace bnb::cuda::library {
namespace {

// Of cublasLt.h, cublas_api.h and library_types.h.
enum : int { kFloat = 0, kHalf = 2, kBFloat16 = 14 };
enum : int { kCompute32F = 68, kTransposed = 1 };
enum : int { kDescTransA = 3, kDescEpilogue = 7, kDescBias = 8 };
enum : int { kPreferWorkspace = 1, kPreferReduction = 3, kPreferAlignA = 5, kPreferAlignB, kPreferAlignC, kPreferAlignD };
enum : uint32_t { kEpilogueBias = 4, kReduceInComputeType = 2 };
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
using Handle = void*;

#if __has_include(<cublasLt.h>)
constexpr bool same(int64_t ours, int64_t theirs) { return ours == theirs; }
static_assert(same(kFloat, CUDA_R_32F) && same(kHalf, CUDA_R_16F) && same(kBFloat16, CUDA_R_16BF));
static_assert(same(kCompute32F, CUBLAS_COMPUTE_32F) && same(kTransposed, CUBLAS_OP_T));
static_assert(same(kDescTransA, CUBLASLT_MATMUL_DESC_TRANSA) && same(kDescEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE));
static_assert(same(kDescBias, CUBLASLT_MATMUL_DESC_BIAS_POINTER) && same(kEpilogueBias, CUBLASLT_EPILOGUE_BIAS));
static_assert(same(kPreferWorkspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES));
static_assert(same(kPreferReduction, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK));
static_assert(same(kReduceInComputeType, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
static_assert(same(kPreferAlignA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES));
static_assert(same(kPreferAlignB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES));
static_assert(same(kPreferAlignC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES));
static_assert(same(kPreferAlignD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES));
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t) && sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
#endif

struct Api {
  int (*create)(Handle*);
  int (*desc_create)(Handle*, int compute, int scale);
  int (*desc_set)(Handle, int attribute, const void*, size_t);
  int (*desc_destroy)(Handle);
  int (*layout_create)(Handle*, int type, uint64_t rows, uint64_t columns, int64_t pitch);
  int (*layout_destroy)(Handle);
  int (*preference_create)(Handle*);
  int (*preference_set)(Handle, int attribute, const void*, size_t);
  int (*preference_destroy)(Handle);
  int (*heuristic)(Handle, Handle desc, Handle a, Handle b, Handle c, Handle d, Handle preference, int asked, Heuristic*, int* found);
  int (*matmul)(Handle, Handle desc, const void* alpha, const void* a, Handle, const void* b, Handle, const void* beta, const void* c,
                Handle, void* d, Handle, const Algorithm*, void* workspace, size_t, void* stream);
};

// Null if the library is absent or lacks a function. It stays open.
const Api* api() {
  static const Api* const opened = []() -> const Api* {
    void* file = nullptr;
    for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})  // prefer the one already loaded
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
        if (!file) file = dlopen(name, mode);
    if (!file) return nullptr;
    static Api a;
    bool all = true;
    const auto get = [&]<class F>(F& f, const char* name) {
      f = reinterpret_cast<F>(dlsym(file, name));
      all = all && f;
    };
    get(a.create, "cublasLtCreate");
    get(a.desc_create, "cublasLtMatmulDescCreate");
    get(a.desc_set, "cublasLtMatmulDescSetAttribute");
    get(a.desc_destroy, "cublasLtMatmulDescDestroy");
    get(a.layout_create, "cublasLtMatrixLayoutCreate");
    get(a.layout_destroy, "cublasLtMatrixLayoutDestroy");
    get(a.preference_create, "cublasLtMatmulPreferenceCreate");
    get(a.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    get(a.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    get(a.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    get(a.matmul, "cublasLtMatmul");
    return all ? &a : nullptr;
  }();
  return opened;
}

// The handle for the current device `index`; null without the library.
Handle handle(int index) {
  constexpr int kMax = 64;
  static std::array<Handle, kMax> handles;
  static std::array<std::once_flag, kMax> created;
  if (!api() || index >= kMax) return nullptr;
  std::call_once(created[index], [&] {
    const dev::MemoryDuringCapture allowed;  // the first call may be one that is captured
    if (api()->create(&handles[index]) != 0) handles[index] = nullptr;
  });
  return handles[index];
}

void check(const Product& p, const char* what, int status) {
  if (status != 0) [[unlikely]]
    throw Error(Errc::unsupported, "gemm_4bit: " + std::string(name(p.type)) + " " + std::to_string(p.m) + " x " + std::to_string(p.n) +
                                       " x " + std::to_string(p.k) + ": cuBLASLt, " + what + ": status " + std::to_string(status));
}

// Frees a descriptor.
struct Owned {
  Handle handle = nullptr;
  int (*destroy)(Handle);
  explicit Owned(int (*d)(Handle)) : destroy(d) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (handle) destroy(handle);
  }
};

}  // namespace

bool available(int device) { return handle(device) != nullptr; }

namespace {

// An address's alignment, up to 256, which the library assumes by default.
uint32_t alignment_of(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return static_cast<uint32_t>(std::min<uintptr_t>(256, at & -at));
}

}  // namespace

// The library is column-major: it computes y^T (n x m) = (w^T)^T * a^T.
void multiply(const Product& p, int device, Stream stream) {
  const Api& lib = *api();
  const int type = p.type == DType::f32 ? kFloat : p.type == DType::f16 ? kHalf : kBFloat16;
  Owned desc(lib.desc_destroy), w(lib.layout_destroy), a(lib.layout_destroy), y(lib.layout_destroy), preference(lib.preference_destroy);
  check(p, "product", lib.desc_create(&desc.handle, kCompute32F, kFloat));
  const auto set = [&](int attribute, const auto& value) {
    check(p, "attribute", lib.desc_set(desc.handle, attribute, &value, sizeof value));
  };
  set(kDescTransA, int32_t{kTransposed});
  if (p.bias) {
    set(kDescEpilogue, uint32_t{kEpilogueBias});
    set(kDescBias, p.bias);
  }
  const auto layout = [&](Owned& o, int64_t rows, int64_t columns, int64_t pitch) {
    check(p, "layout", lib.layout_create(&o.handle, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), pitch));
  };
  layout(w, p.k, p.n, p.k);
  layout(a, p.k, p.m, p.k);
  layout(y, p.n, p.m, p.pitch);
  check(p, "preference", lib.preference_create(&preference.handle));
  const auto prefer = [&](int attribute, const auto& value) {
    check(p, "preference", lib.preference_set(preference.handle, attribute, &value, sizeof value));
  };
  const auto bytes = static_cast<uint64_t>(kWorkspace);
  prefer(kPreferWorkspace, bytes);
  prefer(kPreferReduction, uint32_t{kReduceInComputeType});  // split-k sums are added in fp32, never in the type of y
  prefer(kPreferAlignA, alignment_of(p.w));
  prefer(kPreferAlignB, alignment_of(p.a));
  prefer(kPreferAlignC, alignment_of(p.y));
  prefer(kPreferAlignD, alignment_of(p.y));
  Heuristic best{};
  int found = 0;
  check(p, "choice of an algorithm",
        lib.heuristic(handle(device), desc.handle, w.handle, a.handle, y.handle, y.handle, preference.handle, 1, &best, &found));
  check(p, "choice of an algorithm", found > 0 ? best.state : -1);
  const float one = 1, zero = 0;
  check(p, "launch",
        lib.matmul(handle(device), desc.handle, &one, p.w, w.handle, p.a, a.handle, &zero, p.y, y.handle, p.y, y.handle, &best.algorithm,
                   p.workspace, bytes, stream));
}

}  // namespace bnb::cuda::library

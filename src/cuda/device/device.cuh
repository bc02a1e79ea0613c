// What a kernel may use of the hardware: indices, barrier, shuffle, shared memory, atomics, launch. Instructions are in ptx.cuh. Nothing
// else in src/cuda names CUDA, so the same files run on the host (tests/cuda_on_host supplies these names) and can be built as HIP.
//
// Rules that the host build checks: every thread of a block reaches the same barriers, all 32 lanes of a warp the same collectives; shared
// memory is dynamic and uninitialized; a block never waits for another.
#pragma once

#include "cuda/device/device.h"

#if defined(__CUDACC__)

#if defined(__CUDA_ARCH__)
#define BNB_ARCH (__CUDA_ARCH__ / 10)
#else
#define BNB_ARCH 0
#endif
// Most threads per multiprocessor.
#define BNB_SM_THREADS (BNB_ARCH == 75 ? 1024 : BNB_ARCH == 86 || BNB_ARCH == 89 || BNB_ARCH >= 120 ? 1536 : 2048)

// BNB_KERNEL(threads per block, wanted blocks per multiprocessor) name(arguments) { ... }
#define BNB_KERNEL(threads, blocks) \
  __global__ void __launch_bounds__(threads, (threads) * (blocks) <= BNB_SM_THREADS ? (blocks) : BNB_SM_THREADS / (threads))
#define BNB_DEVICE __device__ __forceinline__
#define BNB_HD __host__ __device__ __forceinline__
#define BNB_TABLE __device__ constexpr  // in device memory, for run-time indices
#define BNB_UNROLL _Pragma("unroll")
#define BNB_KEEP_LOOP _Pragma("unroll 1")

namespace bnb::cuda::dev {

BNB_DEVICE unsigned thread() { return threadIdx.x; }
BNB_DEVICE unsigned threads() { return blockDim.x; }
BNB_DEVICE unsigned lane() { return threadIdx.x % kWarp; }
BNB_DEVICE unsigned warp() { return threadIdx.x / kWarp; }
BNB_DEVICE Dim block() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
BNB_DEVICE Dim grid() { return {gridDim.x, gridDim.y, gridDim.z}; }

BNB_DEVICE void barrier() { __syncthreads(); }
BNB_DEVICE bool barrier_or(bool x) { return __syncthreads_or(x); }
BNB_DEVICE void warp_barrier() { __syncwarp(); }

// T: 4 or 8 bytes.
template <class T> BNB_DEVICE T shuffle(T v, unsigned from) { return __shfl_sync(~0u, v, from); }
template <class T> BNB_DEVICE T shuffle_xor(T v, unsigned mask) { return __shfl_xor_sync(~0u, v, mask); }
BNB_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
BNB_DEVICE bool any(bool x) { return __any_sync(~0u, x); }

// The block's dynamic shared memory, 128-byte aligned.
template <class T> BNB_DEVICE T& shared() {
  extern __shared__ __align__(128) unsigned char bnb_shared[];
  return *reinterpret_cast<T*>(bnb_shared);
}

// Return the old value.
template <class T> BNB_DEVICE T atomic_add(T* at, T v) { return atomicAdd(at, v); }
template <class T> BNB_DEVICE T atomic_max(T* at, T v) { return atomicMax(at, v); }
template <class T> BNB_DEVICE T atomic_or(T* at, T v) { return atomicOr(at, v); }

template <class... P, class... A> void launch(const Launch& l, void (*kernel)(P...), const A&... arguments) {
  [&](P... p) {
    void* pointers[] = {static_cast<void*>(&p)...};
    launch_kernel(reinterpret_cast<const void*>(kernel), l, pointers);
  }(arguments...);
}

}  // namespace bnb::cuda::dev

#else
#include "cuda_on_host/device.h"
#endif

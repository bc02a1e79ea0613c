// What estimates of plans are made of, in clocks of one multiprocessor. They decide which plan runs, never what it computes.
#pragma once

namespace bnb::cuda {

struct Rates {
  double mma;       // products of 16-bit floats per clock with mma; of int8 twice as many
  double library;   // likewise what cuBLASLt reaches
  double l2_bytes;  // read from L2 per clock
};

// From the vendor's tables, less what mma.sync does not reach.
constexpr Rates rates_of(int arch) {
  if (arch >= 120) return {.mma = 512, .library = 450, .l2_bytes = 32};
  if (arch >= 100) return {.mma = 1024, .library = 3300, .l2_bytes = 40};
  if (arch >= 90) return {.mma = 1200, .library = 1700, .l2_bytes = 36};
  if (arch >= 86) return {.mma = 512, .library = 450, .l2_bytes = 32};
  if (arch >= 80) return {.mma = 1024, .library = 900, .l2_bytes = 32};
  return {.mma = 512, .library = 400, .l2_bytes = 24};
}

// ---- launches
inline constexpr double kLaunchClocks = 3000;       // one that follows another, with its tables in shared memory
inline constexpr double kPlainLaunchClocks = 2000;  // without tables
inline constexpr double kTileClocks = 1500;         // begin and end of a tile: first loads, epilogue

// ---- instructions and memory
inline constexpr double kLanes = 128;               // fp32 instructions per clock
inline constexpr double kLibraryFp32 = 100;         // products of fp32 per clock that cuBLASLt reaches
inline constexpr double kMemoryBytes = 16;          // read from memory per clock
inline constexpr double kTileOverhead = 1.2;        // of a step of a tile, over its slowest part
inline constexpr double kShortestStepClocks = 300;  // a step of a tile waits for its copies, if nothing else runs
inline constexpr double kTileStoreElements = 32;    // of y per clock through the epilogue of gemm_int8

// Relative time of a read by the bytes that a lane takes at once.
constexpr double load_factor(int bytes_per_lane) { return bytes_per_lane == 16 ? 1 : bytes_per_lane == 8 ? 1.1 : 1.3; }

}  // namespace bnb::cuda

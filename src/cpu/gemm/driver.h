// How the operations are cut into tasks, and the two steps of a product (cpu/kernels/kernels.h).
#pragma once

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"

namespace bnb {

// Elements a task should hold, so that handing it to a thread (some microseconds) stays a small part of its time.
inline constexpr int64_t kGrainElements = 1 << 15;

// Units of a task, `each` elements of work to a unit.
inline int64_t grain_of(int64_t elements, int64_t each) { return std::max<int64_t>(1, elements / std::max<int64_t>(1, each)); }

template <class D> void multiply(const cpu::Product<D>& product, const D& d) {
  if (d.m == 0 || d.n == 0) return;
  const int64_t units = product.pack_units(d), steps = d.n / product.column_step + (d.n % product.column_step != 0);
  // A step reads column_step rows of the weight and multiplies them with all of a.
  const int64_t grain = grain_of(32 * kGrainElements, product.column_step * d.k * (4 + d.m));
  const auto run = [&](const cpu::Scratch& packed, int64_t begin, int64_t end) {
    product.run(d, packed.data(), {begin * product.column_step, std::min(end * product.column_step, d.n)});
  };
  if (d.m == 1) {  // each task for itself: what another thread has just written costs more to fetch than to make
    parallel_for(steps, grain, [&](int64_t begin, int64_t end) {
      const cpu::Scratch packed(product.pack_bytes(d));
      product.pack(d, packed.data(), {0, units});
      run(packed, begin, end);
    });
    return;
  }
  const cpu::Scratch packed(product.pack_bytes(d));
  parallel_for(units, grain_of(kGrainElements * units, d.m * d.k),
               [&](int64_t begin, int64_t end) { product.pack(d, packed.data(), {begin, end}); });
  parallel_for(steps, grain, [&](int64_t begin, int64_t end) { run(packed, begin, end); });
}

}  // namespace bnb

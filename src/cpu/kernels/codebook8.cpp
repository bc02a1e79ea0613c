#include "cpu/kernels/codebook8.h"

#include <bnb/codebook.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/runtime/parallel.h"

namespace bnb::cpu {
namespace {

using Map = std::array<float, 256>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest t that stays below boundary i: the midpoint, or the float before it where a tie goes up. Never below the one before (equal
// values and infinities in the map), so that thresholds ascend.
void set_thresholds(Encoder8& e, const Map& code) {
  float last = -kInfinity;
  for (int i = 0; i < 255; ++i) {
    const float sum = code[i] + code[i + 1], mid = sum * 0.5f;
    const float threshold = i % 2 == 0 ? mid : std::nextafter(mid, -kInfinity);
    last = e.threshold[i] = threshold > last ? threshold : last;
  }
  e.threshold[255] = kInfinity;
}

void set_table(Encoder8& e) {
  auto table = std::make_unique<uint8_t[]>(1 << 16);
  // From the most negative bucket to the greatest: keys ffff..8000, then 0000..7fff. NaNs come first and last.
  uint32_t c = 0;
  for (uint32_t i = 0; i < 1 << 16; ++i) {
    const uint32_t key = i < 0x8000 ? 0xffff - i : i - 0x8000;
    const float low = float_of(key << 16 | (i < 0x8000 ? 0xffff : 0)), high = float_of(key << 16 | (i < 0x8000 ? 0 : 0xffff));
    if (std::isnan(low) || std::isnan(high)) {
      table[key] = 255;  // shared with the infinities, which no t is
      continue;
    }
    while (low > e.threshold[c]) ++c;
    table[key] = static_cast<uint8_t>(c);
    uint32_t last = c;
    while (high > e.threshold[last]) ++last;
    e.many |= last > c + 1;
  }
  e.first = std::move(table);
}

Dynamic8 make_dynamic(bool is_signed, const float* threshold) {
  Dynamic8 d{.is_signed = is_signed, .zero = is_signed ? 127 : 0, .unsure = 0, .cut = {}, .step = {}, .slope = {}, .icept = {}, .top = {}};
  const float offset = Dynamic8::offset(is_signed);
  int first[10] = {0, 1};  // the least h of each segment
  for (int s = 1; s < 8; ++s) first[s + 1] = first[s] + (1 << (s - is_signed));
  first[9] = first[8] + 1;
  float spread = 0;
  for (int s = 0; s < 9; ++s) {
    const int n = first[s + 1] - first[s];
    d.top[s] = offset + static_cast<float>(first[s] + n - 1);
    d.icept[s] = offset + static_cast<float>(first[s]);
    if (n == 1) continue;
    d.slope[s] = static_cast<float>(n / (0.9 * std::pow(10, s - 7)));
    d.icept[s] = static_cast<float>(offset + first[s] - 0.5 - n / 9.0);
    // How far above the integers the line meets the thresholds. The intercept is raised until no distance is negative.
    const auto distance = [&](auto which) {
      float result = std::fma(threshold[d.zero + first[s]], d.slope[s], d.icept[s]) - (offset + 0.5f + static_cast<float>(first[s]));
      for (int h = first[s]; h < first[s] + n - 1; ++h)
        result = which(result, std::fma(threshold[d.zero + h], d.slope[s], d.icept[s]) - (offset + 0.5f + static_cast<float>(h)));
      return result;
    };
    const auto least = [](float a, float b) { return std::min(a, b); };
    d.icept[s] -= distance(least);
    while (distance(least) < 0) d.icept[s] = std::nextafter(d.icept[s], kInfinity);
    spread = std::max(spread, distance([](float a, float b) { return std::max(a, b); }));
  }
  d.unsure = (static_cast<uint32_t>(spread / (is_signed ? 0x1p-16f : 0x1p-15f)) + 1) << !is_signed;
  for (int s = 0; s < 8; ++s) d.cut[s] = bits_of(threshold[d.zero + first[s + 1] - 1]);
  for (uint32_t e = 96; e < 128; ++e) {
    uint32_t segment = 0, inside = 0;  // of the least number with this exponent; the cut within the octave
    for (const uint32_t cut : d.cut) {
      segment += cut >> 23 < e;
      if (cut >> 23 == e) inside = cut;
    }
    d.step[e - 96] = inside ? ((segment + 1) << 23) - (inside + 1) : (segment << 23) - (e << 23);
  }
  return d;
}

constexpr int64_t kTableWorth = 1 << 15;  // elements from which the table pays for its making

struct Entry {
  Map code;
  std::shared_ptr<const Encoder8> encoder;
};

Entry make_entry(const Map& code, bool table) {
  auto e = std::make_shared<Encoder8>();
  set_thresholds(*e, code);
  if (table) set_table(*e);
  return {code, std::move(e)};
}

struct DynamicEntries {
  Entry entries[2];
  Dynamic8 rules[2];

  DynamicEntries() {
    for (const bool is_signed : {false, true}) {
      Map code;
      std::ranges::copy(create_dynamic_map(is_signed), code.begin());
      auto e = std::make_shared<Encoder8>();
      set_thresholds(*e, code);
      set_table(*e);
      rules[is_signed] = make_dynamic(is_signed, e->threshold);
      e->dynamic = &rules[is_signed];
      entries[is_signed] = {code, std::move(e)};
    }
  }
};

// The last ones that were made for other maps, guarded by process_mutex.
struct KeptEntries {
  std::array<Entry, 4> entries;
  size_t oldest = 0;
};

bool same(const Map& a, const Map& b) {
  return std::ranges::equal(a, b, [](float x, float y) { return bits_of(x) == bits_of(y); });
}

}  // namespace

std::shared_ptr<const Encoder8> encoder_for(std::span<const float> given, int64_t n) {
  Map code;
  std::copy_n(given.begin(), code.size(), code.begin());
  for (const auto& entry : process_wide<DynamicEntries>().entries)
    if (same(entry.code, code)) return entry.encoder;

  auto& [kept, oldest] = process_wide<KeptEntries>();
  {
    std::lock_guard lock(process_mutex());
    for (const auto& entry : kept)
      if (entry.encoder && same(entry.code, code)) return entry.encoder;
  }
  Entry made = make_entry(code, n >= kTableWorth);
  if (made.encoder->first) {
    Entry last = made;  // the one it replaces is destroyed without the mutex
    std::lock_guard lock(process_mutex());
    std::swap(kept[oldest++ % kept.size()], last);
  }
  return made.encoder;
}

}  // namespace bnb::cpu

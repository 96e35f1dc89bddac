// The k largest magnitudes of rows and of matrices, exactly: ties go to the lowest index.

#ifndef WSPARSE_OPS_CSRC_TOP_K_H_
#define WSPARSE_OPS_CSRC_TOP_K_H_

#include "common.h"

namespace wsparse {

// Positive integers that order like magnitudes, from the bits of float32; NaN is one above infinity.
inline int32_t Key(int32_t bits) { return std::min(bits & 0x7fffffff, 0x7f800001) + 1; }

inline Ints Keys(Ints bits) {
  const Ints magnitude = bits & 0x7fffffff, top = Ints{} + 0x7f800001;
  return (magnitude < top ? magnitude : top) + 1;
}

// How many of n keys reach a threshold.
inline int64_t Count(const int32_t* keys, int64_t n, int32_t threshold) {
  // Comparisons give -1. Four sums hide the latency of adding, and none overflows in 2^20 turns.
  int64_t count = 0, i = 0;
  while (i + 4 * kLanes <= n) {
    Ints a{}, b{}, c{}, d{};
    const int64_t stop = std::min(n, i + (int64_t{4 * kLanes} << 20));
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
      a += Load<Ints>(keys + i) >= threshold;
      b += Load<Ints>(keys + i + kLanes) >= threshold;
      c += Load<Ints>(keys + i + 2 * kLanes) >= threshold;
      d += Load<Ints>(keys + i + 3 * kLanes) >= threshold;
    }
    a += b + c + d;
    for (int lane = 0; lane < kLanes; ++lane) count -= a[lane];
  }
  for (; i < n; ++i) count += keys[i] >= threshold;
  return count;
}

// What separates the chosen keys: those at or above `least` before `end`, those above it from there on.
struct Cut {
  int32_t least, end;
};

// The cut for the k largest of n keys, of which at least k are positive; `top` is the largest.
inline Cut FindCut(const int32_t* keys, int64_t n, int64_t k, int32_t top) {
  // The maxima of k groups of four: k keys reach the least of them.
  int32_t low = 1;
  if (4 * k <= n) {
    low = top;
    for (int64_t i = 0; i < k; ++i) {
      const int32_t a = std::max(keys[i], keys[i + k]), b = std::max(keys[i + 2 * k], keys[i + 3 * k]);
      low = std::min(low, std::max(a, b));
    }
    low = std::max(low, 1);
  }
  int32_t high = top + 1;
  int64_t n_low = Count(keys, n, low), n_high = 0;
  for (int pass = 0; n_low != k && high - low > 1; ++pass) {
    int32_t middle = low + (high - low) / 2;
    // Interpolation alone can creep; every third pass halves.
    if (pass % 3 != 2) {
      const float part = (n_low - k + 0.5f) / (n_low - n_high + 1);
      middle = std::clamp<int32_t>(low + int32_t(part * (high - low)), low + 1, high - 1);
    }
    const int64_t count = Count(keys, n, middle);
    (count >= k ? low : high) = middle;
    (count >= k ? n_low : n_high) = count;
  }
  if (n_low == k) return {low, int32_t(n)};
  int32_t end = 0;
  for (int64_t ties = k - n_high; ties > 0; ++end) ties -= keys[end] == low;
  return {low, end};
}

// Calls `loop(begin, end, threshold)` for the two stretches of a row of n that a cut divides.
template <typename Loop>
inline void ForStretches(Cut cut, int64_t n, Loop loop) {
  loop(int64_t{0}, int64_t{cut.end}, cut.least);
  if (cut.end < n) loop(int64_t{cut.end}, n, cut.least + 1);
}

inline void Mark(const int32_t* __restrict keys, int64_t n, Cut cut, uint8_t* __restrict kept) {
  ForStretches(cut, n, [&](int64_t begin, int64_t end, int32_t threshold) {
    for (int64_t i = begin; i < end; ++i) kept[i] = keys[i] >= threshold;
  });
}

// The cut of a row of float32, of which `keys` gets the keys.
inline Cut CutRow(const int32_t* __restrict bits, int64_t n, int64_t k, int32_t* __restrict keys) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = Key(bits[i]);
    top = std::max(top, keys[i]);
  }
  return k < n ? FindCut(keys, n, k, top) : Cut{0, int32_t(n)};
}

}  // namespace wsparse

#endif  // WSPARSE_OPS_CSRC_TOP_K_H_

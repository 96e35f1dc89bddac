// The k largest magnitudes of rows and of matrices, exactly: ties go to the lowest index.

#ifndef WSPARSE_OPS_CSRC_TOP_K_H_
#define WSPARSE_OPS_CSRC_TOP_K_H_

#include <array>

#include "common.h"

namespace wsparse {

// Positive integers that order like magnitudes, from the bits of float32; NaN is one above infinity.
inline int32_t Key(int32_t bits) { return std::min(bits & 0x7fffffff, 0x7f800001) + 1; }

// How many of n keys, fewer than 2^31, reach a threshold above 0.
inline int32_t Count(const int32_t* keys, int64_t n, int32_t threshold) {
  const int32_t below = threshold - 1;  // "greater" is an instruction, "greater or equal" is two
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] > below;
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
  // Interpolation between two counts; an end that stays weighs half as much each time (the Illinois rule).
  bool low_moved = false;
  float weight = 1;
  for (int pass = 1; n_low != k && high - low > 1; ++pass) {
    const float above = (n_low - k + 0.5f) * (low_moved ? 1 : weight);
    const float beneath = (k - n_high + 0.5f) * (low_moved ? weight : 1);
    // Whatever the counts are, one pass in eight halves.
    const float part = pass % 8 == 0 ? 0.5f : above / (above + beneath);
    const int32_t middle = std::clamp<int32_t>(low + int32_t(part * (high - low)), low + 1, high - 1);
    const int64_t count = Count(keys, n, middle);
    const bool enough = count >= k;
    low = enough ? middle : low, high = enough ? high : middle;
    n_low = enough ? count : n_low, n_high = enough ? n_high : count;
    weight = enough == low_moved ? weight / 2 : 1;
    low_moved = enough;
  }
  if (n_low == k) return {low, int32_t(n)};
  int32_t end = 0;
  for (int64_t ties = k - n_high; ties > 0; ++end) ties -= keys[end] == low;
  return {low, end};
}

// A part of a row of which keys above `below` are chosen.
struct Stretch {
  int64_t begin, end;
  int32_t below;
};

// The two stretches of a row of n that a cut divides.
inline std::array<Stretch, 2> Stretches(Cut cut, int64_t n) {
  return {{{0, cut.end, cut.least - 1}, {cut.end, n, cut.least}}};
}

inline void Mark(const int32_t* __restrict keys, int64_t n, Cut cut, uint8_t* __restrict kept) {
  for (const auto [begin, end, below] : Stretches(cut, n)) {
    for (int64_t i = begin; i < end; ++i) kept[i] = keys[i] > below;
  }
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

// What the kernels compute, element by element: shared by routing.cu (GPU) and host.cpp (CPU), and defined once more
// in torch (flowrl_kernels/chunked/routing.py). The same bits on all three.
//
// The threshold. Pairs are ordered by a 22-bit key: the leading bits of their squared cost as a float64, counted from
// 128 octaves under the budget of the squares (what lies below shares the first key, what lies above the last).
// Costs are summed as integers, in units of a power of two that leaves the budget about 2^40 of them, each rounded
// up: integer sums have no order. T is the first key at which the sum over all keys up to it breaks a budget; pairs
// with a key below T are dropped. It is found by two histograms: the upper 11 bits, then the lower 11 bits of the bin
// that breaks. Keys are 3e-5 apart, so this loses nothing against a sort that would show in the result.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FLOWRL_INLINE __host__ __device__ inline
#else
#define FLOWRL_INLINE inline
#endif

namespace flowrl {

constexpr int64_t MAX_COUNT = (int64_t{1} << 31) - 1;

// ---- threshold ------------------------------------------------------------------------------------------------

constexpr int BIN_BITS = 11;
constexpr int BINS = 1 << BIN_BITS;
constexpr int KEYS = BINS * BINS;
constexpr int OCTAVE_BITS = 4;  // 16 bins of the first histogram per factor of two
constexpr int KEY_SHIFT = 52 - OCTAVE_BITS - BIN_BITS;

FLOWRL_INLINE int64_t bits_of(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLOWRL_INLINE double power_of_two(int64_t exponent) {  // -1022..1023
  const int64_t bits = (exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Units {
  double scale;  // units per 1.0, a power of two
  double cap;    // what a single pair counts at most: more than the budget
  int64_t limit;  // the budget in units, rounded down
};

FLOWRL_INLINE Units make_units(double budget, int64_t pairs) {
  int room = 0;
  while ((int64_t{1} << room) < pairs) ++room;
  const int bits = room > 10 ? 62 - room : 52;  // pairs * cap <= 2^62, and cap - 1 is a float64
  int64_t exponent = (bits_of(budget) >> 52) - 1023;
  exponent = exponent < -900 ? -900 : exponent > 900 ? 900 : exponent;
  Units units;
  units.scale = power_of_two(bits - 1 - exponent);
  units.cap = power_of_two(bits);
  const double scaled = budget * units.scale;
  units.limit = scaled >= 1.0 ? static_cast<int64_t>(scaled < units.cap ? scaled : units.cap - 1.0) : 0;
  return units;
}

FLOWRL_INLINE int64_t in_units(double value, const Units& units) {
  const double scaled = ceil(value * units.scale);
  return static_cast<int64_t>(scaled >= 0.0 && scaled < units.cap ? scaled : units.cap);  // nan counts as the cap
}

FLOWRL_INLINE int64_t key_base(double square_budget) {
  return ((bits_of(square_budget) >> (52 - OCTAVE_BITS)) - (BINS - 1)) * BINS;
}

FLOWRL_INLINE int key_of(double square, int64_t base) {
  if (!(square >= 0.0)) return KEYS - 1;
  const int64_t key = (bits_of(square) >> KEY_SHIFT) - base;
  return static_cast<int>(key < 0 ? 0 : key > KEYS - 1 ? KEYS - 1 : key);
}

// The bin of a pair in one of the two histograms, or -1: `broken` is the bin of the first that broke a budget.
FLOWRL_INLINE int bin_of(int key, int level, int broken) {
  if (level == 0) return key / BINS;
  return key / BINS == broken ? key % BINS : -1;
}

FLOWRL_INLINE bool within(int64_t cost, int64_t square, const Units& cost_units, const Units& square_units) {
  return cost <= cost_units.limit && square <= square_units.limit;
}

FLOWRL_INLINE bool below(int key, const int32_t* broken) { return key < broken[0] * BINS + broken[1]; }

struct Threshold {  // the workspace of drop_lightest
  unsigned long long bins[2][2][BINS];  // sums of cost and of square per bin, for each level
  int64_t spent[2];  // what everything below the cut adds up to
  int32_t broken[2];  // first bin that breaks a budget, per level; BINS if none does
};

}  // namespace flowrl

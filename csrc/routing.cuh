// What the kernels compute, element by element: shared by routing.cu (GPU) and host.cpp (CPU), and defined once more
// in torch (flowrl_kernels/chunked/routing.py). The same bits on all three, except for exp in tile_costs.
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

// ---- tile costs -----------------------------------------------------------------------------------------------

struct Row {
  float gradient;
  float lse;
  float own;   // softmax mass of the target, rounded down
  float rest;  // softmax mass of everything else, rounded up
  int64_t run;  // run that holds the target
};

FLOWRL_INLINE float half_to_float(uint16_t half) {
  uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const bool finite = magnitude < 0x0f800000u;
  if (!finite) magnitude |= 0x7f800000u;  // inf and nan keep their fraction
  float value;
  memcpy(&value, &magnitude, sizeof value);
  if (finite) value *= 5.192296858534828e33f;  // 2^112, the difference of the exponents; exact for subnormals too
  return (half & 0x8000) ? -value : value;
}

FLOWRL_INLINE Row make_row(
    const float* lse, const int64_t* target, const float* target_logp, const float* gradient, int64_t i,
    int64_t runs, int64_t run_columns, double slack) {
  const int64_t run = target[i] / run_columns;
  Row row;
  row.gradient = gradient[i];
  row.lse = lse[i];
  row.own = expf(target_logp[i]) * static_cast<float>(1.0 - slack);
  row.rest = -expm1f(target_logp[i]) + static_cast<float>(slack);
  row.run = run < runs ? run : runs - 1;
  return row;
}

// Not fmin and fmax: a nan has to come through, so that its pair is never dropped.
FLOWRL_INLINE float run_mass(const Row& row, float stat, int64_t run, double slack) {
  float mass = expf(stat - row.lse) * static_cast<float>(1.0 + slack);
  if (mass > 1.0f) mass = 1.0f;
  if (run == row.run) mass -= row.own;
  if (mass < 0.0f) mass = 0.0f;
  if (!(mass <= row.rest) && mass == mass) mass = row.rest;
  return mass;
}

struct Sums {
  double cost;
  double square;
};

// Row i in the runs of one tile, in their order.
FLOWRL_INLINE Sums tile_sums(
    const Row& row, const uint16_t* tile_lse, int64_t stride, int64_t i, int64_t tile, int64_t num_runs,
    int64_t tile_runs, double slack) {
  const int64_t last_run = num_runs - tile * tile_runs < tile_runs ? num_runs : (tile + 1) * tile_runs;
  Sums sums = {0.0, 0.0};
  for (int64_t run = tile * tile_runs; run < last_run; ++run) {
    const float stat = half_to_float(tile_lse[run * stride + i]);
    const double mass = run_mass(row, stat, run, slack) * row.gradient;
    sums.cost += mass;
    sums.square += mass * mass;  // exact before the sum: 24 bits times 24 bits
  }
  return sums;
}

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

// ---- segment sums ---------------------------------------------------------------------------------------------

constexpr int SEGMENT_LANES = 256;  // a sequence is summed by 256 lanes, then folded in halves

FLOWRL_INLINE int64_t sequence_edge(const void* cu_seqlens, int64_t index_bytes, int64_t i, int64_t tokens) {
  const int64_t edge = index_bytes == 4 ? static_cast<const int32_t*>(cu_seqlens)[i]
                                        : static_cast<const int64_t*>(cu_seqlens)[i];
  return edge < 0 ? 0 : edge > tokens ? tokens : edge;
}

FLOWRL_INLINE double lane_sum(const float* values, int64_t first, int64_t last, int lane) {
  double sum = 0.0;
  for (int64_t i = first + lane; i < last; i += SEGMENT_LANES) sum += values[i];
  return sum;
}

}  // namespace flowrl

// What the kernels of `segment_reduce` compute with; see csrc/ops/segment_reduce.h for the contract.
//
// Work is cut so that one huge segment does not occupy one thread, in a way that the arguments alone decide. The slots are
// divided into cells of `segment_cell` slots. A segment of at most that many slots is reduced at once. A longer one is
// reduced in pieces, one per cell that it meets, and the pieces are merged in order. A cell meets at most two long
// segments: piece 0 belongs to the one that holds its first slot but started before it, piece 1 to the one that starts in
// it and holds its last slot.
#pragma once

#include <stdint.h>

#include "common/math.h"

namespace scalegmn {

enum class Reduction { sum, mean, min, max, var, std };

constexpr int64_t segment_cell = 512;
constexpr int max_reductions = 6;

// Moments are taken of x - pivot, pivot being the segment's first row: their mean, the offset, has the size of the deviations
// and not of x, so neither var nor its gradient loses accuracy however far from 0 the rows lie.
//
// Rows are contiguous. Index is int32_t, or int64_t if wide_index; Wide is what Scalar accumulates in.
struct SegmentReduceArgs {
  int64_t rows, width, segments;
  int64_t slots;  // CPU: ptr[segments]. CUDA: an upper bound, since only the device knows
  Scalar dtype;   // of x, out, grad, grad_x
  bool wide_index;
  int num_reductions;
  Reduction reductions[max_reductions];
  bool sum, moments, min, max;  // what has to be accumulated
  double eps;
  const void* x;      // [rows, width]
  const void* ptr;    // Index [segments + 1]
  const void* order;  // Index [slots], or null: slot k is row k
  void* out;          // [segments, num_reductions, width]
  void* arg;          // Index [segments, min + max, width], in the order of the names
  void* means;        // Wide [segments, 2, width]: instead of out and arg, the offset and the variance (see below)
  void* partial;      // Wide [cells, 2, 5, width]: sum, offset, squared deviations, min, max of a cell's pieces
  void* partial_at;   // int64 [cells, 2, 2, width]: slots of min and max
  // backward
  const void* grad;             // [segments, num_reductions, width]
  const void* coefficients;     // Wide [segments, 3 or 1, width]: constant, slope, pivot, or constant alone
  const void* segment_of_slot;  // Index [slots], -1 for slots of no segment (CUDA)
  const void* row_ptr;          // Index [rows + 1] and
  const void* row_slots;        // Index [slots]: slots of each row, ascending; null: slot k is row k
  void* grad_x;                 // [rows, width]
};

// The last cell is there for empty segments behind the last slot.
inline int64_t segment_cells(int64_t slots) { return slots / segment_cell + 1; }

namespace SCALEGMN_ISA {

// The first segment s with ptr[s] >= slot, of segments + 1 entries.
template <class Index>
SCALEGMN_HD int64_t first_at(const Index* ptr, int64_t segments, int64_t slot) {
  int64_t low = 0, high = segments + 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (int64_t(ptr[middle]) < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The segment that holds a slot below ptr[segments].
template <class Index>
SCALEGMN_HD int64_t segment_holding(const Index* ptr, int64_t segments, int64_t slot) {
  return first_at(ptr, segments, slot + 1) - 1;
}

// Slots [begin, end) in a cell of a long segment that starts at slot `start`; begin = end if there is no such piece.
template <class Index>
SCALEGMN_HD void piece_of_cell(const Index* ptr, int64_t segments, int64_t cell, int part, int64_t& start,
                               int64_t& begin, int64_t& end) {
  const int64_t first = cell * segment_cell, last = first + segment_cell - 1, slots = ptr[segments];
  const int64_t slot = part == 0 ? first : last;
  start = begin = end = 0;
  if (slot >= slots) return;
  const int64_t segment = segment_holding(ptr, segments, slot);
  const int64_t from = ptr[segment], to = ptr[segment + 1];
  if (to - from <= segment_cell || (part == 0) != (from < first)) return;
  start = from;
  begin = part == 0 ? first : from;
  end = to <= last ? to : last + 1;
}

// Welford's update with the n-th value (less the pivot).
template <class A>
SCALEGMN_HD void add_moments(A& mean, A& squares, A value, A inverse_n) {
  const A difference = value - mean;
  mean += difference * inverse_n;
  squares += difference * (value - mean);
}

// The moments of n values joined by those of m more, m > 0.
template <class A>
SCALEGMN_HD void merge_moments(A& mean, A& squares, A n, A other_mean, A other_squares, A m) {
  const A difference = other_mean - mean, share = m / (n + m);
  mean += difference * share;
  squares += other_squares + difference * difference * n * share;
}

// Ties keep the earlier slot; the first NaN wins.
template <class A>
SCALEGMN_HD bool below(A value, A least) {
  return (value < least) | ((value != value) & (least == least));
}

template <class A>
SCALEGMN_HD bool above(A value, A most) {
  return (value > most) | ((value != value) & (most == most));
}

template <class A>
SCALEGMN_HD A deviation(A variance, A eps) {
  return variance <= eps ? A(0) : square_root(variance);  // NaN stays
}

// What the gradient of std adds to the slope: g / (n std).
template <class A>
SCALEGMN_HD A deviation_slope(A grad, A variance, A eps, A n) {
  return variance <= eps ? A(0) : grad / (n * square_root(variance));
}

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

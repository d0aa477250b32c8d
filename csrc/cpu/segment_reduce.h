// CPU kernels of `segment_reduce`. Each takes a range of cells, segments or rows; any split over threads gives the same
// bits. `scratch` is the caller's, of segment_scratch(width) doubles.
#pragma once

#include "common/segment_reduce.h"
#include "cpu/isa.h"

namespace scalegmn {

inline int64_t segment_scratch(int64_t width) { return 8 * width; }

// The segments that start in the cells [begin, end) and have no more slots than a cell, and the pieces of longer ones.
SCALEGMN_DECLARE_CPU(segment_cells_forward, const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch)
// The long ones of the segments [begin, end), from their pieces.
SCALEGMN_DECLARE_CPU(segment_merge, const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch)
// args.coefficients of the segments [begin, end).
SCALEGMN_DECLARE_CPU(segment_coefficients, const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch)
// args.grad_x of the rows [begin, end).
SCALEGMN_DECLARE_CPU(segment_rows_backward, const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch)

}  // namespace scalegmn

// CPU kernels of `symmetrize`: rows [begin, end), or blocks [begin, end), of the arguments. Any split over threads gives
// the same bits. `scratch` is the caller's, of symmetrize_scratch(width) doubles.
#pragma once

#include "common/symmetrize.h"
#include "cpu/isa.h"

namespace scalegmn {

inline int64_t symmetrize_scratch(int64_t width) { return 8 * width; }

SCALEGMN_DECLARE_CPU(symmetrize_forward, const SymmetrizeArgs& args, int64_t begin, int64_t end, double* scratch)
SCALEGMN_DECLARE_CPU(symmetrize_backward, const SymmetrizeArgs& args, int64_t begin, int64_t end, double* scratch)

}  // namespace scalegmn

// The row kernels of the composed `row_program` on one thread of a CPU. They show without a GPU that the driver and the
// rows' arithmetic are right; CPU tensors are otherwise served by csrc/cpu/row_program.h, which is many times faster.
#pragma once

#include "common/row_kernels.h"
#include "cpu/isa.h"

namespace scalegmn {

SCALEGMN_DECLARE_CPU(fill_row_kernels, RowKernels& kernels)

}  // namespace scalegmn

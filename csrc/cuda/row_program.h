// The row kernels of the composed `row_program` (csrc/ops/row_program_composed.h), asynchronous, on a cudaStream_t of the
// current device.
#pragma once

#include "common/row_kernels.h"

namespace scalegmn {

RowKernels row_kernels_cuda();

// Whether what is launched on the stream goes into a CUDA graph.
bool is_capturing(void* stream);

}  // namespace scalegmn

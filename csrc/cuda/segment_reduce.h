// Launchers of the CUDA kernels of `segment_reduce`, on `stream` (a cudaStream_t) of the current device. Asynchronous;
// return null, or the error of the launch.
#pragma once

#include "common/segment_reduce.h"

namespace scalegmn {

// out and arg, or means if that is set. Uses partial and partial_at if slots > segment_cell.
const char* segment_reduce_forward_cuda(const SegmentReduceArgs& args, void* stream);

// Fills coefficients (from grad, and from means where args.moments) and segment_of_slot, then grad_x.
const char* segment_reduce_backward_cuda(const SegmentReduceArgs& args, void* stream);

}  // namespace scalegmn

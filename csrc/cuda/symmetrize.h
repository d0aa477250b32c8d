// Launchers of the CUDA kernels of `symmetrize`, on `stream` (a cudaStream_t) of the current device. Asynchronous; return
// null, or the error of the launch.
#pragma once

#include "common/symmetrize.h"

namespace scalegmn {

const char* symmetrize_forward_cuda(const SymmetrizeArgs& args, void* stream);

// Also sums args.partial over its blocks into `sums` (Wide [3, width]) if it is wanted.
const char* symmetrize_backward_cuda(const SymmetrizeArgs& args, void* sums, void* stream);

}  // namespace scalegmn

// Large buffers that are given back and taken again, instead of being mapped and faulted in at every call.
//
// A fresh buffer of a training step costs a page fault per 4 KiB, more than the arithmetic that fills it. Blocks of at
// least `pool_smallest` bytes are kept when they are freed, up to SCALEGMN_FAST_POOL_MB megabytes (512 by default, 0: off).
// A block serves requests of at least 3/4 of its size. Smaller ones, and all of them while PyTorch fills uninitialised
// memory, come from PyTorch's allocator.
#pragma once

#include <ATen/core/Tensor.h>

namespace scalegmn {

constexpr int64_t pool_smallest = 1 << 18;

// An uninitialised contiguous CPU tensor.
at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype);

// As at::empty; of the pool on the CPU.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// The tensor itself if it has the dtype, else a copy in it.
at::Tensor pooled_cast(const at::Tensor& tensor, at::ScalarType dtype);

}  // namespace scalegmn

// segment_reduce: rows x [R, d] contiguous, reduced over S segments -> out [S, K, d] for K names, arg [S, A, d] for the A
// names out of min and max, in their order. Outputs are overwritten, never accumulated into.
//
// ptr [S + 1] int32 or int64, nondecreasing from 0; segment s has the slots ptr[s] .. ptr[s + 1] - 1. Slot k reads row
// order[k], or row k without order; order has ptr's dtype and ptr[S] entries, in no particular order, repeats allowed.
// Values of ptr and order are checked on the CPU. On a GPU they are the caller's responsibility.
//
// Empty segments give 0, and arg -1. arg holds rows of x; of equal values, the one in the first slot; of several NaN,
// likewise, and a NaN beats every number. var divides by n. std is sqrt(var) where var > eps, else 0.
// Accumulates in float, in double for float64. Deterministic: the order of every sum follows from the arguments.
//
// segment_reduce_backward: gradient for x. Rows in no slot get 0, rows in several slots the sum in slot order. `arg` is
// forward's; `out` is not read, mean and variance are computed again (unrounded). x is read, and has to be contiguous,
// only for var and std.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace scalegmn {

std::tuple<at::Tensor, at::Tensor> segment_reduce(const at::Tensor& x, const at::Tensor& ptr,
                                                  const std::optional<at::Tensor>& order,
                                                  const c10::List<std::string>& reduce, double eps);

at::Tensor segment_reduce_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& ptr,
                                   const std::optional<at::Tensor>& order, const at::Tensor& arg, const at::Tensor& out,
                                   const c10::List<std::string>& reduce, double eps);

}  // namespace scalegmn

// The composed engine of `row_program` (csrc/ops/row_program.h): every program, width and dtype on a GPU, as products of
// the library and row kernels (csrc/common/row_kernels.h), one after the other on a chunk of rows whose values stay in the
// L2 cache. A chunk's rows follow from the widths of the program alone. Backward runs a chunk's steps again and then
// their derivatives in reverse.
//
// Products: at::mm and at::addmm in Wide, so float32 ones follow torch.get_float32_matmul_precision(); of bfloat16
// rows, added up in float32, where the weight is bfloat16. Gradients of weights are added chunk by chunk, those of
// gathered rows by runs of equal indices, sorted once per call. Sums, too, are added chunk by chunk; statistics and
// attention collect the rows that they reduce, [R, d] in Wide for the time of the call.
//
// What indices and segments hold is not checked: nothing waits for the device, so a CUDA graph can capture a call (with
// the dropout masks of its seed). Deterministic: no atomics, and every sum's order follows from the arguments.
//
// Serves CUDA tensors, and in tests CPU tensors, with the kernels of csrc/cpu/row_kernels.h. chunk_rows: the rows of a
// chunk; 0: as the widths have it.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace scalegmn {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_program_composed(
    at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
    at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
    int64_t chunk_rows);

std::vector<at::Tensor> row_program_composed_backward(
    const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced, const at::Tensor& kept,
    const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
    at::IntArrayRef code, at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
    const std::optional<at::Tensor>& seed, const c10::List<bool>& wanted, int64_t chunk_rows);

}  // namespace scalegmn

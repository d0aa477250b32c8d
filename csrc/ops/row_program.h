// row_program: runs programs of row operations on rows [0, R) -> sums [S, d] of one result per segment, and another
// result's rows [R', d'].
//
// The rows are divided at `bounds` (from 0, nondecreasing, the last is R) into sections, each with a program of its own.
// `code` holds for every section: the number of steps, the step whose result is added up per segment and the step whose
// rows are written (-1: none), then 8 numbers per step: operation, a, b (earlier steps), t0, t1, t2 (tensors), index,
// activation; -1 where absent. `constants` holds 2 numbers per step of all sections. Operations: csrc/cpu/row_program.h.
//
//   load, load_mul, load_add   t0: table [*, d], row by row, or by `index` (whose entries name its rows)
//   scale                      t0: table [*, 1]
//   linear                     t0: weight [d, d of a]; t1: bias [d]
//   add_vector                 t0: [d]
//   symmetrize, norm_act       t0: bias [d] (symmetrize); t1, t2: weight and bias of the layer norm [d]; constant 0: w0
//   normalize                  constant 0: eps
//   dropout                    constant 0: p; constant 1: the number of the mask; the masks are a function of seed [2]
//
// ptr [S + 1] int64 from 0 to R, nondecreasing: the rows of each segment; sums of segments without rows, and without a
// program that adds up, are 0. Sections that write rows come first: R' is the end of the last of them.
//
// float32, float64, bfloat16 or float16; computes in float, in double if a tensor is float64. Results have the promoted
// dtype of the tables. Nothing of size R is kept but the results. Backward runs the programs again, tile by tile, and
// returns the gradients of the tensors that `wanted` names, and empty tensors of shape [0] for the others.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace scalegmn {

std::tuple<at::Tensor, at::Tensor> row_program(at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
                                               at::IntArrayRef code, at::ArrayRef<double> constants,
                                               const std::optional<at::Tensor>& ptr,
                                               const std::optional<at::Tensor>& seed);

std::vector<at::Tensor> row_program_backward(const at::Tensor& grad_sums, const at::Tensor& grad_rows,
                                             at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
                                             at::IntArrayRef code, at::ArrayRef<double> constants,
                                             const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
                                             const std::vector<bool>& wanted);

}  // namespace scalegmn

// row_program: runs programs of row operations on rows [0, R) -> one result reduced per segment, and another result's
// rows [R', d'].
//
// The rows are divided at `bounds` (from 0, nondecreasing, the last is R) into sections, each with a program of its own.
// `code` holds for every section: the number of steps, the step whose rows are written, the kind of reduction, the step
// that is reduced per segment, the step of its logits (-1: none), then 8 numbers per step: operation, a, b (earlier
// steps), t0, t1, t2 (tensors), index, activation; -1 where absent. `constants` holds 2 numbers per step of all sections.
// Operations and kinds of reductions: csrc/cpu/row_program.h.
//
//   load, load_mul, load_add   t0: table [*, d], row by row, or by `index` (whose entries name its rows)
//   scale                      t0: table [*, 1]
//   linear                     t0: weight [d, d of a]; t1: bias [d]
//   add_vector                 t0: [d]
//   symmetrize, norm_act       t0: bias [d] (symmetrize); t1, t2: weight and bias of the layer norm [d]; constant 0: w0
//   normalize                  constant 0: eps
//   dropout                    constant 0: p; constant 1: the number of the mask; the masks are a function of seed [2]
//   head_dot                   a, b: [d]; constant 0: scale; constant 1: the number of heads, a divisor of d
//
// ptr [S + 1] int64 from 0 to R, nondecreasing: the rows of each segment. All sections that reduce do so alike; sections
// with statistics or attention consist of whole segments. What is reduced is 0 for segments without rows, and without a
// program that reduces. Sections that write rows come first: R' is the end of the last of them.
//
// Returns what is reduced, the rows, and two tensors that backward reads ([0] where it reads none; csrc/cpu/row_program.h
// says what they hold).
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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_program(
    at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
    at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed);

std::vector<at::Tensor> row_program_backward(const at::Tensor& grad_reduced, const at::Tensor& grad_rows,
                                             const at::Tensor& reduced, const at::Tensor& kept,
                                             const at::Tensor& extremes,
                                             at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
                                             at::IntArrayRef code, at::ArrayRef<double> constants,
                                             const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
                                             const std::vector<bool>& wanted);

}  // namespace scalegmn

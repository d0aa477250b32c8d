// symmetrize: rows h [R, d] contiguous -> out [R, d], overwritten, never accumulated into.
//
//   activation: act(LN(h + bias)) + act(LN(-h + bias)), LN where norm_weight and norm_bias are given (both or none)
//   abs:        |h|, gradient 0 at 0
//   normalize:  h / (||h|| + eps); rows of norm 0 give 0 with zero gradient
//
// h is float32, float64, bfloat16 or float16; parameters [d] are of any of these and on h's device. Computes in float,
// in double for float64. NaN and infinities give what the formula gives. R = 0 is fine and gives parameter gradients 0.
//
// Gradients of parameters are summed per block of rows, then over the blocks in order; blocks depend on R alone. Those
// of absent parameters are empty tensors of shape [0]. grad must be contiguous and of h's shape and dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace scalegmn {

at::Tensor symmetrize(const at::Tensor& h, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
                      std::string_view kind, std::string_view activation, double eps, double w0);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> symmetrize_backward(
    const at::Tensor& grad, const at::Tensor& h, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias, std::string_view kind,
    std::string_view activation, double eps, double w0);

}  // namespace scalegmn

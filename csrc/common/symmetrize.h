// What the kernels of `symmetrize` compute with; see csrc/ops/symmetrize.h for the contract.
#pragma once

#include <stdint.h>

#include "common/math.h"

namespace scalegmn {

enum class Kind { activation, abs, normalize };

// Rows are contiguous. `Wide` is what Scalar accumulates in: float, or double for f64.
struct SymmetrizeArgs {
  int64_t rows;
  int64_t width;
  Scalar dtype;  // of h, out, grad, grad_h
  Kind kind;
  Activation activation;
  double eps;  // of kind normalize; of the layer norm for kind activation
  double w0;
  const void* h;       // [rows, width]
  const void* bias;    // Wide [width]; zeros where there is none; minus its mean where there is a norm
  const void* weight;  // Wide [width], or null: no layer norm
  const void* shift;   // Wide [width]
  void* out;           // [rows, width]; forward
  const void* grad;    // [rows, width]; backward, as are the rest
  void* grad_h;        // [rows, width]
  void* partial;       // Wide [blocks, 3, width]: sums for bias, weight and shift per block of rows; null: none wanted
  int64_t block_rows;  // rows of a block
};

// Rows of the blocks whose parameter gradients are summed first: a function of the number of rows alone, such that a CPU
// core has enough to do in a block, and a GPU enough blocks.
inline int64_t symmetrize_block_rows(int64_t rows, bool gpu) {
  const int64_t most_blocks = gpu ? 4096 : 1024, fewest_rows = gpu ? 8 : 32;
  const int64_t needed = (rows + most_blocks - 1) / most_blocks;
  return needed < fewest_rows ? fewest_rows : needed;
}

namespace SCALEGMN_ISA {

// A power of two that brings a row's largest magnitude to where squares neither overflow nor vanish in float.
template <class A>
SCALEGMN_HD A safe_factor(A largest) {
  return largest > A(0x1p50) ? A(0x1p-70) : largest < A(0x1p-50) ? A(0x1p90) : A(1);
}

// h / (||h|| + eps) of a row from its norm times `factor`: out = h * scale. 0 where the norm is 0.
template <class A>
SCALEGMN_HD A normalize_scale(A scaled_norm, A factor, A eps) {
  return scaled_norm == A(0) ? A(0) : A(1) / (scaled_norm + eps * factor);
}

// Gradient with respect to z of (z - mean) / sqrt(var + eps), from the gradient of the result, the result, and the means
// over the row of that gradient and of its product with the result.
template <class A>
SCALEGMN_HD A standardize_backward(A grad, A normal, A rstd, A mean_grad, A mean_product) {
  return rstd * (grad - mean_grad - normal * mean_product);
}

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

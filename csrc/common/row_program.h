// The steps of `row_program` as its engines run them; see csrc/ops/row_program.h for the contract.
#pragma once

#include <stdint.h>

#include "common/math.h"

namespace scalegmn {

enum class RowOp {
  load,        // table[index or row]
  load_mul,    // a * table[index or row]
  load_add,    // a + table[index or row]
  scale,       // a * table[row], a table of width 1
  linear,      // a weight^T + bias
  add,         // a + b
  mul,         // a * b
  negate,      // -a
  add_vector,  // a + bias
  symmetrize,  // act(LN(a + bias)) + act(LN(-a + bias))
  norm_act,    // act(LN(a))
  abs,         // |a|
  normalize,   // a / (||a|| + eps)
  dropout,     // a / (1 - p) where the row and column are kept, else 0
  concat,      // [a, b]
  head_dot,    // scale * <a, b> per head
};

// What becomes of a step's rows in their segment.
enum class RowReduction {
  none,
  sum,         // [d]
  statistics,  // [4 d]: mean, variance, least, largest; 0 without rows
  attention,   // [d]: the sum weighted by the softmax of another step's rows, head by head; 0 without rows
};

// Wide is float, or double if a table or parameter is float64. Parameters are Wide; pointers are null where absent.
struct RowStep {
  RowOp op;
  int a, b;           // steps read; -1: none
  int table, index;   // -1: none
  int use;            // of the table by the index, among all such pairs; -1: none
  Activation activation;
  int64_t width;      // of the result
  int64_t in_width;   // of a
  double p0, p1;      // dropout: p, stream; normalize: eps; activations: w0; head_dot: scale
  const void* weight; // linear (CPU engine) [width, in_width], rows weight_stride apart; norms [width]
  int64_t weight_stride;
  // linear (CPU engine), null where no product of rows serves the step: float weight^T [in_width, width], packed; or of
  // bfloat16 both weight^T and weight in pairs of rows
  const float* weight_t;
  const uint16_t *pairs_t, *pairs;
  const void* bias;   // linear, add_vector, symmetrize [width]
  const void* shift;  // norms [width]
  bool used;          // whether an output depends on it
  bool wants_grad;    // whether a wanted gradient depends on its gradient
  bool writes_a, writes_b;  // backward: the first contribution to the gradient of a, of b
  bool passes_a;            // backward: the step's gradient is the first contribution to a's, and in the same place
  bool writes_table;        // backward: the only contribution to the rows of the table, which is read by row number
  int64_t value;      // offsets into a tile's workspace, in Wide; -1: none
  int64_t aux;        // derivatives of the activation, one per branch
  int64_t stats;      // mean and 1 / deviation per branch
  // CPU engine, a load through an index that linear steps alone read: value and gradient hold the distinct rows of a tile.
  // Here are, as int32, their number, the place of each row among them, and the first row at each place. -1: another step.
  int64_t distinct;
  int64_t grad;
  int64_t weight_grad, bias_grad, shift_grad;  // offsets into a section's parameter gradients; -1: not wanted
};

struct RowTable {
  const void* data;
  Scalar dtype;
  int64_t rows, width, stride;
  void* grad;        // direct rows: Wide [rows, width], or null
  bool direct;       // read by row number, not through an index
};

struct RowIndex {
  const void* data;
  bool wide;
};

constexpr double row_norm_eps = 1e-5;

namespace SCALEGMN_ISA {

SCALEGMN_HD int64_t index_at(const RowIndex& index, int64_t row) {
  return index.wide ? static_cast<const int64_t*>(index.data)[row] : int64_t(static_cast<const int32_t*>(index.data)[row]);
}

// A counter-based generator: a dropout mask depends on the seed, the stream, the row and the column alone. The mixing
// function is the 32-bit finaliser "lowbias32" by C. Wellons.
SCALEGMN_HD uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

SCALEGMN_HD uint32_t dropout_stream(uint32_t seed0, uint32_t seed1, double stream) {
  return mix(seed0 + mix(seed1 + mix(uint32_t(stream))));
}

// A number is kept where its hash is at least this.
SCALEGMN_HD uint32_t dropout_threshold(double probability) { return uint32_t(probability * 4294967296.0); }

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

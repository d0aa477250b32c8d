// CPU engine of `row_program`: runs a program of row operations over tiles of rows that stay in the cache; see
// csrc/ops/row_program.h for the contract. Rows are cut into partitions, a function of the arguments' sizes alone, and a
// partition into tiles. What partitions contribute to the same place is kept apart and joined in the order of the
// partitions, so the number of threads does not change a bit.
#pragma once

#include "common/math.h"
#include "cpu/isa.h"
#include "cpu/tile_gemm.h"

namespace scalegmn {

constexpr int64_t most_tile_rows = 256;

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

// Wide is float, or double if every table and parameter is float64. Parameters are Wide; pointers are null where absent.
struct RowStep {
  RowOp op;
  int a, b;           // steps read; -1: none
  int table, index;   // -1: none
  int use;            // of the table by the index, among all such pairs; -1: none
  Activation activation;
  int64_t width;      // of the result
  int64_t in_width;   // of a
  double p0, p1;      // dropout: p, stream; normalize: eps; activations: w0; head_dot: scale
  const void* weight; // linear [width, in_width], rows weight_stride apart; norms [width]
  int64_t weight_stride;
  // linear, null where no product of rows serves the step: float weight^T [in_width, width], packed; or of bfloat16 both
  // weight^T and weight in pairs of rows
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
  // A load through an index that linear steps alone read: value and gradient hold the distinct rows of a tile. Here are,
  // as int32, their number, the place of each row among them, and the first row at each place. -1: another step.
  int64_t distinct;
  int64_t grad;
  int64_t weight_grad, bias_grad, shift_grad;  // offsets into a partition's parameter gradients; -1: not wanted
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

// Where a partition adds the gradients of a table's rows that it reads through an index: Wide [*, width] for the rows
// from `first` on, or, with `local`, for the rows that occur: local[r] is the place of the partition's row r.
struct RowScatter {
  void* to;  // null: not wanted
  int64_t first;
  const int32_t* local;
};

// The program of a range of rows.
struct RowSection {
  const RowStep* steps;
  int num_steps;
  int reduced_step, rows_step;  // whose results are reduced per segment, and written as rows; -1: none
  int logits_step;              // attention: whose results, one per head, weigh them
};

struct RowProgramArgs {
  const RowTable* tables;
  const RowIndex* indices;
  bool wide_compute;  // double
  int64_t tile_rows;
  bool backward;
  uint32_t seed0, seed1;
  Gemm32 gemm32;
  Gemm64 gemm64;
  RowGemm32 row32;
  RowGemm16 row16;
  int64_t scratch;       // offset of what a single step may use of the workspace
  int64_t spread;        // offset of a linear step's results, or their gradients, on distinct rows
  // outputs
  RowReduction reduction;
  const int64_t* ptr;            // [segments + 1] from 0
  int64_t segments, width, heads;  // of what is reduced
  void* reduced;                 // Wide [segments, width or 4 width]: forward result
  // What a reduction keeps for backward. statistics: Wide [segments, 2 width], the first row and the mean of the others'
  // differences to it, and the rows of the extremes, int32 [segments, 2 width]. attention: Wide [segments, 2 heads], the
  // largest logit and 1 / the sum of the weights.
  void* kept;
  int32_t* extremes;
  void* rows_out;                // dtype rows_dtype [rows, width]
  Scalar rows_dtype;
  const void* grad_reduced;      // backward: rows of rows_dtype
  const void* along;             // backward, attention: Wide [segments, heads], <result, its gradient> per head
  const void* grad_rows;
};

struct RowPartition {
  const RowSection* section;
  int64_t begin, end;   // rows
  void* workspace;      // Wide, of the thread
  void* head;           // forward: Wide [width], the sum of the first segment if it began before this partition (other
                        // reductions have no such segments)
  void* parameters;     // backward: Wide, gradients of parameters
  const RowScatter* scatters;  // backward: per use
};

SCALEGMN_DECLARE_CPU(row_program_run, const RowProgramArgs& args, const RowPartition& partition)

}  // namespace scalegmn

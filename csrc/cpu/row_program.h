// CPU engine of `row_program`: runs a program of row operations over tiles of rows that stay in the cache; see
// csrc/ops/row_program.h for the contract. Rows are cut into partitions, a function of the arguments' sizes alone, and a
// partition into tiles. What partitions contribute to the same place is kept apart and joined in the order of the
// partitions, so the number of threads does not change a bit.
#pragma once

#include "common/row_program.h"
#include "cpu/isa.h"
#include "cpu/tile_gemm.h"

namespace scalegmn {

constexpr int64_t most_tile_rows = 256;

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

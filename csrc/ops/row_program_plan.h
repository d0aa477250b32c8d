// What every engine of `row_program` does before it runs: reads the code (csrc/ops/row_program.h), checks it against the
// tensors, finds which steps are needed, and lays out where their values and gradients are kept. Looks at shapes and
// dtypes alone, never at what indices or segments hold, so nothing waits for a device.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/row_program.h"

namespace scalegmn {

class RowProgramPlan {
 protected:
  struct Section {
    int64_t begin, end;
    int reduced_step, rows_step, logits_step;
    std::vector<RowStep> steps;
    std::vector<std::array<int64_t, 3>> operands;  // tensors t0, t1, t2 of each step
    int64_t slots = 0;                             // of the values and gradients, in Wide per row
    int64_t parameters = 0;                        // Wide numbers of the gradients
    std::map<int64_t, int64_t> parameter_at;       // tensor -> offset
  };

  RowProgramPlan(at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
                 at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
                 const std::optional<at::Tensor>& seed);

  std::vector<at::Tensor> tensors_;
  std::vector<bool> wanted_;
  at::ScalarType wide_, result_ = at::kFloat;
  int64_t rows_ = 0, written_rows_ = 0, width_ = -1, rows_width_ = -1;  // -1: nothing reduced, nothing written
  RowReduction reduction_ = RowReduction::none;
  int64_t heads_ = 0, segments_ = 0;
  std::vector<Section> sections_;
  std::vector<at::Tensor> index_tensors_;
  std::vector<RowIndex> index_views_;
  std::vector<std::pair<int64_t, bool>> table_keys_;  // tensor, direct
  std::vector<RowTable> tables_;
  std::vector<std::pair<int, int>> uses_;  // table, index
  at::Tensor ptr_;
  at::Tensor seed_;

  int64_t reduced_width() const { return reduction_ == RowReduction::statistics ? 4 * width_ : width_; }
  std::vector<int64_t> kept_sizes() const;

  // Checks backward's arguments. The two gradients in the results' dtype, contiguous.
  std::pair<at::Tensor, at::Tensor> check_gradients(const at::Tensor& grad_reduced, const at::Tensor& grad_rows,
                                                    const at::Tensor& reduced, const at::Tensor& kept,
                                                    const at::Tensor& extremes, const std::vector<bool>& wanted);

  // Which steps' gradients are wanted, and where they are kept.
  void plan_gradients();
  // Where the steps' values are kept: shared as they die (forward), or all that backward reads; with room for the
  // derivatives of activations and what norms divide by if backward is to find them. If equal rows are shared, loads that
  // linear steps alone read keep the distinct rows of a tile.
  void plan_values(bool backward, bool keeps_derivatives, bool shares_rows = false);
  void plan_parameters();

  // Whether every row of a table that is read by row number gets its gradient written, and not added to.
  bool covered(int table) const;
  // The gradients in their tensors' dtypes, 0 where none was found and [0] where none is wanted.
  std::vector<at::Tensor> finished(std::vector<at::Tensor> found) const;

  const void* keep(at::Tensor tensor) {
    owned_.push_back(std::move(tensor));
    return owned_.back().const_data_ptr();
  }

 private:
  std::vector<at::Tensor> owned_;

  void add_index(const at::Tensor& index);
  const at::Tensor& operand(int64_t number, const char* what) const;
  int table(int64_t number, bool direct);
  int use(int table, int index);
  const void* vector(int64_t number, int64_t width, const char* what, bool centred = false);
  void parse(at::IntArrayRef bounds, at::IntArrayRef code, at::ArrayRef<double> constants);
  void set_reduction(Section& section, int64_t kind, int64_t count);
  void add_step(Section& section, at::IntArrayRef numbers, double p0, double p1, std::optional<at::ScalarType>& result);
  static void mark_used(Section& section);
  void check_tables(const Section& section) const;
};

}  // namespace scalegmn

#include "ops/row_program_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ops/common.h"

namespace scalegmn {
namespace {

constexpr int64_t section_numbers = 5, step_numbers = 8;

// Whether each row of the result depends on the same row of a alone and has its width.
bool works_in_place(RowOp op) {
  return op != RowOp::load && op != RowOp::linear && op != RowOp::concat && op != RowOp::head_dot;
}

int tables_of(RowOp op) { return op <= RowOp::scale ? 1 : 0; }

// Offsets of buffers of equal rows, in numbers per row; freed ones are used again.
struct Slots {
  std::multimap<int64_t, int64_t> idle;
  int64_t total = 0;

  int64_t take(int64_t width) {
    const auto found = idle.find(width);
    if (found == idle.end()) {
      total += width;
      return total - width;
    }
    const int64_t at = found->second;
    idle.erase(found);
    return at;
  }
  void give(int64_t width, int64_t at) { idle.emplace(width, at); }
};

template <class Section>
bool is_output(const Section& section, int step) {
  return step == section.reduced_step || step == section.rows_step || step == section.logits_step;
}

}  // namespace

RowProgramPlan::RowProgramPlan(at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
                               at::IntArrayRef code, at::ArrayRef<double> constants,
                               const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed)
    : tensors_(tensors.begin(), tensors.end()), wanted_(tensors.size(), false) {
  TORCH_CHECK_VALUE(bounds.size() >= 2 && bounds[0] == 0, "bounds: expected at least two numbers from 0, got ", bounds);
  TORCH_CHECK_VALUE(!tensors_.empty(), "tensors: expected at least one, got none");
  const at::Device device = tensors_[0].device();
  bool wide = false;
  for (const at::Tensor& tensor : tensors_) {
    TORCH_CHECK_VALUE(tensor.device() == device, "tensors: expected all on ", device, ", got one on ", tensor.device());
    scalar_of(tensor, "tensors");
    wide |= tensor.scalar_type() == at::kDouble;
  }
  wide_ = wide ? at::kDouble : at::kFloat;
  rows_ = bounds.back();
  for (const at::Tensor& index : indices) add_index(index);
  parse(bounds, code, constants);
  if (ptr) {
    TORCH_CHECK_VALUE(ptr->dim() == 1 && ptr->numel() >= 1 && ptr->scalar_type() == at::kLong && ptr->is_contiguous(),
                      "ptr: expected int64 [S + 1], got ", ptr->scalar_type(), " ", ptr->sizes());
    TORCH_CHECK_VALUE(ptr->device() == device, "ptr: expected one on ", device, ", got one on ", ptr->device());
    ptr_ = *ptr;
    segments_ = ptr->numel() - 1;
  }
  TORCH_CHECK_VALUE(ptr || width_ < 0, "ptr: expected int64 [S + 1] for a program that reduces, got none");
  if (seed) {
    TORCH_CHECK_VALUE(seed->numel() == 2 && seed->scalar_type() == at::kLong && seed->is_contiguous(),
                      "seed: expected int64 [2], got ", seed->scalar_type(), " ", seed->sizes());
    TORCH_CHECK_VALUE(seed->device() == device, "seed: expected one on ", device, ", got one on ", seed->device());
    seed_ = *seed;
  }
}

std::vector<int64_t> RowProgramPlan::kept_sizes() const {
  if (reduction_ == RowReduction::statistics) return {segments_, 2 * width_};
  if (reduction_ == RowReduction::attention) return {segments_, 2 * heads_};
  return {0};
}

std::pair<at::Tensor, at::Tensor> RowProgramPlan::check_gradients(
    const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced, const at::Tensor& kept,
    const at::Tensor& extremes, const std::vector<bool>& wanted) {
  TORCH_CHECK_VALUE(wanted.size() == tensors_.size(), "wanted: expected ", tensors_.size(), " flags, got ",
                    wanted.size());
  wanted_ = wanted;
  at::Tensor grads = grad_reduced.to(result_).contiguous(), rows = grad_rows.to(result_).contiguous();
  if (width_ >= 0) {
    const std::array<int64_t, 2> sizes = {segments_, reduced_width()};
    TORCH_CHECK_VALUE(grads.sizes() == at::IntArrayRef(sizes), "grad_reduced: expected ", at::IntArrayRef(sizes), ", got ",
                      grads.sizes());
    TORCH_CHECK_VALUE(kept.sizes() == at::IntArrayRef(kept_sizes()) && kept.scalar_type() == wide_, "kept: expected ",
                      wide_, " ", at::IntArrayRef(kept_sizes()), ", got ", kept.scalar_type(), " ", kept.sizes());
    if (reduction_ == RowReduction::statistics) {
      TORCH_CHECK_VALUE(extremes.scalar_type() == at::kInt && extremes.is_contiguous() && extremes.sizes() == kept.sizes(),
                        "extremes: expected int32 ", kept.sizes(), ", got ", extremes.scalar_type(), " ",
                        extremes.sizes());
    }
    TORCH_CHECK_VALUE(reduction_ != RowReduction::attention || reduced.sizes() == grads.sizes(), "reduced: expected ",
                      grads.sizes(), ", got ", reduced.sizes());
  }
  if (rows_width_ >= 0) {
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == written_rows_ && rows.size(1) == rows_width_,
                      "grad_rows: expected [", written_rows_, ", ", rows_width_, "], got ", rows.sizes());
  }
  return {grads, rows};
}

void RowProgramPlan::add_index(const at::Tensor& index) {
  TORCH_CHECK_VALUE(index.dim() == 1 && index.size(0) >= rows_, "indices: expected [R] with R >= ", rows_, ", got ",
                    index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong,
                   "indices: expected int32 or int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.device() == tensors_[0].device(), "indices: expected all on ", tensors_[0].device(),
                    ", got one on ", index.device());
  index_tensors_.push_back(index.contiguous());
  index_views_.push_back({index_tensors_.back().const_data_ptr(), index.scalar_type() == at::kLong});
}

const at::Tensor& RowProgramPlan::operand(int64_t number, const char* what) const {
  TORCH_CHECK_VALUE(number >= 0 && number < int64_t(tensors_.size()), "code: ", what, " names tensor ", number, " of ",
                    tensors_.size());
  return tensors_[number];
}

int RowProgramPlan::table(int64_t number, bool direct) {
  const std::pair<int64_t, bool> key(number, direct);
  const auto found = std::find(table_keys_.begin(), table_keys_.end(), key);
  if (found != table_keys_.end()) return int(found - table_keys_.begin());
  const at::Tensor& tensor = operand(number, "a table");
  TORCH_CHECK_VALUE(tensor.dim() == 2, "tensors: expected a table [*, d], got ", tensor.sizes());
  at::Tensor rows = tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : tensor.contiguous();
  table_keys_.push_back(key);
  tables_.push_back({keep(rows), scalar_of(rows, "tensors"), rows.size(0), rows.size(1), rows.stride(0), nullptr,
                     direct});
  return int(tables_.size()) - 1;
}

int RowProgramPlan::use(int table, int index) {
  const std::pair<int, int> key(table, index);
  const auto found = std::find(uses_.begin(), uses_.end(), key);
  if (found != uses_.end()) return int(found - uses_.begin());
  uses_.push_back(key);
  return int(uses_.size()) - 1;
}

const void* RowProgramPlan::vector(int64_t number, int64_t width, const char* what, bool centred) {
  if (number < 0) return nullptr;
  const at::Tensor& tensor = operand(number, what);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == width, "tensors: expected ", what, " [", width, "], got ",
                    tensor.sizes());
  const at::Tensor wide = tensor.to(wide_);
  return keep(centred ? wide.sub(wide.mean()) : wide.contiguous());
}

void RowProgramPlan::parse(at::IntArrayRef bounds, at::IntArrayRef code, at::ArrayRef<double> constants) {
  size_t at = 0, constant = 0;
  std::optional<at::ScalarType> result;
  for (size_t s = 0; s + 1 < bounds.size(); ++s) {
    TORCH_CHECK_VALUE(bounds[s] <= bounds[s + 1], "bounds: expected a nondecreasing sequence, got ", bounds);
    TORCH_CHECK_VALUE(at + section_numbers <= code.size(), "code: expected ", bounds.size() - 1, " sections, got ", s);
    Section section{bounds[s], bounds[s + 1], int(code[at + 3]), int(code[at + 1]), int(code[at + 4]), {}, {}, 0, 0, {}};
    const int64_t count = code[at], kind = code[at + 2];
    at += section_numbers;
    TORCH_CHECK_VALUE(count >= 0 && at + size_t(count * step_numbers) <= code.size() &&
                          constant + size_t(2 * count) <= constants.size(),
                      "code: section ", s, " is cut off");
    for (int64_t k = 0; k < count; ++k, at += step_numbers, constant += 2) {
      add_step(section, code.slice(at, step_numbers), constants[constant], constants[constant + 1], result);
    }
    const auto output = [&](int step, int64_t& width, const char* what) {
      if (step < 0) return;
      TORCH_CHECK_VALUE(step < count, "code: ", what, " is step ", step, " of ", count);
      TORCH_CHECK_VALUE(width < 0 || width == section.steps[step].width, "code: sections differ in the width of ", what);
      width = section.steps[step].width;
    };
    output(section.rows_step, rows_width_, "the rows");
    if (section.reduced_step >= 0) {
      output(section.reduced_step, width_, "what is reduced");
      set_reduction(section, kind, count);
    }
    TORCH_CHECK_VALUE(section.reduced_step < 0 || section.reduced_step != section.rows_step,
                      "code: the rows are also reduced");
    if (section.rows_step >= 0) {
      TORCH_CHECK_VALUE(written_rows_ == section.begin, "code: sections that write rows have to come first");
      written_rows_ = section.end;
    }
    mark_used(section);
    check_tables(section);
    sections_.push_back(std::move(section));
  }
  TORCH_CHECK_VALUE(at == code.size(), "code: ", code.size() - at, " numbers too many");
  if (result) result_ = *result;
}

void RowProgramPlan::set_reduction(Section& section, int64_t kind, int64_t count) {
  TORCH_CHECK_VALUE(kind > 0 && kind <= int64_t(RowReduction::attention), "code: unknown reduction ", kind);
  const RowReduction reduction = RowReduction(kind);
  const bool first = reduction_ == RowReduction::none;
  TORCH_CHECK_VALUE(first || reduction_ == reduction, "code: sections differ in the reduction");
  reduction_ = reduction;
  TORCH_CHECK_VALUE(reduction == RowReduction::sum || rows_ <= INT32_MAX, "bounds: expected at most 2^31 - 1 rows, got ",
                    rows_);
  if (reduction != RowReduction::attention) return;
  const int logits = section.logits_step;
  TORCH_CHECK_VALUE(logits >= 0 && logits < count && logits != section.reduced_step && logits != section.rows_step,
                    "code: logits are step ", logits, " of ", count);
  for (const RowStep& step : section.steps) {
    TORCH_CHECK_VALUE(step.a != logits && step.b != logits, "code: logits are read by another step");
  }
  const int64_t heads = section.steps[logits].width;
  TORCH_CHECK_VALUE((first || heads_ == heads) && width_ % heads == 0, "code: ", heads, " logits for rows of width ",
                    width_);
  heads_ = heads;
}

void RowProgramPlan::add_step(Section& section, at::IntArrayRef numbers, double p0, double p1,
                              std::optional<at::ScalarType>& result) {
  const int count = int(section.steps.size());
  TORCH_CHECK_VALUE(numbers[0] >= 0 && numbers[0] <= int64_t(RowOp::head_dot), "code: unknown operation ", numbers[0]);
  RowStep step{};
  step.op = RowOp(numbers[0]);
  step.a = int(numbers[1]);
  step.b = int(numbers[2]);
  step.table = step.use = -1;
  step.index = int(numbers[6]);
  step.activation = Activation(std::max<int64_t>(numbers[7], 0));
  step.p0 = p0;
  step.p1 = p1;
  step.value = step.aux = step.stats = step.distinct = step.grad = step.weight_grad = step.bias_grad = step.shift_grad = -1;
  const std::array<int64_t, 3> t = {numbers[3], numbers[4], numbers[5]};
  const bool reads_a = step.op != RowOp::load;
  const bool reads_b = step.op == RowOp::add || step.op == RowOp::mul || step.op == RowOp::concat ||
                       step.op == RowOp::head_dot;
  TORCH_CHECK_VALUE((reads_a ? step.a >= 0 && step.a < count : step.a < 0) &&
                        (reads_b ? step.b >= 0 && step.b < count : step.b < 0),
                    "code: step ", count, " has operands ", step.a, " and ", step.b);
  TORCH_CHECK_VALUE(step.index < int(index_views_.size()), "code: step ", count, " names index ", step.index);
  if (reads_a) step.in_width = section.steps[step.a].width;
  step.width = step.in_width;
  if (tables_of(step.op)) {
    step.table = table(t[0], step.index < 0);
    if (step.index >= 0) step.use = use(step.table, step.index);
    const at::Tensor& tensor = tensors_[t[0]];
    result = result ? c10::promoteTypes(*result, tensor.scalar_type()) : tensor.scalar_type();
    const int64_t width = tensor.size(1);
    if (step.op == RowOp::load) step.width = width;
    const int64_t expected = step.op == RowOp::scale ? 1 : step.width;
    TORCH_CHECK_VALUE(width == expected, "tensors: expected a table of width ", expected, ", got ", tensor.sizes());
  } else if (step.op == RowOp::linear) {
    const at::Tensor& weight = operand(t[0], "a weight");
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == step.in_width, "tensors: expected a weight [*, ",
                      step.in_width, "], got ", weight.sizes());
    step.width = weight.size(0);
    step.bias = vector(t[1], step.width, "a bias");
  } else if (step.op == RowOp::add_vector) {
    step.bias = vector(t[0], step.width, "a vector");
  } else if (step.op == RowOp::symmetrize || step.op == RowOp::norm_act) {
    TORCH_CHECK_VALUE((t[1] < 0) == (t[2] < 0), "code: step ", count, " has one of the norm's two parameters");
    step.weight = vector(t[1], step.width, "the weight of a norm");
    step.shift = vector(t[2], step.width, "the bias of a norm");
    if (step.op == RowOp::symmetrize) {
      step.bias = t[0] < 0 ? keep(at::zeros({step.width}, tensors_[0].options().dtype(wide_))) : vector(t[0], step.width, "a bias", t[1] >= 0);
    }
  } else if (step.op == RowOp::concat) {
    step.width = step.in_width + section.steps[step.b].width;
  } else if (reads_b) {
    TORCH_CHECK_VALUE(section.steps[step.b].width == step.width, "code: step ", count, " joins widths ", step.width,
                      " and ", section.steps[step.b].width);
    if (step.op == RowOp::head_dot) {
      TORCH_CHECK_VALUE(p1 >= 1 && step.width % int64_t(p1) == 0, "constants: ", p1, " heads for rows of width ",
                        step.width);
      step.width = int64_t(p1);
    }
  } else if (step.op == RowOp::dropout) {
    TORCH_CHECK_VALUE(p0 >= 0 && p0 < 1, "constants: expected a dropout probability in [0, 1), got ", p0);
  }
  section.steps.push_back(step);
  section.operands.push_back(t);
}

void RowProgramPlan::mark_used(Section& section) {
  for (int output : {section.reduced_step, section.rows_step, section.logits_step}) {
    if (output >= 0) section.steps[output].used = true;
  }
  for (int k = int(section.steps.size()) - 1; k >= 0; --k) {
    const RowStep& step = section.steps[k];
    if (!step.used) continue;
    for (int operand : {step.a, step.b}) {
      if (operand >= 0) section.steps[operand].used = true;
    }
  }
}

void RowProgramPlan::check_tables(const Section& section) const {
  if (section.begin == section.end) return;
  for (const RowStep& step : section.steps) {
    if (step.table < 0 || step.index >= 0 || !step.used) continue;
    const int64_t rows = tables_[step.table].rows;
    TORCH_CHECK_VALUE(rows >= section.end, "tensors: expected a table of at least ", section.end, " rows, got ", rows);
  }
}

void RowProgramPlan::plan_gradients() {
  for (Section& section : sections_) {
    const int count = int(section.steps.size());
    for (int k = 0; k < count; ++k) {
      RowStep& step = section.steps[k];
      for (int64_t t : section.operands[k]) step.wants_grad |= t >= 0 && wanted_[t];
      for (int operand : {step.a, step.b}) step.wants_grad |= operand >= 0 && section.steps[operand].wants_grad;
      step.wants_grad &= step.used;
    }
    Slots slots;
    const auto take = [&](int k) {
      RowStep& step = section.steps[k];
      if (!step.wants_grad || step.grad >= 0) return false;
      step.grad = slots.take(step.width);
      return true;
    };
    for (int output : {section.reduced_step, section.rows_step, section.logits_step}) {
      if (output >= 0) take(output);
    }
    for (int k = count - 1; k >= 0; --k) {
      RowStep& step = section.steps[k];
      if (step.grad < 0) continue;
      const bool passes = step.op == RowOp::load_add || step.op == RowOp::add_vector || step.op == RowOp::add;
      if (passes && step.a != step.b && section.steps[step.a].wants_grad && section.steps[step.a].grad < 0) {
        section.steps[step.a].grad = step.grad;
        step.passes_a = true;
        if (step.b >= 0) step.writes_b = take(step.b);
        continue;
      }
      if (step.a >= 0) step.writes_a = take(step.a);
      if (step.b >= 0) step.writes_b = take(step.b);
      slots.give(step.width, step.grad);
    }
    section.slots = slots.total;
  }
}

void RowProgramPlan::plan_values(bool backward, bool keeps_derivatives, bool shares_rows) {
  for (Section& section : sections_) {
    std::vector<RowStep>& steps = section.steps;
    const int count = int(steps.size());
    std::vector<int> last(count, -1);  // the last reader
    std::vector<bool> needed(count, false);
    for (int k = count - 1; k >= 0; --k) {
      const RowStep& step = steps[k];
      if (!step.used) continue;
      bool runs = needed[k];
      if (!backward) runs |= k == section.reduced_step || k == section.rows_step || k == section.logits_step;
      if (backward && reduction_ != RowReduction::sum) {
        const bool reduced = k == section.reduced_step || k == section.logits_step;
        runs |= reduced && (section.steps[section.reduced_step].grad >= 0 ||
                            (section.logits_step >= 0 && section.steps[section.logits_step].grad >= 0));
      }
      const bool differentiates = backward && step.grad >= 0;
      const bool activates = step.op == RowOp::symmetrize || step.op == RowOp::norm_act;
      runs |= differentiates && activates && keeps_derivatives;
      needed[k] = runs;
      const bool reads = step.op == RowOp::linear || step.op == RowOp::mul || step.op == RowOp::load_mul ||
                         step.op == RowOp::scale || step.op == RowOp::abs || step.op == RowOp::normalize ||
                         step.op == RowOp::head_dot || activates;
      for (int operand : {step.a, step.b}) {
        if (operand < 0) continue;
        if (runs || (differentiates && reads)) needed[operand] = true;
        last[operand] = std::max(last[operand], k);
      }
    }
    std::vector<bool> distinct(count);
    for (int k = 0; k < count; ++k) {
      distinct[k] = shares_rows && steps[k].op == RowOp::load && steps[k].index >= 0 && !is_output(section, k);
      for (int operand : {steps[k].a, steps[k].b}) {
        if (operand >= 0 && steps[k].op != RowOp::linear) distinct[operand] = false;
      }
    }
    Slots slots;
    slots.total = backward ? section.slots : 0;
    for (int k = 0; k < count; ++k) {
      RowStep& step = steps[k];
      if (!needed[k]) continue;
      if (distinct[k]) step.distinct = slots.take(3);
      const bool in_place = !backward && works_in_place(step.op) && last[step.a] == k && !is_output(section, step.a);
      step.value = in_place ? section.steps[step.a].value : slots.take(step.width);
      if (backward) {
        const int64_t branches = step.op == RowOp::symmetrize ? 2 : step.op == RowOp::norm_act ? 1 : 0;
        if (branches && keeps_derivatives) {
          step.aux = slots.take(branches * step.width);
          step.stats = slots.take(branches + 1);
        }
        continue;
      }
      for (int operand : {step.a, step.b}) {
        const bool dies = operand >= 0 && last[operand] == k && !is_output(section, operand) && step.a != step.b &&
                          !(in_place && operand == step.a);
        if (dies) slots.give(steps[operand].width, steps[operand].value);
      }
    }
    section.slots = slots.total;
  }
}

void RowProgramPlan::plan_parameters() {
  for (Section& section : sections_) {
    const auto place = [&](int64_t number) -> int64_t {
      if (number < 0 || !wanted_[number]) return -1;
      const auto [found, fresh] = section.parameter_at.try_emplace(number, section.parameters);
      if (fresh) section.parameters += (tensors_[number].numel() + 15) / 16 * 16;
      return found->second;
    };
    std::map<int, int> direct_uses;
    for (size_t k = 0; k < section.steps.size(); ++k) {
      RowStep& step = section.steps[k];
      if (step.grad < 0) continue;
      const auto& t = section.operands[k];
      if (step.op == RowOp::linear) {
        step.weight_grad = place(t[0]);
        step.bias_grad = place(t[1]);
      } else if (step.op == RowOp::add_vector) {
        step.bias_grad = place(t[0]);
      } else if (step.op == RowOp::symmetrize || step.op == RowOp::norm_act) {
        step.bias_grad = step.op == RowOp::symmetrize ? place(t[0]) : -1;
        step.weight_grad = place(t[1]);
        step.shift_grad = place(t[2]);
      } else if (step.table >= 0 && tables_[step.table].direct) {
        ++direct_uses[step.table];
      }
    }
    for (RowStep& step : section.steps) {
      if (step.grad >= 0 && step.table >= 0 && tables_[step.table].direct) {
        step.writes_table = direct_uses[step.table] == 1;
      }
    }
  }
}

bool RowProgramPlan::covered(int table) const {
  int64_t rows = 0;
  for (const Section& section : sections_) {
    for (const RowStep& step : section.steps) {
      if (step.table == table && step.grad >= 0 && step.writes_table) rows += section.end - section.begin;
    }
  }
  return rows == tables_[table].rows;
}

std::vector<at::Tensor> RowProgramPlan::finished(std::vector<at::Tensor> found) const {
  for (size_t t = 0; t < found.size(); ++t) {
    const at::TensorOptions options = tensors_[t].options();
    if (!wanted_[t]) {
      found[t] = at::empty({0}, options);
    } else if (!found[t].defined()) {
      found[t] = at::zeros(tensors_[t].sizes(), options);
    }
  }
  return found;
}

}  // namespace scalegmn

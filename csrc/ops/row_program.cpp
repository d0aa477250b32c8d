#include "ops/row_program.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>

#include "cpu/row_program.h"
#include "ops/common.h"
#include "ops/pool.h"
#include "ops/tile_gemm.h"

namespace scalegmn {
namespace {

constexpr int64_t section_numbers = 5, step_numbers = 8;
constexpr int64_t tile_floats = 448 * 1024;    // of a tile's workspace: what fits a core's L2 cache beside the weights
constexpr int64_t partition_rows = 2048;       // so many pay for a partition's own copy of the parameter gradients
constexpr int64_t most_partitions = 16;        // of a section; a power of two, as their number is: threads share them
constexpr int64_t fewest_rows_to_share = 256;  // from here on two cores have enough to do
constexpr int64_t smallest_row_product = 8;    // width from which a product compiled for its shape pays
constexpr int64_t few_rows = 256;              // so few have a place each, whether they occur or not

// -- the plan of a call -----------------------------------------------------------------------------------------------

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

struct Section {
  int64_t begin, end;
  int reduced_step, rows_step, logits_step;
  std::vector<RowStep> steps;
  std::vector<std::array<int64_t, 3>> operands;  // tensors t0, t1, t2 of each step
  int64_t parameters = 0;                        // Wide numbers of the gradients
  std::map<int64_t, int64_t> parameter_at;       // tensor -> offset
  RowSection view{};
};

class Program {
 public:
  Program(at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
          at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed)
      : tensors_(tensors.begin(), tensors.end()), wanted_(tensors.size(), false) {
    TORCH_CHECK_VALUE(bounds.size() >= 2 && bounds[0] == 0, "bounds: expected at least two numbers from 0, got ", bounds);
    bool wide = false;
    for (const at::Tensor& tensor : tensors_) {
      TORCH_CHECK_VALUE(tensor.is_cpu(), "tensors: expected CPU tensors, got one on ", tensor.device());
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
      ptr_ = *ptr;
      const int64_t* p = ptr_.const_data_ptr<int64_t>();
      TORCH_CHECK_VALUE(p[0] == 0 && p[ptr_.numel() - 1] == rows_ && std::is_sorted(p, p + ptr_.numel()),
                        "ptr: expected a nondecreasing sequence from 0 to ", rows_, ", got one from ", p[0], " to ",
                        p[ptr_.numel() - 1]);
    }
    TORCH_CHECK_VALUE(ptr || width_ < 0, "ptr: expected int64 [S + 1] for a program that reduces, got none");
    args_.wide_compute = wide;
    args_.gemm32 = gemms_.gemm32;
    args_.gemm64 = gemms_.gemm64;
    args_.row32 = gemms_.row32;
    args_.row16 = gemms_.row16;
    args_.indices = index_views_.data();
    args_.rows_dtype = scalar_of(at::empty({0}, result_), "tensors");
    if (ptr) {
      args_.ptr = ptr_.const_data_ptr<int64_t>();
      args_.segments = ptr_.numel() - 1;
      check_segments();
    }
    if (seed) {
      TORCH_CHECK_VALUE(seed->numel() == 2 && seed->scalar_type() == at::kLong && seed->is_contiguous(),
                        "seed: expected int64 [2], got ", seed->scalar_type(), " ", seed->sizes());
      args_.seed0 = uint32_t(seed->const_data_ptr<int64_t>()[0]);
      args_.seed1 = uint32_t(seed->const_data_ptr<int64_t>()[1]);
    }
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward() {
    plan_values(false);
    finish_plan();
    const bool reduces = width_ >= 0;
    at::Tensor reduced = at::zeros({reduces ? args_.segments : 0, reduces ? reduced_width() : 0}, wide_);
    at::Tensor rows = pooled_empty({rows_width_ < 0 ? 0 : written_rows_, std::max<int64_t>(rows_width_, 0)}, result_);
    const bool statistics = args_.reduction == RowReduction::statistics;
    at::Tensor kept = at::zeros(kept_sizes(), wide_);
    at::Tensor extremes = statistics ? at::zeros({args_.segments, 2 * width_}, at::kInt) : at::empty({0}, at::kInt);
    args_.reduced = reduced.mutable_data_ptr();
    args_.kept = kept.mutable_data_ptr();
    args_.extremes = statistics ? extremes.mutable_data_ptr<int32_t>() : nullptr;
    args_.rows_out = rows.mutable_data_ptr();
    cut();
    const int64_t head_width = args_.reduction == RowReduction::sum ? width_ : 0;
    at::Tensor heads = at::zeros({int64_t(partitions_.size()), head_width}, wide_);
    const int64_t element = heads.element_size();
    for (size_t p = 0; p < partitions_.size(); ++p) {
      partitions_[p].head = static_cast<char*>(heads.mutable_data_ptr()) + int64_t(p) * head_width * element;
    }
    run();
    if (args_.reduction == RowReduction::sum) wide_ == at::kDouble ? add_heads<double>(reduced) : add_heads<float>(reduced);
    return {pooled_cast(reduced, result_), rows, kept, extremes};
  }

  std::vector<at::Tensor> backward(const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced,
                                   const at::Tensor& kept, const at::Tensor& extremes, const std::vector<bool>& wanted) {
    TORCH_CHECK_VALUE(wanted.size() == tensors_.size(), "wanted: expected ", tensors_.size(), " flags, got ",
                      wanted.size());
    wanted_ = wanted;
    const at::Tensor grads = grad_reduced.to(result_).contiguous(), rows = grad_rows.to(result_).contiguous();
    at::Tensor along;
    const at::Tensor kept_rows = kept.contiguous();
    if (width_ >= 0) {
      const std::array<int64_t, 2> sizes = {args_.segments, reduced_width()};
      TORCH_CHECK_VALUE(grads.sizes() == at::IntArrayRef(sizes), "grad_reduced: expected ", at::IntArrayRef(sizes),
                        ", got ", grads.sizes());
      TORCH_CHECK_VALUE(kept_rows.sizes() == at::IntArrayRef(kept_sizes()) && kept_rows.scalar_type() == wide_,
                        "kept: expected ", wide_, " ", at::IntArrayRef(kept_sizes()), ", got ", kept_rows.scalar_type(), " ",
                        kept_rows.sizes());
      args_.kept = const_cast<void*>(kept_rows.const_data_ptr());
      if (args_.reduction == RowReduction::statistics) {
        TORCH_CHECK_VALUE(extremes.scalar_type() == at::kInt && extremes.is_contiguous() &&
                              extremes.sizes() == kept_rows.sizes(),
                          "extremes: expected int32 ", kept_rows.sizes(), ", got ", extremes.scalar_type(), " ",
                          extremes.sizes());
        args_.extremes = const_cast<int32_t*>(extremes.const_data_ptr<int32_t>());
      }
      if (args_.reduction == RowReduction::attention) {
        TORCH_CHECK_VALUE(reduced.sizes() == grads.sizes(), "reduced: expected ", grads.sizes(), ", got ", reduced.sizes());
        const at::Tensor product = at::mul(grads.to(wide_), reduced.to(wide_));
        along = product.view({args_.segments, args_.heads, width_ / args_.heads}).sum(-1);
        args_.along = along.const_data_ptr();
      }
    }
    if (rows_width_ >= 0) {
      TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == written_rows_ && rows.size(1) == rows_width_,
                        "grad_rows: expected [", written_rows_, ", ", rows_width_, "], got ", rows.sizes());
    }
    args_.grad_reduced = grads.const_data_ptr();
    args_.grad_rows = rows.const_data_ptr();
    args_.backward = true;
    plan_gradients();
    plan_values(true);
    plan_parameters();
    finish_plan();
    cut();
    return wide_ == at::kDouble ? gradients<double>() : gradients<float>();
  }

 private:
  struct Weight {
    at::Tensor rows, transposed, pairs, pairs_t;
  };

  const TileGemms& gemms_ = tile_gemms();
  std::vector<at::Tensor> tensors_, owned_;
  std::map<int64_t, Weight> weights_;  // by tensor
  std::vector<bool> wanted_;
  at::ScalarType wide_, result_ = at::kFloat;
  int64_t rows_ = 0, written_rows_ = 0, width_ = -1, rows_width_ = -1;  // -1: nothing reduced, nothing written
  std::vector<Section> sections_;
  std::vector<at::Tensor> index_tensors_;
  std::vector<RowIndex> index_views_;
  std::vector<std::pair<int64_t, bool>> table_keys_;  // tensor, direct
  std::vector<RowTable> tables_;
  std::vector<std::pair<int, int>> uses_;  // table, index
  at::Tensor ptr_;
  RowProgramArgs args_{};
  std::vector<RowPartition> partitions_;

  int64_t reduced_width() const { return args_.reduction == RowReduction::statistics ? 4 * width_ : width_; }

  std::vector<int64_t> kept_sizes() const {
    if (args_.reduction == RowReduction::statistics) return {args_.segments, 2 * width_};
    if (args_.reduction == RowReduction::attention) return {args_.segments, 2 * args_.heads};
    return {0};
  }

  const void* keep(at::Tensor tensor) {
    owned_.push_back(std::move(tensor));
    return owned_.back().const_data_ptr();
  }

  void add_index(const at::Tensor& index) {
    TORCH_CHECK_VALUE(index.dim() == 1 && index.size(0) >= rows_, "indices: expected [R] with R >= ", rows_, ", got ",
                      index.sizes());
    TORCH_CHECK_TYPE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong,
                     "indices: expected int32 or int64, got ", index.scalar_type());
    index_tensors_.push_back(index.contiguous());
    index_views_.push_back({index_tensors_.back().const_data_ptr(), index.scalar_type() == at::kLong});
  }

  int64_t index_value(int index, int64_t row) const {
    const RowIndex& view = index_views_[index];
    return view.wide ? static_cast<const int64_t*>(view.data)[row] : int64_t(static_cast<const int32_t*>(view.data)[row]);
  }

  // The least and the largest of entries [begin, end).
  std::pair<int64_t, int64_t> index_range(int index, int64_t begin, int64_t end) const {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = index_value(index, row);
      low = std::min(low, at);
      high = std::max(high, at);
    }
    return {low, high};
  }

  // The rows that an index names in a partition: all from `first` on, or, where they are fewer than half of those, the
  // ones that occur, in order, with the place of each entry's row among them.
  struct IndexRows {
    int64_t first = 0, count = 0;
    std::vector<int32_t> local;
    std::vector<int64_t> occurring;
  };

  IndexRows index_rows(int index, int64_t begin, int64_t end) const {
    const auto [low, high] = index_range(index, begin, end);
    IndexRows found{low, high - low + 1, {}, {}};
    if (found.count <= few_rows) return found;
    std::vector<int32_t> place(size_t(found.count), 0);
    for (int64_t row = begin; row < end; ++row) place[index_value(index, row) - low] = 1;
    if (2 * std::count(place.begin(), place.end(), 1) >= found.count) return found;
    for (int64_t i = 0; i < int64_t(place.size()); ++i) {
      if (place[i] == 0) continue;
      place[i] = int32_t(found.occurring.size());
      found.occurring.push_back(low + i);
    }
    found.local.resize(size_t(end - begin));
    for (int64_t row = begin; row < end; ++row) found.local[row - begin] = place[index_value(index, row) - low];
    found.count = int64_t(found.occurring.size());
    return found;
  }

  const at::Tensor& operand(int64_t number, const char* what) const {
    TORCH_CHECK_VALUE(number >= 0 && number < int64_t(tensors_.size()), "code: ", what, " names tensor ", number, " of ",
                      tensors_.size());
    return tensors_[number];
  }

  int table(int64_t number, bool direct) {
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

  int use(int table, int index) {
    const std::pair<int, int> key(table, index);
    const auto found = std::find(uses_.begin(), uses_.end(), key);
    if (found != uses_.end()) return int(found - uses_.begin());
    uses_.push_back(key);
    return int(uses_.size()) - 1;
  }

  const void* vector(int64_t number, int64_t width, const char* what, bool centred = false) {
    if (number < 0) return nullptr;
    const at::Tensor& tensor = operand(number, what);
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == width, "tensors: expected ", what, " [", width, "], got ",
                      tensor.sizes());
    const at::Tensor wide = tensor.to(wide_);
    return keep(centred ? wide.sub(wide.mean()) : wide.contiguous());
  }

  // The weight of a linear step, in the forms that its products read.
  void set_weight(RowStep& step, int64_t number) {
    const at::Tensor& given = operand(number, "a weight");
    TORCH_CHECK_VALUE(given.dim() == 2 && given.size(1) == step.in_width, "tensors: expected a weight [*, ",
                      step.in_width, "], got ", given.sizes());
    const auto [found, fresh] = weights_.try_emplace(number);
    Weight& forms = found->second;
    step.width = given.size(0);
    if (fresh) {
      const int64_t n = step.width, k = step.in_width;
      const bool large = wide_ == at::kFloat && n >= smallest_row_product && k >= smallest_row_product;
      if (large && given.scalar_type() == at::kBFloat16 && gemms_.row16 != nullptr && n % 2 == 0 && k % 2 == 0) {
        forms.pairs_t = given.reshape({n, k / 2, 2}).permute({1, 0, 2}).contiguous();
        forms.pairs = given.reshape({n / 2, 2, k}).permute({0, 2, 1}).contiguous();
      } else {
        at::Tensor rows = given.to(wide_);
        const bool packed = rows.stride(1) == 1 && rows.stride(0) >= k;
        const bool by_rows = large && gemms_.row32 != nullptr;
        forms.rows = (by_rows ? rows.is_contiguous() : packed) ? rows : rows.contiguous();
        if (by_rows) forms.transposed = rows.t().contiguous();
      }
    }
    if (forms.pairs.defined()) {
      step.pairs_t = static_cast<const uint16_t*>(forms.pairs_t.const_data_ptr());
      step.pairs = static_cast<const uint16_t*>(forms.pairs.const_data_ptr());
      return;
    }
    step.weight = forms.rows.const_data_ptr();
    step.weight_stride = std::max<int64_t>(forms.rows.stride(0), step.in_width);
    if (forms.transposed.defined()) step.weight_t = forms.transposed.const_data_ptr<float>();
  }

  void parse(at::IntArrayRef bounds, at::IntArrayRef code, at::ArrayRef<double> constants) {
    size_t at = 0, constant = 0;
    std::optional<at::ScalarType> result;
    for (size_t s = 0; s + 1 < bounds.size(); ++s) {
      TORCH_CHECK_VALUE(bounds[s] <= bounds[s + 1], "bounds: expected a nondecreasing sequence, got ", bounds);
      TORCH_CHECK_VALUE(at + section_numbers <= code.size(), "code: expected ", bounds.size() - 1, " sections, got ", s);
      Section section{bounds[s], bounds[s + 1], int(code[at + 3]), int(code[at + 1]), int(code[at + 4]), {}, {}, 0, {}, {}};
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
      sections_.push_back(std::move(section));
    }
    TORCH_CHECK_VALUE(at == code.size(), "code: ", code.size() - at, " numbers too many");
    if (result) result_ = *result;
    args_.tables = tables_.data();
    for (Section& section : sections_) check_tables(section);
  }

  void set_reduction(Section& section, int64_t kind, int64_t count) {
    TORCH_CHECK_VALUE(kind > 0 && kind <= int64_t(RowReduction::attention), "code: unknown reduction ", kind);
    const RowReduction reduction = RowReduction(kind);
    const bool first = args_.reduction == RowReduction::none;
    TORCH_CHECK_VALUE(first || args_.reduction == reduction, "code: sections differ in the reduction");
    args_.reduction = reduction;
    args_.width = width_;
    if (reduction != RowReduction::attention) return;
    const int logits = section.logits_step;
    TORCH_CHECK_VALUE(logits >= 0 && logits < count && logits != section.reduced_step && logits != section.rows_step,
                      "code: logits are step ", logits, " of ", count);
    for (const RowStep& step : section.steps) {
      TORCH_CHECK_VALUE(step.a != logits && step.b != logits, "code: logits are read by another step");
    }
    const int64_t heads = section.steps[logits].width;
    TORCH_CHECK_VALUE((first || args_.heads == heads) && width_ % heads == 0, "code: ", heads, " logits for rows of width ",
                      width_);
    args_.heads = heads;
  }

  // Statistics and attention are of whole segments.
  void check_segments() const {
    if (args_.reduction == RowReduction::none || args_.reduction == RowReduction::sum) return;
    for (const Section& section : sections_) {
      if (section.reduced_step < 0) continue;
      for (const int64_t bound : {section.begin, section.end}) {
        TORCH_CHECK_VALUE(std::binary_search(args_.ptr, args_.ptr + args_.segments + 1, bound),
                          "bounds: expected whole segments, got a section that begins or ends at row ", bound);
      }
    }
    TORCH_CHECK_VALUE(rows_ <= INT32_MAX, "bounds: expected at most 2^31 - 1 rows, got ", rows_);
  }

  void add_step(Section& section, at::IntArrayRef numbers, double p0, double p1, std::optional<at::ScalarType>& result) {
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
      set_weight(step, t[0]);
      step.bias = vector(t[1], step.width, "a bias");
    } else if (step.op == RowOp::add_vector) {
      step.bias = vector(t[0], step.width, "a vector");
    } else if (step.op == RowOp::symmetrize || step.op == RowOp::norm_act) {
      TORCH_CHECK_VALUE((t[1] < 0) == (t[2] < 0), "code: step ", count, " has one of the norm's two parameters");
      step.weight = vector(t[1], step.width, "the weight of a norm");
      step.shift = vector(t[2], step.width, "the bias of a norm");
      if (step.op == RowOp::symmetrize) {
        step.bias = t[0] < 0 ? keep(at::zeros({step.width}, wide_)) : vector(t[0], step.width, "a bias", t[1] >= 0);
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

  void mark_used(Section& section) {
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

  void check_tables(const Section& section) {
    if (section.begin == section.end) return;
    for (const RowStep& step : section.steps) {
      if (step.table < 0 || !step.used) continue;
      const RowTable& table = tables_[step.table];
      if (step.index < 0) {
        TORCH_CHECK_VALUE(table.rows >= section.end, "tensors: expected a table of at least ", section.end, " rows, got ",
                          table.rows);
        continue;
      }
      const auto [low, high] = index_range(step.index, section.begin, section.end);
      TORCH_CHECK_VALUE(low >= 0 && high < table.rows, "indices: expected rows in [0, ", table.rows, "), got ", low, " to ",
                        high);
    }
  }

  // Which steps' gradients are wanted, and where they are kept.
  void plan_gradients() {
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
      section.view.num_steps = int(slots.total);  // where values start; finish_plan sets the number of steps
    }
  }

  static bool is_output(const Section& section, int step) {
    return step == section.reduced_step || step == section.rows_step || step == section.logits_step;
  }

  // Where the steps' values are kept: shared as they die (forward), or all that backward reads.
  void plan_values(bool backward) {
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
        if (backward && args_.reduction != RowReduction::sum) {
          const bool reduced = k == section.reduced_step || k == section.logits_step;
          runs |= reduced && (section.steps[section.reduced_step].grad >= 0 ||
                              (section.logits_step >= 0 && section.steps[section.logits_step].grad >= 0));
        }
        const bool differentiates = backward && step.grad >= 0;
        runs |= differentiates && (step.op == RowOp::symmetrize || step.op == RowOp::norm_act);
        needed[k] = runs;
        const bool reads = step.op == RowOp::linear || step.op == RowOp::mul || step.op == RowOp::load_mul ||
                           step.op == RowOp::scale || step.op == RowOp::abs || step.op == RowOp::normalize ||
                           step.op == RowOp::head_dot;
        for (int operand : {step.a, step.b}) {
          if (operand < 0) continue;
          if (runs || (differentiates && reads)) needed[operand] = true;
          last[operand] = std::max(last[operand], k);
        }
      }
      std::vector<bool> distinct(count);
      for (int k = 0; k < count; ++k) {
        distinct[k] = steps[k].op == RowOp::load && steps[k].index >= 0 && !is_output(section, k);
        for (int operand : {steps[k].a, steps[k].b}) {
          if (operand >= 0 && steps[k].op != RowOp::linear) distinct[operand] = false;
        }
      }
      Slots slots;
      slots.total = backward ? section.view.num_steps : 0;
      for (int k = 0; k < count; ++k) {
        RowStep& step = steps[k];
        if (!needed[k]) continue;
        if (distinct[k]) step.distinct = slots.take(3);
        const bool in_place = !backward && works_in_place(step.op) && last[step.a] == k && !is_output(section, step.a);
        step.value = in_place ? section.steps[step.a].value : slots.take(step.width);
        if (backward) {
          const int64_t branches = step.op == RowOp::symmetrize ? 2 : step.op == RowOp::norm_act ? 1 : 0;
          if (branches) {
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
      section.view.num_steps = int(slots.total);
    }
  }

  void plan_parameters() {
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

  // The rows of a tile, and offsets in numbers instead of numbers per row.
  void finish_plan() {
    int64_t widest = 1, scratch = 0, spread = 0;
    for (const Section& section : sections_) {
      widest = std::max<int64_t>(widest, section.view.num_steps);
      for (const RowStep& step : section.steps) {
        if (step.op == RowOp::linear && section.steps[step.a].distinct >= 0) spread = std::max(spread, step.width);
        if (step.weight_t != nullptr || step.pairs != nullptr) scratch = std::max({scratch, step.width, step.in_width});
      }
    }
    args_.tile_rows = std::clamp<int64_t>(tile_floats / (widest + spread + scratch) / 16 * 16, 16, most_tile_rows);
    args_.spread = widest * args_.tile_rows;
    args_.scratch = args_.spread + spread * args_.tile_rows;
    workspace_ = args_.scratch + scratch * args_.tile_rows;
    for (Section& section : sections_) {
      for (RowStep& step : section.steps) {
        for (int64_t* offset : {&step.value, &step.aux, &step.stats, &step.distinct, &step.grad}) {
          if (*offset >= 0) *offset *= args_.tile_rows;
        }
      }
      section.view = {section.steps.data(), int(section.steps.size()), section.reduced_step, section.rows_step,
                      section.logits_step};
    }
  }
  int64_t workspace_ = 0;

  void cut() {
    for (const Section& section : sections_) {
      const int64_t rows = section.end - section.begin;
      const bool works = section.reduced_step >= 0 || section.rows_step >= 0;
      if (rows == 0 || !works) continue;
      const int64_t wanted = std::max<int64_t>(rows / partition_rows, rows >= fewest_rows_to_share ? 2 : 1);
      int64_t count = 1;
      while (count < std::min(wanted, most_partitions)) count *= 2;
      int64_t begin = section.begin;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t end = p + 1 == count ? section.end : whole_segments(section, section.begin + rows * (p + 1) / count);
        if (begin < end) partitions_.push_back({&section.view, begin, end, nullptr, nullptr, nullptr, nullptr});
        begin = end;
      }
    }
  }

  // The row itself, or where its segment ends if segments must not be cut.
  int64_t whole_segments(const Section& section, int64_t row) const {
    if (section.reduced_step < 0 || args_.reduction == RowReduction::sum) return row;
    return *std::lower_bound(args_.ptr, args_.ptr + args_.segments + 1, row);
  }

  void run() {
    const auto kernel = SCALEGMN_CPU(row_program_run);
    const int64_t count = int64_t(partitions_.size()), bytes = workspace_ * (wide_ == at::kDouble ? 8 : 4);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
      void* workspace = scratch(bytes);
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t p = next++; p < count; p = next++) {
          RowPartition partition = partitions_[p];
          partition.workspace = workspace;
          kernel(args_, partition);
        }
      }
      if (gemms_.release != nullptr) gemms_.release();
    });
  }

  // The thread's workspace, kept between calls.
  static void* scratch(int64_t bytes) {
    thread_local std::unique_ptr<char[]> buffer;
    thread_local int64_t size = 0;
    if (size < bytes + 64) {
      size = bytes + 64;
      buffer.reset(new char[size]);
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.get()) + 63) / 64 * 64);
  }

  // Sums of segments that go on in later partitions, in the order of the partitions.
  template <class A>
  void add_heads(at::Tensor& sums) {
    const int64_t width = width_;
    A* to = sums.mutable_data_ptr<A>();
    for (size_t p = 0; p < partitions_.size(); ++p) {
      if (partitions_[p].section->reduced_step < 0) continue;
      const int64_t* after = std::upper_bound(args_.ptr, args_.ptr + args_.segments + 1, partitions_[p].begin);
      const int64_t segment = after - args_.ptr - 1;
      if (args_.ptr[segment] == partitions_[p].begin) continue;
      const A* from = static_cast<const A*>(partitions_[p].head);
      for (int64_t i = 0; i < width; ++i) to[segment * width + i] += from[i];
    }
  }

  template <class A>
  std::vector<at::Tensor> gradients() {
    std::vector<at::Tensor> grads(tensors_.size());
    const auto add = [&](int64_t number, at::Tensor grad) {
      if (!grads[number].defined()) {
        grads[number] = std::move(grad);
      } else {
        grads[number].add_(grad);
      }
    };
    // tables read by row number
    for (size_t k = 0; k < tables_.size(); ++k) {
      const auto [number, direct] = table_keys_[k];
      if (!direct || !wanted_[number]) continue;
      at::Tensor grad = pooled_empty({tables_[k].rows, tables_[k].width}, wide_);
      if (!covered(int(k))) grad.zero_();
      tables_[k].grad = grad.mutable_data_ptr();
      add(number, grad);
    }
    // partitions' own places
    std::vector<at::Tensor> blocks(partitions_.size());
    std::vector<std::vector<RowScatter>> scatters(partitions_.size());
    std::vector<std::vector<IndexRows>> reads(partitions_.size());
    at::parallel_for(0, int64_t(partitions_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        RowPartition& partition = partitions_[p];
        const Section& section = section_of(partition);
        std::vector<bool> used(uses_.size(), false);
        for (const RowStep& step : section.steps) {
          if (step.grad >= 0 && step.use >= 0 && wanted_[table_keys_[step.table].first]) used[step.use] = true;
        }
        reads[p].resize(index_views_.size());
        scatters[p].resize(uses_.size());
        int64_t size = section.parameters;
        for (size_t u = 0; u < uses_.size(); ++u) {
          if (!used[u]) continue;
          IndexRows& rows = reads[p][uses_[u].second];
          if (rows.count == 0) rows = index_rows(uses_[u].second, partition.begin, partition.end);
          size += rows.count * tables_[uses_[u].first].width;
        }
        blocks[p] = pooled_empty({size}, wide_);
        A* at = blocks[p].template mutable_data_ptr<A>();
        std::memset(at, 0, size_t(size) * sizeof(A));
        partition.parameters = at;
        at += section.parameters;
        for (size_t u = 0; u < uses_.size(); ++u) {
          if (!used[u]) continue;
          const IndexRows& rows = reads[p][uses_[u].second];
          scatters[p][u] = {at, rows.first, rows.local.empty() ? nullptr : rows.local.data()};
          at += rows.count * tables_[uses_[u].first].width;
        }
        partition.scatters = scatters[p].data();
      }
    });
    run();
    // parameters, over the partitions in order
    for (const Section& section : sections_) {
      for (const auto& [number, offset] : section.parameter_at) {
        std::vector<const A*> from;
        for (const RowPartition& partition : partitions_) {
          if (partition.section == &section.view) from.push_back(static_cast<const A*>(partition.parameters) + offset);
        }
        at::Tensor grad = at::empty(tensors_[number].sizes(), wide_);
        A* to = grad.mutable_data_ptr<A>();
        at::parallel_for(0, grad.numel(), 8192, [&](int64_t begin, int64_t end) {
          std::fill(to + begin, to + end, A(0));
          for (const A* block : from) {
            for (int64_t i = begin; i < end; ++i) to[i] += block[i];
          }
        });
        add(number, grad);
      }
    }
    // tables read through an index
    for (size_t k = 0; k < tables_.size(); ++k) {
      const auto [number, direct] = table_keys_[k];
      if (direct || !wanted_[number]) continue;
      const int64_t width = tables_[k].width;
      at::Tensor& grad = grads[number];
      const bool adds = grad.defined();
      if (!adds) grad = pooled_empty({tables_[k].rows, width}, wide_);
      A* to = grad.mutable_data_ptr<A>();
      at::parallel_for(0, tables_[k].rows, 8192 / width + 1, [&](int64_t begin, int64_t end) {
        if (!adds) std::fill(to + begin * width, to + end * width, A(0));
        for (size_t p = 0; p < partitions_.size(); ++p) {
          for (size_t u = 0; u < uses_.size(); ++u) {
            const A* from = static_cast<const A*>(scatters[p][u].to);
            if (uses_[u].first != int(k) || from == nullptr) continue;
            const IndexRows& rows = reads[p][uses_[u].second];
            if (rows.local.empty()) {
              const int64_t low = std::max(begin, rows.first), high = std::min(end, rows.first + rows.count);
              for (int64_t i = 0; i < (high - low) * width; ++i) to[low * width + i] += from[(low - rows.first) * width + i];
              continue;
            }
            const auto low = std::lower_bound(rows.occurring.begin(), rows.occurring.end(), begin);
            for (auto row = low; row != rows.occurring.end() && *row < end; ++row) {
              const A* sum = from + (row - rows.occurring.begin()) * width;
              for (int64_t i = 0; i < width; ++i) to[*row * width + i] += sum[i];
            }
          }
        }
      });
    }
    for (size_t t = 0; t < grads.size(); ++t) {
      if (!wanted_[t]) {
        grads[t] = at::empty({0}, tensors_[t].options());
      } else if (!grads[t].defined()) {
        grads[t] = at::zeros(tensors_[t].sizes(), tensors_[t].options());
      } else {
        grads[t] = pooled_cast(grads[t], tensors_[t].scalar_type());
      }
    }
    return grads;
  }

  const Section& section_of(const RowPartition& partition) const {
    return *std::find_if(sections_.begin(), sections_.end(),
                         [&](const Section& section) { return &section.view == partition.section; });
  }

  // Whether every row of a table that is read by row number gets its gradient written, and not added to.
  bool covered(int table) const {
    int64_t rows = 0;
    for (const Section& section : sections_) {
      for (const RowStep& step : section.steps) {
        if (step.table == table && step.grad >= 0 && step.writes_table) rows += section.end - section.begin;
      }
    }
    return rows == tables_[table].rows;
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_program(
    at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
    at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed) {
  return Program(tensors, indices, bounds, code, constants, ptr, seed).forward();
}

std::vector<at::Tensor> row_program_backward(const at::Tensor& grad_reduced, const at::Tensor& grad_rows,
                                             const at::Tensor& reduced, const at::Tensor& kept,
                                             const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices,
                                             at::IntArrayRef bounds, at::IntArrayRef code, at::ArrayRef<double> constants,
                                             const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
                                             const std::vector<bool>& wanted) {
  return Program(tensors, indices, bounds, code, constants, ptr, seed)
      .backward(grad_reduced, grad_rows, reduced, kept, extremes, wanted);
}

TORCH_LIBRARY_FRAGMENT(scalegmn_fast_native, m) {
  m.def(
      "row_program(Tensor[] tensors, Tensor[] indices, int[] bounds, int[] code, float[] constants, Tensor? ptr, "
      "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "row_program_backward(Tensor grad_reduced, Tensor grad_rows, Tensor reduced, Tensor kept, Tensor extremes, "
      "Tensor[] tensors, Tensor[] indices, int[] bounds, int[] code, float[] constants, Tensor? ptr, Tensor? seed, "
      "bool[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(scalegmn_fast_native, CPU, m) {
  m.impl("row_program", [](at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
                           at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
                           const std::optional<at::Tensor>& seed) {
    return row_program(tensors, indices, bounds, code, constants, ptr, seed);
  });
  m.impl("row_program_backward",
         [](const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced, const at::Tensor& kept,
            const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
            at::IntArrayRef code, at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
            const std::optional<at::Tensor>& seed, const c10::List<bool>& wanted) {
           return row_program_backward(grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, bounds, code,
                                       constants, ptr, seed, std::vector<bool>(wanted.begin(), wanted.end()));
         });
}

}  // namespace scalegmn

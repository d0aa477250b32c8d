#include "ops/row_program_composed.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "cpu/row_kernels.h"
#include "cpu/symmetrize.h"
#include "ops/common.h"
#include "ops/kept_orders.h"
#include "ops/row_program_plan.h"
#include "ops/segment_reduce.h"
#ifdef SCALEGMN_CUDA
#include "cuda/row_program.h"
#include "cuda/symmetrize.h"
#endif

namespace scalegmn {
namespace {

constexpr int64_t chunk_bytes = 32 << 20;  // of a chunk's values: what stays in the L2 cache beside weights and tables
constexpr int64_t fewest_rows = 4096;      // that a product needs to occupy a GPU
constexpr int64_t most_rows = 65536;

class Composed : RowProgramPlan {
 public:
  Composed(at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
           at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
           int64_t chunk_rows)
      : RowProgramPlan(tensors, indices, bounds, code, constants, ptr, seed),
        gpu_(tensors_[0].is_cuda()),
        options_(tensors_[0].options().dtype(wide_)),
        chunk_rows_(chunk_rows) {
    TORCH_CHECK_VALUE(chunk_rows >= 0, "chunk_rows: expected at least 0, got ", chunk_rows);
    if (gpu_) {
#ifdef SCALEGMN_CUDA
      kernels_ = row_kernels_cuda();
      stream_ = stream_of(tensors_[0]);
      capturing_ = is_capturing(stream_);
#else
      TORCH_CHECK(false, "row_program: the compiled module was built without nvcc");
#endif
    } else {
      SCALEGMN_CPU(fill_row_kernels)(kernels_);
    }
    if (width_ >= 0) {
      const at::Tensor rows = at::arange(rows_, options_.dtype(at::kLong));
      segment_ = at::searchsorted(ptr_, rows, /*out_int32=*/false, /*right=*/true).sub_(1);
    }
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward() {
    plan_values(false, false);
    set_chunks();
    at::Tensor reduced = at::zeros({segments_if_reduced(), std::max<int64_t>(reduced_width(), 0)}, options_);
    const at::Tensor rows = at::empty({rows_width_ < 0 ? 0 : written_rows_, std::max<int64_t>(rows_width_, 0)},
                                      options_.dtype(result_));
    const bool collects = reduction_ == RowReduction::statistics || reduction_ == RowReduction::attention;
    at::Tensor values, logits;
    if (collects) values = at::zeros({rows_, width_}, options_);
    if (reduction_ == RowReduction::attention) logits = at::zeros({rows_, heads_}, options_);
    each_chunk([&](const Section& section) {
      run_steps(section);
      if (section.reduced_step >= 0) {
        const RowStep& step = section.steps[section.reduced_step];
        if (collects) {
          of_chunk(values).copy_(value(step));
          if (logits.defined()) of_chunk(logits).copy_(value(section.steps[section.logits_step]));
        } else {
          add_runs(value(step), {segment_.const_data_ptr(), true}, nullptr, reduced);
        }
      }
      if (section.rows_step >= 0) of_chunk(rows).copy_(value(section.steps[section.rows_step]));
    });
    at::Tensor kept = at::zeros(kept_sizes(), options_);
    at::Tensor extremes = at::empty({0}, options_.dtype(at::kInt));
    if (reduction_ == RowReduction::statistics) {
      const auto [found, at] = segment_reduce(values, ptr_, std::nullopt, names({"mean", "var", "min", "max"}), 0);
      reduced = found.flatten(1);
      kept.narrow(1, 0, width_).copy_(found.select(1, 0));
      extremes = at.flatten(1).to(at::kInt);
    } else if (reduction_ == RowReduction::attention) {
      const at::Tensor largest = segment_reduce_to("max", logits);
      const at::Tensor weights = logits.sub_(largest.index_select(0, segment_)).exp_();
      const at::Tensor total = segment_reduce_to("sum", weights);
      const at::Tensor share = total.reciprocal().masked_fill_(total.eq(0), 0);
      weights.mul_(share.index_select(0, segment_));
      values.view({rows_, heads_, width_ / heads_}).mul_(weights.unsqueeze(2));
      reduced = segment_reduce_to("sum", values);
      kept = at::cat({largest, share}, 1);
    }
    return {reduced.to(result_), rows, kept, extremes};
  }

  std::vector<at::Tensor> backward(const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced,
                                   const at::Tensor& kept, const at::Tensor& extremes, const std::vector<bool>& wanted) {
    std::tie(grad_reduced_, grad_rows_) = check_gradients(grad_reduced, grad_rows, reduced, kept, extremes, wanted);
    kept_ = kept;
    extremes_ = extremes;
    if (reduction_ == RowReduction::attention) {
      along_ = grad_reduced_.to(wide_).mul(reduced).view({segments_, heads_, width_ / heads_}).sum(-1);
    }
    plan_gradients();
    plan_values(true, false);
    plan_parameters();
    set_chunks();
    set_gradients();
    each_chunk([&](const Section& section) {
      run_steps(section);
      read_output_grads(section);
      for (auto step = section.steps.rbegin(); step != section.steps.rend(); ++step) {
        if (step->grad >= 0) backward_step(section, *step);
      }
    });
    return gradients();
  }

 private:
  struct Chunk {
    size_t section;
    int64_t first, rows;
  };

  const bool gpu_;
  const at::TensorOptions options_;
  RowKernels kernels_{};
  void* stream_ = nullptr;
  bool capturing_ = false;
  int64_t chunk_rows_;
  at::Tensor segment_;                      // int64 [R]
  at::Tensor workspace_, scratch_, ones_;   // Wide: the values and gradients of a chunk's steps; of one step; 1
  at::Tensor heads_of_runs_, tails_of_runs_;
  std::vector<at::Tensor> weights_, biases_;  // of linear steps, by tensor
  at::Tensor grad_reduced_, grad_rows_, kept_, extremes_, along_;
  std::vector<at::Tensor> table_grads_;      // by table; Wide
  std::vector<at::Tensor> parameter_grads_;  // by section; Wide
  std::vector<at::Tensor> orders_;           // by index: rows sorted by chunk and what the index names
  Chunk chunk_{};

  // -- chunks ---------------------------------------------------------------------------------------------------------

  void set_chunks() {
    int64_t widest = 1, scratch = 1, most = 1;
    for (const Section& section : sections_) {
      most = std::max(most, section.end - section.begin);
      widest = std::max(widest, section.slots);
      for (const RowStep& step : section.steps) scratch = std::max({scratch, step.width, step.in_width});
    }
    if (chunk_rows_ == 0) {
      const int64_t bytes = (widest + scratch) * (wide_ == at::kDouble ? 8 : 4);
      chunk_rows_ = std::clamp(chunk_bytes / bytes / 256 * 256, fewest_rows, most_rows);
    }
    chunk_rows_ = std::min(chunk_rows_, most);
    workspace_ = at::empty({widest * chunk_rows_}, options_);
    scratch_ = at::empty({scratch * chunk_rows_}, options_);
    const int64_t blocks = row_blocks(chunk_rows_, row_run_block);
    heads_of_runs_ = at::empty({blocks * scratch}, options_);
    tails_of_runs_ = at::empty({blocks * scratch}, options_);
    weights_.resize(tensors_.size());
    biases_.resize(tensors_.size());
    for (const Section& section : sections_) {
      for (size_t k = 0; k < section.steps.size(); ++k) {
        if (section.steps[k].op != RowOp::linear) continue;
        const auto& [weight, bias, none] = section.operands[k];
        const bool narrow = wide_ == at::kFloat && tensors_[weight].scalar_type() == at::kBFloat16;
        if (!weights_[weight].defined()) weights_[weight] = narrow ? tensors_[weight] : tensors_[weight].to(wide_);
        if (bias >= 0 && !biases_[bias].defined()) biases_[bias] = tensors_[bias].to(wide_);
      }
    }
  }

  template <class Use>
  void each_chunk(Use use) {
    for (size_t s = 0; s < sections_.size(); ++s) {
      const Section& section = sections_[s];
      if (section.reduced_step < 0 && section.rows_step < 0) continue;
      for (int64_t first = section.begin; first < section.end; first += chunk_rows_) {
        chunk_ = {s, first, std::min(chunk_rows_, section.end - first)};
        use(section);
      }
    }
  }

  // The chunk's rows of a tensor with all rows.
  at::Tensor of_chunk(const at::Tensor& all) const { return all.narrow(0, chunk_.first, chunk_.rows); }

  at::Tensor slot(int64_t offset, int64_t width) const {
    return workspace_.narrow(0, offset * chunk_rows_, chunk_.rows * width).view({chunk_.rows, width});
  }
  at::Tensor value(const RowStep& step) const { return slot(step.value, step.width); }
  at::Tensor gradient(const RowStep& step) const { return slot(step.grad, step.width); }

  void* at_offset(const at::Tensor& tensor, int64_t number) const {
    return static_cast<char*>(tensor.mutable_data_ptr()) + number * tensor.element_size();
  }
  void* value_of(const Section& section, int number) const {
    return number < 0 ? nullptr : at_offset(workspace_, section.steps[number].value * chunk_rows_);
  }
  void* grad_of(const Section& section, int number) const {
    const int64_t at = number < 0 ? -1 : section.steps[number].grad;
    return at < 0 ? nullptr : at_offset(workspace_, at * chunk_rows_);
  }

  template <class Args>
  void launch(const char* (*kernel)(const Args&, void*), const Args& args) const {
    if (args.rows > 0 && args.width > 0) check_launch(kernel(args, stream_), "row_program");
  }

  // to [chunk rows, width] from a and b of the same width and of Wide.
  RowMapArgs map_args(RowMap map, int64_t width, const void* a, const void* b, void* to, bool accumulate = false) const {
    RowMapArgs args{};
    args.map = map;
    args.wide = wide_ == at::kDouble;
    args.accumulate = accumulate;
    args.rows = chunk_.rows;
    args.width = args.a_stride = args.b_stride = args.to_stride = width;
    args.factor = 1;
    args.a = a;
    args.b = b;
    args.b_dtype = args.wide ? Scalar::f64 : Scalar::f32;
    args.to = to;
    return args;
  }

  void map(const RowMapArgs& args) const { launch(kernels_.map, args); }

  void copy(const void* from, int64_t width, void* to, bool accumulate) const {
    map(map_args(RowMap::scale, width, from, nullptr, to, accumulate));
  }

  void dot(int64_t rows, int64_t width, double factor, const void* a, const void* b, void* to, bool accumulate) const {
    launch(kernels_.dot, RowDotArgs{wide_ == at::kDouble, accumulate, rows, width, factor, a, b, to});
  }

  // -- forward --------------------------------------------------------------------------------------------------------

  void run_steps(const Section& section) {
    for (size_t k = 0; k < section.steps.size(); ++k) {
      if (section.steps[k].value >= 0) forward_step(section, k);
    }
  }

  // The table of a step as the second operand of a map, row by row of the chunk.
  void set_table(RowMapArgs& args, const RowStep& step) const {
    const RowTable& table = tables_[step.table];
    args.b_dtype = table.dtype;
    args.b_stride = table.stride;
    args.b = table.data;
    if (step.index >= 0) {
      args.b_index = chunk_index(step.index);
    } else {
      args.b = static_cast<const char*>(table.data) + chunk_.first * table.stride * scalar_bytes(table.dtype);
    }
  }

  static int64_t scalar_bytes(Scalar dtype) { return dtype == Scalar::f64 ? 8 : dtype == Scalar::f32 ? 4 : 2; }

  RowIndex chunk_index(int index) const {
    const RowIndex all = index_views_[index];
    return {static_cast<const char*>(all.data) + chunk_.first * (all.wide ? 8 : 4), all.wide};
  }

  // to = a b, or to += a b; bfloat16 factors are added up in float32.
  void product(at::Tensor to, const at::Tensor& a, const at::Tensor& b, bool accumulate) const {
    if (a.scalar_type() == to.scalar_type()) {
      accumulate ? at::addmm_out(to, to, a, b) : at::mm_out(to, a, b);
    } else if (gpu_) {
      accumulate ? at::addmm_out(to, to, a, b, to.scalar_type()) : at::mm_out(to, a, b, to.scalar_type());
    } else {
      product(to, a.to(to.scalar_type()), b.to(to.scalar_type()), accumulate);
    }
  }

  void forward_linear(const Section& section, size_t k) const {
    const RowStep& step = section.steps[k];
    const auto& [weight_number, bias_number, none] = section.operands[k];
    const at::Tensor& weight = weights_[weight_number];
    const at::Tensor rows = value(section.steps[step.a]).to(weight.scalar_type());
    const at::Tensor out = value(step);
    if (bias_number >= 0) out.copy_(biases_[bias_number].expand_as(out));
    product(out, rows, weight.t(), bias_number >= 0);
  }

  SymmetrizeArgs symmetrize_args(const RowStep& step, const void* x) const {
    SymmetrizeArgs args{};
    args.rows = chunk_.rows;
    args.width = step.width;
    args.dtype = wide_ == at::kDouble ? Scalar::f64 : Scalar::f32;
    args.kind = step.op == RowOp::normalize ? Kind::normalize : Kind::activation;
    args.activation = step.activation;
    args.eps = step.op == RowOp::normalize ? step.p0 : row_norm_eps;
    args.w0 = step.p0;
    args.h = x;
    args.bias = step.bias;
    args.weight = step.weight;
    args.shift = step.shift;
    args.block_rows = symmetrize_block_rows(chunk_.rows, gpu_);
    return args;
  }

  void forward_symmetrize(const RowStep& step, const void* x, void* to) const {
    SymmetrizeArgs args = symmetrize_args(step, x);
    args.out = to;
#ifdef SCALEGMN_CUDA
    if (gpu_) return check_launch(symmetrize_forward_cuda(args, stream_), "row_program");
#endif
    std::vector<double> scratch(symmetrize_scratch(args.width));
    SCALEGMN_CPU(symmetrize_forward)(args, 0, args.rows, scratch.data());
  }

  RowNormArgs norm_args(const RowStep& step, const void* x, void* to) const {
    RowNormArgs args{};
    args.wide = wide_ == at::kDouble;
    args.rows = chunk_.rows;
    args.width = step.width;
    args.activation = step.activation;
    args.w0 = step.p0;
    args.x = x;
    args.weight = step.weight;
    args.shift = step.shift;
    args.to = to;
    return args;
  }

  void set_dropout(RowMapArgs& args, const RowStep& step) const {
    args.factor = 1 / (1 - step.p0);
    args.seed = seed_.const_data_ptr<int64_t>();
    args.stream = step.p1;
    args.threshold = baseline::dropout_threshold(step.p0);
    args.first = chunk_.first;
  }

  void forward_step(const Section& section, size_t k) const {
    const RowStep& step = section.steps[k];
    const int64_t width = step.width;
    const void *a = value_of(section, step.a), *b = value_of(section, step.b);
    void* to = value_of(section, int(k));
    switch (step.op) {
      case RowOp::load:
      case RowOp::load_mul:
      case RowOp::load_add:
      case RowOp::scale: {
        RowMapArgs args = map_args(map_of(step.op), width, a, nullptr, to);
        set_table(args, step);
        return map(args);
      }
      case RowOp::linear:
        return forward_linear(section, k);
      case RowOp::add:
        return map(map_args(RowMap::add, width, a, b, to));
      case RowOp::mul:
        return map(map_args(RowMap::multiply, width, a, b, to));
      case RowOp::negate: {
        RowMapArgs args = map_args(RowMap::scale, width, a, nullptr, to);
        args.factor = -1;
        return map(args);
      }
      case RowOp::add_vector: {
        RowMapArgs args = map_args(RowMap::add, width, a, step.bias, to);
        args.b_stride = 0;
        return map(args);
      }
      case RowOp::abs:
        return map(map_args(RowMap::magnitude, width, a, nullptr, to));
      case RowOp::dropout: {
        RowMapArgs args = map_args(RowMap::dropout, width, a, nullptr, to);
        set_dropout(args, step);
        return map(args);
      }
      case RowOp::symmetrize:
      case RowOp::normalize:
        return forward_symmetrize(step, a, to);
      case RowOp::norm_act:
        return launch(kernels_.norm, norm_args(step, a, to));
      case RowOp::concat: {
        const int64_t left = step.in_width;
        RowMapArgs args = map_args(RowMap::scale, left, a, nullptr, to);
        args.to_stride = width;
        map(args);
        args = map_args(RowMap::scale, width - left, b, nullptr, at_offset(value(step), left));
        args.to_stride = width;
        return map(args);
      }
      case RowOp::head_dot:
        return dot(chunk_.rows * width, step.in_width / width, step.p0, a, b, to, false);
    }
  }

  static RowMap map_of(RowOp op) {
    return op == RowOp::load       ? RowMap::second
           : op == RowOp::load_mul ? RowMap::multiply
           : op == RowOp::load_add ? RowMap::add
                                   : RowMap::scale;
  }

  // -- reductions -----------------------------------------------------------------------------------------------------

  int64_t segments_if_reduced() const { return width_ >= 0 ? segments_ : 0; }

  static c10::List<std::string> names(std::initializer_list<std::string> list) { return c10::List<std::string>(list); }

  at::Tensor segment_reduce_to(const char* name, const at::Tensor& rows) const {
    return std::get<0>(segment_reduce(rows, ptr_, std::nullopt, names({name}), 0)).select(1, 0);
  }

  // to[keys] += values, in the order of the rows.
  void add_runs(const at::Tensor& values, RowIndex keys, const int64_t* order, const at::Tensor& to) const {
    RowRunArgs args{};
    args.wide = wide_ == at::kDouble;
    args.rows = chunk_.rows;
    args.width = to.size(1);
    args.keys = keys;
    args.order = order;
    args.first = chunk_.first;
    args.values = values.const_data_ptr();
    args.to = to.mutable_data_ptr();
    args.heads = heads_of_runs_.mutable_data_ptr();
    args.tails = tails_of_runs_.mutable_data_ptr();
    launch(kernels_.add_runs, args);
  }

  // -- backward -------------------------------------------------------------------------------------------------------

  void set_gradients() {
    table_grads_.resize(tables_.size());
    for (size_t k = 0; k < tables_.size(); ++k) {
      const auto [number, direct] = table_keys_[k];
      if (!wanted_[number]) continue;
      const bool written = direct && covered(int(k));
      const std::array<int64_t, 2> sizes = {tables_[k].rows, tables_[k].width};
      table_grads_[k] = written ? at::empty(sizes, options_) : at::zeros(sizes, options_);
    }
    for (const Section& section : sections_) parameter_grads_.push_back(at::zeros({section.parameters}, options_));
    ones_ = at::ones({chunk_rows_}, options_);
    orders_.resize(index_tensors_.size());
    for (const auto& [table, index] : uses_) {
      if (table_grads_[table].defined() && !orders_[index].defined()) orders_[index] = order_of(index);
    }
  }

  // The rows, sorted by what the index names in each chunk; equal ones stay in order.
  at::Tensor order_of(int index) const {
    int64_t rows = 1;
    for (const auto& [table, by] : uses_) rows = by == index ? std::max(rows, tables_[table].rows) : rows;
    std::vector<int64_t> key = {chunk_rows_, rows};
    for (const Section& section : sections_) key.push_back(section.end);
    return kept_order(index_tensors_[index], std::move(key), stream_, capturing_, [&] {
      const auto options = options_.dtype(at::kLong);
      int64_t chunks = 0;
      std::vector<at::Tensor> chunk_of;
      for (const Section& section : sections_) {
        const int64_t count = section.end - section.begin;
        chunk_of.push_back(at::arange(count, options).div_(chunk_rows_, "floor").add_(chunks));
        chunks += row_blocks(count, chunk_rows_);
      }
      const at::Tensor keys = at::cat(chunk_of).mul_(rows).add_(index_tensors_[index].narrow(0, 0, rows_));
      return at::argsort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    });
  }

  // For each row of the chunk its segment's row.
  at::Tensor of_segments(const at::Tensor& rows) const { return rows.index_select(0, of_chunk(segment_)); }

  void read_output_grads(const Section& section) {
    if (section.reduced_step >= 0) read_reduction_grads(section);
    if (section.rows_step < 0) return;
    const RowStep& step = section.steps[section.rows_step];
    if (step.grad >= 0) gradient(step).copy_(of_chunk(grad_rows_));
  }

  void read_reduction_grads(const Section& section) {
    const RowStep& step = section.steps[section.reduced_step];
    if (reduction_ == RowReduction::attention) return read_attention_grads(section);
    if (step.grad < 0) return;
    if (reduction_ == RowReduction::statistics) return read_statistics_grads(step);
    RowMapArgs args = map_args(RowMap::second, width_, nullptr, grad_reduced_.const_data_ptr(),
                               grad_of(section, section.reduced_step));
    args.b_dtype = scalar_of(grad_reduced_, "grad_reduced");
    args.b_index = {of_chunk(segment_).const_data_ptr(), true};
    map(args);
  }

  void read_statistics_grads(const RowStep& step) {
    const at::Tensor grads = of_segments(grad_reduced_).to(wide_).view({chunk_.rows, 4, width_});
    const at::Tensor at = of_segments(extremes_).view({chunk_.rows, 2, width_});
    const at::Tensor mean = of_segments(kept_.narrow(1, 0, width_));
    const at::Tensor lengths = ptr_.narrow(0, 1, segments_).sub(ptr_.narrow(0, 0, segments_));
    const at::Tensor count = of_segments(lengths).to(wide_).unsqueeze(1);
    const at::Tensor row = at::arange(chunk_.first, chunk_.first + chunk_.rows, at.options()).unsqueeze(1);
    at::Tensor to = value(step).sub(mean).mul_(grads.select(1, 1)).mul_(2).add_(grads.select(1, 0)).div_(count);
    for (int64_t extreme : {0, 1}) {
      to.add_(grads.select(1, 2 + extreme).masked_fill(at.select(1, extreme).ne(row), 0));
    }
    gradient(step).copy_(to);
  }

  void read_attention_grads(const Section& section) {
    const RowStep &step = section.steps[section.reduced_step], &logits = section.steps[section.logits_step];
    if (step.grad < 0 && logits.grad < 0) return;
    const std::array<int64_t, 3> sizes = {chunk_.rows, heads_, width_ / heads_};
    const at::Tensor weights = value(logits).sub(of_segments(kept_.narrow(1, 0, heads_))).exp_();
    weights.mul_(of_segments(kept_.narrow(1, heads_, heads_)));
    const at::Tensor grads = of_segments(grad_reduced_).to(wide_).view(sizes);
    if (logits.grad >= 0) {
      const at::Tensor products = grads.mul(value(step).view(sizes)).sum(-1);
      gradient(logits).copy_(products.sub_(of_segments(along_)).mul_(weights));
    }
    if (step.grad >= 0) gradient(step).view(sizes).copy_(grads.mul(weights.unsqueeze(2)));
  }

  // Where the gradients of a parameter are added up; null: not wanted.
  at::Tensor parameter(int64_t offset, at::IntArrayRef sizes) const {
    if (offset < 0) return {};
    return parameter_grads_[chunk_.section].narrow(0, offset, c10::multiply_integers(sizes)).view(sizes);
  }

  // to [d] += the sum of rows [*, d].
  void add_rows(at::Tensor to, const at::Tensor& rows) const {
    if (to.defined()) to.addmv_(rows.t(), ones_.narrow(0, 0, rows.size(0)));
  }

  void backward_linear(const Section& section, const RowStep& step, size_t k) const {
    const at::Tensor grad = gradient(step);
    add_rows(parameter(step.bias_grad, {step.width}), grad);
    const at::Tensor& weight = weights_[section.operands[k][0]];
    const RowStep& a = section.steps[step.a];
    if (step.weight_grad < 0 && a.grad < 0) return;
    const at::Tensor narrow = grad.to(weight.scalar_type());
    if (step.weight_grad >= 0) {
      product(parameter(step.weight_grad, {step.width, step.in_width}), narrow.t(), value(a).to(weight.scalar_type()), true);
    }
    if (a.grad >= 0) product(gradient(a), narrow, weight, !step.writes_a);
  }

  void backward_symmetrize(const RowStep& step, const void* x, const void* grad, void* grad_a) const {
    SymmetrizeArgs args = symmetrize_args(step, x);
    const bool apart = grad_a == nullptr || !step.writes_a;
    args.grad = grad;
    args.grad_h = apart ? scratch_.mutable_data_ptr() : grad_a;
    const int64_t blocks = row_blocks(args.rows, args.block_rows);
    at::Tensor partial;
    if (step.bias_grad >= 0 || step.weight_grad >= 0 || step.shift_grad >= 0) {
      partial = at::empty({blocks, 3, step.width}, options_);
      args.partial = partial.mutable_data_ptr();
    }
    if (gpu_) {
#ifdef SCALEGMN_CUDA
      check_launch(symmetrize_backward_cuda(args, nullptr, stream_), "row_program_backward");
#endif
    } else {
      std::vector<double> scratch(symmetrize_scratch(args.width));
      SCALEGMN_CPU(symmetrize_backward)(args, 0, blocks, scratch.data());
    }
    if (grad_a != nullptr && apart) copy(scratch_.const_data_ptr(), step.width, grad_a, true);
    if (!partial.defined()) return;
    add_rows(parameter(step.bias_grad, {step.width}), partial.select(1, 0));
    add_rows(parameter(step.weight_grad, {step.width}), partial.select(1, 1));
    add_rows(parameter(step.shift_grad, {step.width}), partial.select(1, 2));
  }

  void backward_norm(const RowStep& step, const void* x, const void* grad, void* grad_a) const {
    RowNormArgs args = norm_args(step, x, grad_a);
    args.grad = grad;
    args.accumulate = !step.writes_a;
    at::Tensor partial;
    if (step.weight_grad >= 0 || step.shift_grad >= 0) {
      partial = at::empty({row_blocks(args.rows, row_norm_block), 2, step.width}, options_);
      args.partial = partial.mutable_data_ptr();
    }
    launch(kernels_.norm_backward, args);
    if (!partial.defined()) return;
    add_rows(parameter(step.weight_grad, {step.width}), partial.select(1, 0));
    add_rows(parameter(step.shift_grad, {step.width}), partial.select(1, 1));
  }

  // The gradient of the table that a step reads.
  void backward_table(const RowStep& step, const void* a, const void* grad) const {
    const at::Tensor& to = table_grads_[step.table];
    if (!to.defined()) return;
    const bool direct = step.index < 0;
    void* place = direct ? of_chunk(to).mutable_data_ptr() : scratch_.mutable_data_ptr();
    const bool accumulate = direct && !step.writes_table;
    at::Tensor rows = scratch_;
    if (step.op == RowOp::scale) {
      dot(chunk_.rows, step.width, 1, grad, a, place, accumulate);
    } else if (step.op == RowOp::load_mul) {
      map(map_args(RowMap::multiply, step.width, grad, a, place, accumulate));
    } else if (direct) {
      copy(grad, step.width, place, accumulate);
    } else {
      rows = gradient(step);
    }
    if (!direct) {
      add_runs(rows, index_views_[step.index], of_chunk(orders_[step.index]).const_data_ptr<int64_t>(), to);
    }
  }

  void backward_step(const Section& section, const RowStep& step) const {
    const size_t k = &step - section.steps.data();
    const int64_t width = step.width;
    const void *a = step.a < 0 || section.steps[step.a].value < 0 ? nullptr : value_of(section, step.a);
    const void *b = step.b < 0 || section.steps[step.b].value < 0 ? nullptr : value_of(section, step.b);
    const void* grad = grad_of(section, int(k));
    void *grad_a = step.passes_a ? nullptr : grad_of(section, step.a), *grad_b = grad_of(section, step.b);
    const bool adds_a = !step.writes_a, adds_b = !step.writes_b;
    switch (step.op) {
      case RowOp::load:
      case RowOp::load_mul:
      case RowOp::load_add:
      case RowOp::scale: {
        backward_table(step, a, grad);
        if (grad_a == nullptr) return;
        if (step.op == RowOp::load_add) return copy(grad, width, grad_a, adds_a);
        RowMapArgs args = map_args(map_of(step.op), width, grad, nullptr, grad_a, adds_a);
        set_table(args, step);
        return map(args);
      }
      case RowOp::linear:
        return backward_linear(section, step, k);
      case RowOp::add_vector:
        add_rows(parameter(step.bias_grad, {width}), gradient(step));
        if (grad_a != nullptr) copy(grad, width, grad_a, adds_a);
        return;
      case RowOp::add:
        if (grad_a != nullptr) copy(grad, width, grad_a, adds_a);
        if (grad_b != nullptr) copy(grad, width, grad_b, adds_b);
        return;
      case RowOp::mul:
        if (grad_a != nullptr) map(map_args(RowMap::multiply, width, grad, b, grad_a, adds_a));
        if (grad_b != nullptr) map(map_args(RowMap::multiply, width, grad, a, grad_b, adds_b));
        return;
      case RowOp::negate: {
        RowMapArgs args = map_args(RowMap::scale, width, grad, nullptr, grad_a, adds_a);
        args.factor = -1;
        return map(args);
      }
      case RowOp::abs:
        return map(map_args(RowMap::slope, width, grad, a, grad_a, adds_a));
      case RowOp::dropout: {
        RowMapArgs args = map_args(RowMap::dropout, width, grad, nullptr, grad_a, adds_a);
        set_dropout(args, step);
        return map(args);
      }
      case RowOp::symmetrize:
      case RowOp::normalize:
        return backward_symmetrize(step, a, grad, grad_a);
      case RowOp::norm_act:
        return backward_norm(step, a, grad, grad_a);
      case RowOp::concat: {
        const int64_t left = step.in_width;
        RowMapArgs args = map_args(RowMap::scale, left, grad, nullptr, grad_a, adds_a);
        args.a_stride = width;
        if (grad_a != nullptr) map(args);
        args = map_args(RowMap::scale, width - left, at_offset(gradient(step), left), nullptr, grad_b, adds_b);
        args.a_stride = width;
        if (grad_b != nullptr) map(args);
        return;
      }
      case RowOp::head_dot: {
        const int64_t head = step.in_width / width;
        for (const auto& [to, factor, adds] : {std::tuple(grad_a, b, adds_a), std::tuple(grad_b, a, adds_b)}) {
          if (to == nullptr) continue;
          RowMapArgs args = map_args(RowMap::scale, head, factor, grad, to, adds);
          args.rows = chunk_.rows * width;
          args.b_stride = 1;
          args.factor = step.p0;
          map(args);
        }
        return;
      }
    }
  }

  std::vector<at::Tensor> gradients() const {
    std::vector<at::Tensor> found(tensors_.size());
    const auto add = [&](int64_t number, const at::Tensor& grad) {
      found[number] = found[number].defined() ? found[number].add_(grad) : grad;
    };
    for (size_t k = 0; k < tables_.size(); ++k) {
      if (table_grads_[k].defined()) add(table_keys_[k].first, table_grads_[k]);
    }
    for (size_t s = 0; s < sections_.size(); ++s) {
      for (const auto& [number, offset] : sections_[s].parameter_at) {
        const at::Tensor& like = tensors_[number];
        add(number, parameter_grads_[s].narrow(0, offset, like.numel()).view(like.sizes()).clone());
      }
    }
    for (size_t t = 0; t < found.size(); ++t) {
      if (found[t].defined()) found[t] = found[t].to(tensors_[t].scalar_type());
    }
    return finished(std::move(found));
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_program_composed(
    at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
    at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
    int64_t chunk_rows) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors: expected at least one, got none");
  const c10::DeviceGuard guard(tensors[0].device());
  return Composed(tensors, indices, bounds, code, constants, ptr, seed, chunk_rows).forward();
}

std::vector<at::Tensor> row_program_composed_backward(
    const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced, const at::Tensor& kept,
    const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
    at::IntArrayRef code, at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
    const std::optional<at::Tensor>& seed, const c10::List<bool>& wanted, int64_t chunk_rows) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors: expected at least one, got none");
  const c10::DeviceGuard guard(tensors[0].device());
  return Composed(tensors, indices, bounds, code, constants, ptr, seed, chunk_rows)
      .backward(grad_reduced, grad_rows, reduced, kept, extremes, std::vector<bool>(wanted.begin(), wanted.end()));
}

TORCH_LIBRARY_FRAGMENT(scalegmn_fast_native, m) {
  m.def(
      "row_program_composed(Tensor[] tensors, Tensor[] indices, int[] bounds, int[] code, float[] constants, Tensor? ptr, "
      "Tensor? seed, int chunk_rows) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "row_program_composed_backward(Tensor grad_reduced, Tensor grad_rows, Tensor reduced, Tensor kept, Tensor extremes, "
      "Tensor[] tensors, Tensor[] indices, int[] bounds, int[] code, float[] constants, Tensor? ptr, Tensor? seed, "
      "bool[] wanted, int chunk_rows) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(scalegmn_fast_native, CPU, m) {
  m.impl("row_program_composed", &row_program_composed);
  m.impl("row_program_composed_backward", &row_program_composed_backward);
}

#ifdef SCALEGMN_CUDA
TORCH_LIBRARY_IMPL(scalegmn_fast_native, CUDA, m) {
  m.impl("row_program_composed", &row_program_composed);
  m.impl("row_program_composed_backward", &row_program_composed_backward);
  m.impl("row_program", [](at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
                           at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
                           const std::optional<at::Tensor>& seed) {
    return row_program_composed(tensors, indices, bounds, code, constants, ptr, seed, 0);
  });
  m.impl("row_program_backward",
         [](const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced, const at::Tensor& kept,
            const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
            at::IntArrayRef code, at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
            const std::optional<at::Tensor>& seed, const c10::List<bool>& wanted) {
           return row_program_composed_backward(grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, bounds,
                                                code, constants, ptr, seed, wanted, 0);
         });
}
#endif

}  // namespace scalegmn

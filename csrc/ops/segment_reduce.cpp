#include "ops/segment_reduce.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "cpu/segment_reduce.h"
#include "ops/common.h"
#include "ops/pool.h"
#ifdef SCALEGMN_CUDA
#include "cuda/segment_reduce.h"
#endif

namespace scalegmn {
namespace {

constexpr int64_t grain_elements = 16384;  // a task is worth handing to another thread from about 10 microseconds on

Reduction reduction_of(std::string_view name) {
  constexpr std::array<std::string_view, max_reductions> names = {"sum", "mean", "min", "max", "var", "std"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Reduction>(i);
  }
  TORCH_CHECK_VALUE(false, "reduce: expected sum, mean, min, max, var or std, got ", name);
}

void check_index(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, name,
                   ": expected int32 or int64, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.is_contiguous(), name, ": expected one contiguous dimension, got shape ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, ": expected device ", x.device(), " (x's), got ",
                    tensor.device());
}

template <class Index>
void check_ptr(const at::Tensor& ptr) {
  const Index* p = ptr.const_data_ptr<Index>();
  TORCH_CHECK_VALUE(p[0] == 0, "ptr: expected a nondecreasing sequence from 0, got ", p[0], " first");
  for (int64_t s = 1; s < ptr.numel(); ++s) {
    TORCH_CHECK_VALUE(p[s] >= p[s - 1], "ptr: expected a nondecreasing sequence from 0, got ", p[s], " behind ",
                      p[s - 1]);
  }
}

template <class Index>
void check_order(const at::Tensor& order, int64_t rows) {
  const Index* o = order.const_data_ptr<Index>();
  for (int64_t k = 0; k < order.numel(); ++k) {
    TORCH_CHECK_VALUE(o[k] >= 0 && o[k] < rows, "order: expected rows of x in [0, ", rows, "), got ", o[k]);
  }
}

SegmentReduceArgs prepare(const at::Tensor& x, const at::Tensor& ptr, const std::optional<at::Tensor>& order,
                          const c10::List<std::string>& reduce, double eps) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected rows [R, d], got shape ", x.sizes());
  check_index(ptr, "ptr", x);
  TORCH_CHECK_VALUE(ptr.numel() >= 1, "ptr: expected shape [S + 1], got ", ptr.sizes());
  TORCH_CHECK_VALUE(!reduce.empty() && reduce.size() <= max_reductions, "reduce: expected 1 to ", max_reductions,
                    " names, got ", reduce.size());
  SegmentReduceArgs args{};
  args.rows = x.size(0);
  args.width = x.size(1);
  args.segments = ptr.numel() - 1;
  args.dtype = scalar_of(x, "x");
  args.wide_index = ptr.scalar_type() == at::kLong;
  args.eps = eps;
  args.x = x.const_data_ptr();
  args.ptr = ptr.const_data_ptr();
  TORCH_CHECK_VALUE(args.wide_index || args.rows <= INT32_MAX, "ptr: expected int64 for ", args.rows, " rows of x");
  for (const std::string& name : reduce) {
    const Reduction reduction = reduction_of(name);
    args.reductions[args.num_reductions++] = reduction;
    TORCH_CHECK_VALUE(std::count(args.reductions, args.reductions + args.num_reductions, reduction) == 1,
                      "reduce: expected each name once, got ", name, " twice");
    args.sum |= reduction == Reduction::sum || reduction == Reduction::mean;
    args.moments |= reduction == Reduction::var || reduction == Reduction::std;
    args.min |= reduction == Reduction::min;
    args.max |= reduction == Reduction::max;
  }
  if (order) {
    check_index(*order, "order", x);
    TORCH_CHECK_TYPE(order->scalar_type() == ptr.scalar_type(), "order: expected ptr's dtype ", ptr.scalar_type(),
                     ", got ", order->scalar_type());
    args.order = order->const_data_ptr();
  }
  args.slots = order ? order->numel() : args.rows;
  if (x.is_cpu()) {
    args.wide_index ? check_ptr<int64_t>(ptr) : check_ptr<int32_t>(ptr);
    const int64_t last = args.wide_index ? ptr.const_data_ptr<int64_t>()[args.segments]
                                         : int64_t(ptr.const_data_ptr<int32_t>()[args.segments]);
    if (order) {
      TORCH_CHECK_VALUE(last == args.slots, "ptr: expected its last entry to be the length ", args.slots,
                        " of order, got ", last);
      args.wide_index ? check_order<int64_t>(*order, args.rows) : check_order<int32_t>(*order, args.rows);
    } else {
      TORCH_CHECK_VALUE(last <= args.rows, "ptr: expected its last entry to be at most ", args.rows,
                        ", the rows of x, got ", last);
    }
    args.slots = last;
  }
  return args;
}

template <class Kernel>
void parallel(Kernel kernel, const SegmentReduceArgs& args, int64_t items, int64_t elements_per_item) {
  at::parallel_for(0, items, grain_elements / std::max<int64_t>(elements_per_item, 1) + 1,
                   [&](int64_t begin, int64_t end) {
                     std::vector<double> scratch(segment_scratch(args.width));
                     kernel(args, begin, end, scratch.data());
                   });
}

// out and arg, or means, whichever is set.
void run_forward(SegmentReduceArgs args, const at::Tensor& x) {
  if (args.segments == 0 || args.width == 0) return;
  at::Tensor partial, partial_at;
  const bool long_possible = args.slots > segment_cell;
  if (long_possible) {
    const int64_t cells = segment_cells(args.slots);
    partial = pooled_empty({cells, 2, 5, args.width}, x.options().dtype(wide_of(x)));
    partial_at = pooled_empty({cells, 2, 2, args.width}, x.options().dtype(at::kLong));
    args.partial = partial.mutable_data_ptr();
    args.partial_at = partial_at.mutable_data_ptr();
  }
#ifdef SCALEGMN_CUDA
  if (x.is_cuda()) {
    check_launch(segment_reduce_forward_cuda(args, stream_of(x)), "segment_reduce");
    return;
  }
#endif
  parallel(SCALEGMN_CPU(segment_cells_forward), args, segment_cells(args.slots), segment_cell * args.width);
  if (long_possible) parallel(SCALEGMN_CPU(segment_merge), args, args.segments, args.width);
}

// The slots of each row: row_ptr [R + 1] and row_slots [slots], ascending within a row, by a counting sort.
template <class Index>
void invert_order(const SegmentReduceArgs& args, at::Tensor& row_ptr, at::Tensor& row_slots) {
  const Index* order = static_cast<const Index*>(args.order);
  Index* start = row_ptr.mutable_data_ptr<Index>();
  Index* slots = row_slots.mutable_data_ptr<Index>();
  std::fill_n(start, args.rows + 1, Index(0));
  for (int64_t k = 0; k < args.slots; ++k) ++start[order[k] + 1];
  for (int64_t row = 0; row < args.rows; ++row) start[row + 1] += start[row];
  for (int64_t k = 0; k < args.slots; ++k) slots[start[order[k]]++] = Index(k);
  for (int64_t row = args.rows; row > 0; --row) start[row] = start[row - 1];
  start[0] = 0;
}

template <class Index>
void fill_segment_of_slot(const SegmentReduceArgs& args, at::Tensor& segment_of_slot) {
  const Index* ptr = static_cast<const Index*>(args.ptr);
  Index* to = segment_of_slot.mutable_data_ptr<Index>();
  for (int64_t s = 0; s < args.segments; ++s) std::fill(to + ptr[s], to + ptr[s + 1], Index(s));
}

void backward_cpu(SegmentReduceArgs& args, const at::Tensor& ptr, at::Tensor& row_ptr, at::Tensor& row_slots,
                  at::Tensor& segment_of_slot) {
  if (args.order != nullptr) {
    row_ptr = pooled_empty({args.rows + 1}, ptr.options());
    row_slots = pooled_empty({args.slots}, ptr.options());
    segment_of_slot = pooled_empty({args.slots}, ptr.options());
    if (args.wide_index) {
      invert_order<int64_t>(args, row_ptr, row_slots);
      fill_segment_of_slot<int64_t>(args, segment_of_slot);
    } else {
      invert_order<int32_t>(args, row_ptr, row_slots);
      fill_segment_of_slot<int32_t>(args, segment_of_slot);
    }
    args.row_ptr = row_ptr.const_data_ptr();
    args.row_slots = row_slots.const_data_ptr();
    args.segment_of_slot = segment_of_slot.const_data_ptr();
  }
  parallel(SCALEGMN_CPU(segment_coefficients), args, args.segments, args.width);
  parallel(SCALEGMN_CPU(segment_rows_backward), args, args.rows, args.width);
}

#ifdef SCALEGMN_CUDA
void backward_cuda(SegmentReduceArgs& args, const at::Tensor& x, const at::Tensor& ptr,
                   const std::optional<at::Tensor>& order, at::Tensor& row_ptr, at::Tensor& row_slots,
                   at::Tensor& segment_of_slot) {
  segment_of_slot = at::empty({args.slots}, ptr.options());
  args.segment_of_slot = segment_of_slot.const_data_ptr();
  if (order) {
    // a stable sort keeps the slots of a row ascending
    auto [sorted, slots] = at::sort(*order, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    row_slots = slots.to(ptr.scalar_type());
    const at::Tensor rows = at::arange(args.rows + 1, ptr.options());
    row_ptr = at::searchsorted(sorted, rows, /*out_int32=*/!args.wide_index, /*right=*/false);
    args.row_ptr = row_ptr.const_data_ptr();
    args.row_slots = row_slots.const_data_ptr();
  }
  check_launch(segment_reduce_backward_cuda(args, stream_of(x)), "segment_reduce_backward");
}
#endif

}  // namespace

std::tuple<at::Tensor, at::Tensor> segment_reduce(const at::Tensor& x, const at::Tensor& ptr,
                                                  const std::optional<at::Tensor>& order,
                                                  const c10::List<std::string>& reduce, double eps) {
  const c10::DeviceGuard guard(x.device());
  check_rows(x, "x");
  SegmentReduceArgs args = prepare(x, ptr, order, reduce, eps);
  at::Tensor out = pooled_empty({args.segments, args.num_reductions, args.width}, x.options());
  at::Tensor arg = pooled_empty({args.segments, args.min + args.max, args.width}, ptr.options());
  args.out = out.mutable_data_ptr();
  args.arg = arg.mutable_data_ptr();
  run_forward(args, x);
  return {out, arg};
}

at::Tensor segment_reduce_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& ptr,
                                   const std::optional<at::Tensor>& order, const at::Tensor& arg, const at::Tensor& out,
                                   const c10::List<std::string>& reduce, double eps) {
  const c10::DeviceGuard guard(x.device());
  SegmentReduceArgs args = prepare(x, ptr, order, reduce, eps);
  check_like(grad, "grad", out, "out");
  TORCH_CHECK_VALUE(grad.numel() == args.segments * args.num_reductions * args.width, "grad: expected [S, K, d] = [",
                    args.segments, ", ", args.num_reductions, ", ", args.width, "], got ", grad.sizes());
  TORCH_CHECK_VALUE(arg.is_contiguous() && arg.numel() == args.segments * (args.min + args.max) * args.width &&
                        arg.scalar_type() == ptr.scalar_type(),
                    "arg: expected what forward returned, got ", arg.scalar_type(), " of shape ", arg.sizes());
  if (args.moments) check_rows(x, "x");
  if (x.numel() == 0 || args.segments == 0 || args.slots == 0) return at::zeros(x.sizes(), x.options());
  at::Tensor grad_x = pooled_empty(x.sizes(), x.options());
  const auto wide = x.options().dtype(wide_of(x));
  at::Tensor means;
  if (args.moments) {
    means = pooled_empty({args.segments, 2, args.width}, wide);
    SegmentReduceArgs moments = args;
    moments.sum = moments.min = moments.max = false;
    moments.means = means.mutable_data_ptr();
    run_forward(moments, x);
    args.means = means.mutable_data_ptr();
  }
  at::Tensor coefficients = pooled_empty({args.segments, args.moments ? 3 : 1, args.width}, wide);
  args.coefficients = coefficients.const_data_ptr();
  args.grad = grad.const_data_ptr();
  args.arg = arg.data_ptr();
  args.grad_x = grad_x.mutable_data_ptr();
  at::Tensor row_ptr, row_slots, segment_of_slot;
#ifdef SCALEGMN_CUDA
  if (x.is_cuda()) {
    backward_cuda(args, x, ptr, order, row_ptr, row_slots, segment_of_slot);
    return grad_x;
  }
#endif
  backward_cpu(args, ptr, row_ptr, row_slots, segment_of_slot);
  return grad_x;
}

TORCH_LIBRARY_FRAGMENT(scalegmn_fast_native, m) {
  m.def("segment_reduce(Tensor x, Tensor ptr, Tensor? order, str[] reduce, float eps) -> (Tensor out, Tensor arg)");
  m.def(
      "segment_reduce_backward(Tensor grad, Tensor x, Tensor ptr, Tensor? order, Tensor arg, Tensor out, "
      "str[] reduce, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(scalegmn_fast_native, CPU, m) {
  m.impl("segment_reduce", &segment_reduce);
  m.impl("segment_reduce_backward", &segment_reduce_backward);
}

#ifdef SCALEGMN_CUDA
TORCH_LIBRARY_IMPL(scalegmn_fast_native, CUDA, m) {
  m.impl("segment_reduce", &segment_reduce);
  m.impl("segment_reduce_backward", &segment_reduce_backward);
}
#endif

}  // namespace scalegmn

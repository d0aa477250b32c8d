// A thread owns 4 (or 1) columns of a segment, of a piece of a long one, or of a row; threads of a block lie side by side
// along the columns, then along segments. Nothing is exchanged between threads, every sum runs in slot order. Which segments
// are long is read from ptr on the device, so nothing waits for the host. Bound by memory.
#include "cuda/segment_reduce.h"

#include "cuda/common.cuh"

namespace scalegmn {
namespace SCALEGMN_ISA {
namespace {

constexpr int kThreads = 128;

template <class A, int V>
struct Accumulator {
  A sum[V], mean[V], squares[V], least[V], most[V];
  int64_t least_at[V], most_at[V];
};

// Slots [begin, end) of the segment whose first slot is `first`.
template <class T, class Index, int V, class A>
__device__ void accumulate(const SegmentReduceArgs& args, int64_t first, int64_t begin, int64_t end, int64_t column,
                           Accumulator<A, V>& to) {
  const T* x = static_cast<const T*>(args.x) + column;
  const Index* order = static_cast<const Index*>(args.order);
  A pivot[V] = {};
  if (args.moments && begin < end) load_pack<V>(x + int64_t(order ? order[first] : first) * args.width, pivot);
  for (int64_t slot = begin; slot < end; ++slot) {
    A value[V];
    load_pack<V>(x + int64_t(order ? order[slot] : slot) * args.width, value);
    const bool start = slot == begin;
    const A inverse_n = A(1) / A(slot - begin + 1);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (start) {
        to.sum[i] = to.least[i] = to.most[i] = value[i];
        to.mean[i] = value[i] - pivot[i];
        to.squares[i] = value[i] - value[i];  // 0, or NaN where a deviation from the mean is
        to.least_at[i] = to.most_at[i] = slot;
        continue;
      }
      to.sum[i] += value[i];
      if (args.moments) add_moments(to.mean[i], to.squares[i], value[i] - pivot[i], inverse_n);
      if (args.min && below(value[i], to.least[i])) to.least[i] = value[i], to.least_at[i] = slot;
      if (args.max && above(value[i], to.most[i])) to.most[i] = value[i], to.most_at[i] = slot;
    }
  }
}

template <class T, class Index, int V, class A>
__device__ void finish(const SegmentReduceArgs& args, int64_t segment, int64_t n, int64_t column,
                       const Accumulator<A, V>& from) {
  const int64_t width = args.width;
  const A count = A(n), eps = A(args.eps);
  if (args.means != nullptr) {
    A* mean = static_cast<A*>(args.means) + segment * 2 * width + column;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      mean[i] = n == 0 ? A(0) : from.mean[i];
      mean[width + i] = n == 0 ? A(0) : from.squares[i] / count;
    }
    return;
  }
  const Index* order = static_cast<const Index*>(args.order);
  T* out = static_cast<T*>(args.out) + segment * args.num_reductions * width + column;
  Index* arg = static_cast<Index*>(args.arg) + segment * (args.min + args.max) * width + column;
  for (int k = 0; k < args.num_reductions; ++k, out += width) {
    const Reduction reduction = args.reductions[k];
    A result[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      result[i] = n == 0                           ? A(0)
                  : reduction == Reduction::sum    ? from.sum[i]
                  : reduction == Reduction::mean   ? from.sum[i] / count
                  : reduction == Reduction::min    ? from.least[i]
                  : reduction == Reduction::max    ? from.most[i]
                  : reduction == Reduction::var    ? from.squares[i] / count
                                                   : deviation(from.squares[i] / count, eps);
    }
    store_pack<V>(out, result);
    if (reduction == Reduction::min || reduction == Reduction::max) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t slot = reduction == Reduction::min ? from.least_at[i] : from.most_at[i];
        arg[i] = n == 0 ? Index(-1) : order ? order[slot] : Index(slot);
      }
      arg += width;
    }
  }
}

template <int V>
__device__ int64_t first_column() {
  return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
}

__device__ int64_t item_index() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }

// Segments of at most a cell's slots.
template <class T, class Index, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) segments_kernel(const SegmentReduceArgs args) {
  using A = typename Accumulate<T>::type;
  const int64_t segment = item_index(), column = first_column<V>();
  if (segment >= args.segments || column >= args.width) return;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  const int64_t begin = ptr[segment], end = ptr[segment + 1];
  if (end - begin > segment_cell) return;
  Accumulator<A, V> total{};
  accumulate<T, Index, V>(args, begin, begin, end, column, total);
  finish<T, Index, V>(args, segment, end - begin, column, total);
}

template <class A>
struct Piece {
  A* values;
  int64_t* slots;
  int64_t width;

  __device__ Piece(const SegmentReduceArgs& args, int64_t cell, int part, int64_t column)
      : values(static_cast<A*>(args.partial) + (cell * 2 + part) * 5 * args.width + column),
        slots(static_cast<int64_t*>(args.partial_at) + (cell * 2 + part) * 2 * args.width + column),
        width(args.width) {}

  template <int V>
  __device__ void write(const Accumulator<A, V>& from) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = from.sum[i];
      values[width + i] = from.mean[i];
      values[2 * width + i] = from.squares[i];
      values[3 * width + i] = from.least[i];
      values[4 * width + i] = from.most[i];
      slots[i] = from.least_at[i];
      slots[width + i] = from.most_at[i];
    }
  }

  template <int V>
  __device__ void read(Accumulator<A, V>& to) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to.sum[i] = values[i];
      to.mean[i] = values[width + i];
      to.squares[i] = values[2 * width + i];
      to.least[i] = values[3 * width + i];
      to.most[i] = values[4 * width + i];
      to.least_at[i] = slots[i];
      to.most_at[i] = slots[width + i];
    }
  }
};

// The pieces of long segments.
template <class T, class Index, int V>
__global__ void __launch_bounds__(kThreads) pieces_kernel(const SegmentReduceArgs args, int64_t cells) {
  using A = typename Accumulate<T>::type;
  const int64_t item = item_index(), column = first_column<V>();
  if (item >= 2 * cells || column >= args.width) return;
  const int64_t cell = item / 2;
  const int part = int(item % 2);
  int64_t first, begin, end;
  piece_of_cell(static_cast<const Index*>(args.ptr), args.segments, cell, part, first, begin, end);
  if (begin == end) return;
  Accumulator<A, V> total{};
  accumulate<T, Index, V>(args, first, begin, end, column, total);
  Piece<A>(args, cell, part, column).write(total);
}

// Long segments, from their pieces.
template <class T, class Index, int V>
__global__ void __launch_bounds__(kThreads) merge_kernel(const SegmentReduceArgs args) {
  using A = typename Accumulate<T>::type;
  const int64_t segment = item_index(), column = first_column<V>();
  if (segment >= args.segments || column >= args.width) return;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  const int64_t from = ptr[segment], to = ptr[segment + 1];
  if (to - from <= segment_cell) return;
  int64_t cell = from / segment_cell;
  Accumulator<A, V> total, next;
  Piece<A>(args, cell, 1, column).read(total);
  for (++cell; cell * segment_cell < to; ++cell) {
    const int64_t start = cell * segment_cell, stop = start + segment_cell < to ? start + segment_cell : to;
    Piece<A>(args, cell, 0, column).read(next);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      total.sum[i] += next.sum[i];
      merge_moments(total.mean[i], total.squares[i], A(start - from), next.mean[i], next.squares[i], A(stop - start));
      if (below(next.least[i], total.least[i])) total.least[i] = next.least[i], total.least_at[i] = next.least_at[i];
      if (above(next.most[i], total.most[i])) total.most[i] = next.most[i], total.most_at[i] = next.most_at[i];
    }
  }
  finish<T, Index, V>(args, segment, to - from, column, total);
}

template <class Index>
__global__ void segment_of_slot_kernel(const Index* ptr, Index* to, int64_t segments, int64_t slots) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots) return;
  to[slot] = slot < int64_t(ptr[segments]) ? Index(segment_holding(ptr, segments, slot)) : Index(-1);
}

template <class T, class Index>
__global__ void coefficients_kernel(const SegmentReduceArgs args, void* coefficients) {
  using A = typename Accumulate<T>::type;
  const int64_t segment = item_index(), column = first_column<1>(), width = args.width;
  if (segment >= args.segments || column >= width) return;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  const A n = A(ptr[segment + 1] - ptr[segment]), eps = A(args.eps);
  const A* moments = static_cast<const A*>(args.means) + (args.moments ? segment * 2 * width + column : 0);
  A constant = 0, slope = 0;
  for (int k = 0; k < args.num_reductions && n > A(0); ++k) {
    const A grad = load(static_cast<const T*>(args.grad)[(segment * args.num_reductions + k) * width + column]);
    const Reduction reduction = args.reductions[k];
    if (reduction == Reduction::sum) constant += grad;
    if (reduction == Reduction::mean) constant += grad / n;
    if (reduction == Reduction::var) slope += A(2) * grad / n;
    if (reduction == Reduction::std) slope += deviation_slope(grad, moments[width], eps, n);
  }
  A* to = static_cast<A*>(coefficients) + segment * (args.moments ? 3 : 1) * width + column;
  to[0] = constant;
  if (args.moments && n > A(0)) {
    const Index* order = static_cast<const Index*>(args.order);
    const int64_t first = order ? order[ptr[segment]] : ptr[segment];
    to[0] -= slope * moments[0];
    to[width] = slope;
    to[2 * width] = load(static_cast<const T*>(args.x)[first * width + column]);
  }
}

// As add_slot of csrc/cpu/segment_reduce.cpp.
template <class T, class Index, int V, class A>
__device__ void add_slot(const SegmentReduceArgs& args, int64_t segment, int64_t row, int64_t column, bool again,
                         const A (&x)[V], A (&total)[V]) {
  const int64_t width = args.width;
  const A* coefficients = static_cast<const A*>(args.coefficients) + segment * (args.moments ? 3 : 1) * width + column;
  A constant[V];
  load_pack<V>(coefficients, constant);
#pragma unroll
  for (int i = 0; i < V; ++i) total[i] += constant[i];
  if (args.moments) {
    A slope[V], pivot[V];
    load_pack<V>(coefficients + width, slope);
    load_pack<V>(coefficients + 2 * width, pivot);
#pragma unroll
    for (int i = 0; i < V; ++i) total[i] += slope[i] * (x[i] - pivot[i]);
  }
  if (again) return;
  const Index* arg = static_cast<const Index*>(args.arg) + segment * (args.min + args.max) * width + column;
  for (int k = 0; k < args.num_reductions; ++k) {
    if (args.reductions[k] != Reduction::min && args.reductions[k] != Reduction::max) continue;
    const T* grad = static_cast<const T*>(args.grad) + (segment * args.num_reductions + k) * width + column;
#pragma unroll
    for (int i = 0; i < V; ++i) total[i] += arg[i] == Index(row) ? A(load(grad[i])) : A(0);
    arg += width;
  }
}

template <class T, class Index, int V>
__global__ void __launch_bounds__(kThreads) rows_backward_kernel(const SegmentReduceArgs args) {
  using A = typename Accumulate<T>::type;
  const int64_t row = item_index(), column = first_column<V>();
  if (row >= args.rows || column >= args.width) return;
  const Index* row_ptr = static_cast<const Index*>(args.row_ptr);
  const Index* row_slots = static_cast<const Index*>(args.row_slots);
  const Index* segment_of_slot = static_cast<const Index*>(args.segment_of_slot);
  A x[V] = {}, total[V] = {};
  if (args.moments) load_pack<V>(static_cast<const T*>(args.x) + row * args.width + column, x);
  if (row_ptr == nullptr) {
    const int64_t segment = segment_of_slot[row];
    if (segment >= 0) add_slot<T, Index, V>(args, segment, row, column, false, x, total);
  } else {
    int64_t last = -1;
    for (int64_t k = row_ptr[row]; k < int64_t(row_ptr[row + 1]); ++k) {
      const int64_t segment = segment_of_slot[row_slots[k]];
      if (segment >= 0) add_slot<T, Index, V>(args, segment, row, column, segment == last, x, total);
      last = segment;
    }
  }
  store_pack<V>(static_cast<T*>(args.grad_x) + row * args.width + column, total);
}

struct Grid {
  dim3 blocks, threads;
};

// Threads of a block: as many along the packs of a row as there are, up to 32, the rest along items.
template <int V>
Grid grid_for(int64_t items, int64_t width) {
  const int64_t packs = (width + V - 1) / V;
  unsigned along = 1;
  while (along < packs && along < 32) along *= 2;
  const unsigned beside = kThreads / along;
  return {dim3(unsigned((items + beside - 1) / beside), unsigned((packs + along - 1) / along)), dim3(along, beside)};
}

// Calls run(Type<T>, Type<Index>, integral_constant V) for the arguments' types and their alignment.
template <class Run>
const char* with_types(const SegmentReduceArgs& args, Run run) {
  with_scalar(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename Accumulate<T>::type;
    // the wide ones are rows of fresh allocations: aligned if their width allows
    const bool vector = aligned(args.width, 4, sizeof(T), args.x, args.out, args.grad_x) &&
                        aligned(args.width, 4, sizeof(A), args.coefficients);
    const auto with_index = [&](auto pack) {
      if (args.wide_index) {
        run(type, Type<int64_t>{}, pack);
      } else {
        run(type, Type<int32_t>{}, pack);
      }
    };
    if (vector) {
      with_index(std::integral_constant<int, 4>{});
    } else {
      with_index(std::integral_constant<int, 1>{});
    }
  });
  return launch_error();
}

}  // namespace
}  // namespace SCALEGMN_ISA

const char* segment_reduce_forward_cuda(const SegmentReduceArgs& args, void* stream) {
  return cuda::with_types(args, [&](auto type, auto index, auto pack) {
    using T = typename decltype(type)::type;
    using Index = typename decltype(index)::type;
    constexpr int V = pack();
    const cuda::Grid segments = cuda::grid_for<V>(args.segments, args.width);
    cuda::segments_kernel<T, Index, V><<<segments.blocks, segments.threads, 0, as_stream(stream)>>>(args);
    if (args.partial == nullptr) return;
    const int64_t cells = segment_cells(args.slots);
    const cuda::Grid pieces = cuda::grid_for<V>(2 * cells, args.width);
    cuda::pieces_kernel<T, Index, V><<<pieces.blocks, pieces.threads, 0, as_stream(stream)>>>(args, cells);
    cuda::merge_kernel<T, Index, V><<<segments.blocks, segments.threads, 0, as_stream(stream)>>>(args);
  });
}

const char* segment_reduce_backward_cuda(const SegmentReduceArgs& args, void* stream) {
  return cuda::with_types(args, [&](auto type, auto index, auto pack) {
    using T = typename decltype(type)::type;
    using Index = typename decltype(index)::type;
    constexpr int V = pack();
    Index* segment_of_slot = static_cast<Index*>(const_cast<void*>(args.segment_of_slot));
    void* coefficients = const_cast<void*>(args.coefficients);
    cuda::segment_of_slot_kernel<<<unsigned((args.slots + 255) / 256), 256, 0, as_stream(stream)>>>(
        static_cast<const Index*>(args.ptr), segment_of_slot, args.segments, args.slots);
    const cuda::Grid segments = cuda::grid_for<1>(args.segments, args.width);
    cuda::coefficients_kernel<T, Index>
        <<<segments.blocks, segments.threads, 0, as_stream(stream)>>>(args, coefficients);
    const cuda::Grid rows = cuda::grid_for<V>(args.rows, args.width);
    cuda::rows_backward_kernel<T, Index, V><<<rows.blocks, rows.threads, 0, as_stream(stream)>>>(args);
  });
}

}  // namespace scalegmn

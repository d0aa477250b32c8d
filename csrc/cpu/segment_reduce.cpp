#include "cpu/segment_reduce.h"

namespace scalegmn::SCALEGMN_ISA {
namespace {

// What has been accumulated over a run of slots; arrays over the columns.
template <class A>
struct Accumulator {
  A *sum, *mean, *squares, *least, *most;
  int64_t *least_at, *most_at;  // slots

  Accumulator(A* values, int64_t* slots, int64_t width)
      : sum(values),
        mean(values + width),
        squares(values + 2 * width),
        least(values + 3 * width),
        most(values + 4 * width),
        least_at(slots),
        most_at(slots + width) {}
};

template <class T, class Index>
const T* row_of_slot(const SegmentReduceArgs& args, int64_t slot) {
  const Index* order = static_cast<const Index*>(args.order);
  return static_cast<const T*>(args.x) + int64_t(order ? order[slot] : slot) * args.width;
}

// Slots [begin, end) of the segment whose first slot is `first`.
template <class T, class Index, class A>
void accumulate(const SegmentReduceArgs& args, int64_t first, int64_t begin, int64_t end, const Accumulator<A>& to) {
  const int64_t width = args.width;
  const T* pivot = begin < end ? row_of_slot<T, Index>(args, first) : nullptr;
  for (int64_t slot = begin; slot < end; ++slot) {
    const T* row = row_of_slot<T, Index>(args, slot);
    if (slot == begin) {
      for (int64_t i = 0; i < width; ++i) {
        const A value = load(row[i]);
        to.sum[i] = to.least[i] = to.most[i] = value;
        to.mean[i] = value - load(pivot[i]);
        to.squares[i] = value - value;  // 0, or NaN where a deviation from the mean is
        to.least_at[i] = to.most_at[i] = slot;
      }
      continue;
    }
    if (args.sum) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to.sum[i] += load(row[i]);
    }
    if (args.moments) {
      const A inverse_n = A(1) / A(slot - begin + 1);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) add_moments(to.mean[i], to.squares[i], A(load(row[i])) - load(pivot[i]), inverse_n);
    }
    if (args.min) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A value = load(row[i]);
        const bool better = below(value, to.least[i]);
        to.least[i] = better ? value : to.least[i];
        to.least_at[i] = better ? slot : to.least_at[i];
      }
    }
    if (args.max) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A value = load(row[i]);
        const bool better = above(value, to.most[i]);
        to.most[i] = better ? value : to.most[i];
        to.most_at[i] = better ? slot : to.most_at[i];
      }
    }
  }
}

// Joins what was accumulated over n slots with what was accumulated over the m slots behind them.
template <class A>
void merge(const SegmentReduceArgs& args, const Accumulator<A>& to, int64_t n, const Accumulator<A>& from, int64_t m) {
#pragma omp simd
  for (int64_t i = 0; i < args.width; ++i) {
    to.sum[i] += from.sum[i];
    merge_moments(to.mean[i], to.squares[i], A(n), from.mean[i], from.squares[i], A(m));
    const bool lower = below(from.least[i], to.least[i]), higher = above(from.most[i], to.most[i]);
    to.least[i] = lower ? from.least[i] : to.least[i];
    to.least_at[i] = lower ? from.least_at[i] : to.least_at[i];
    to.most[i] = higher ? from.most[i] : to.most[i];
    to.most_at[i] = higher ? from.most_at[i] : to.most_at[i];
  }
}

template <class T, class Index, class A>
void finish(const SegmentReduceArgs& args, int64_t segment, int64_t n, const Accumulator<A>& from) {
  const int64_t width = args.width;
  const A count = A(n), eps = A(args.eps);
  if (args.means != nullptr) {
    A* mean = static_cast<A*>(args.means) + segment * 2 * width;
    for (int64_t i = 0; i < width; ++i) {
      mean[i] = n == 0 ? A(0) : from.mean[i];
      mean[width + i] = n == 0 ? A(0) : from.squares[i] / count;
    }
    return;
  }
  const Index* order = static_cast<const Index*>(args.order);
  T* out = static_cast<T*>(args.out) + segment * args.num_reductions * width;
  Index* arg = static_cast<Index*>(args.arg) + segment * (args.min + args.max) * width;
  const auto write_rows = [&](const int64_t* slots) {
    for (int64_t i = 0; i < width; ++i) arg[i] = n == 0 ? Index(-1) : order ? order[slots[i]] : Index(slots[i]);
    arg += width;
  };
  for (int k = 0; k < args.num_reductions; ++k, out += width) {
    const Reduction reduction = args.reductions[k];
    if (reduction == Reduction::min) write_rows(from.least_at);
    if (reduction == Reduction::max) write_rows(from.most_at);
    if (n == 0) {
      for (int64_t i = 0; i < width; ++i) store(out[i], A(0));
      continue;
    }
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      store(out[i], reduction == Reduction::sum    ? from.sum[i]
                    : reduction == Reduction::mean ? from.sum[i] / count
                    : reduction == Reduction::min  ? from.least[i]
                    : reduction == Reduction::max  ? from.most[i]
                    : reduction == Reduction::var  ? from.squares[i] / count
                                                   : deviation(from.squares[i] / count, eps));
    }
  }
}

template <class A>
Accumulator<A> scratch_accumulator(double* scratch, int64_t width) {
  return {reinterpret_cast<A*>(scratch), reinterpret_cast<int64_t*>(scratch + 5 * width), width};
}

template <class A>
Accumulator<A> piece(const SegmentReduceArgs& args, int64_t cell, int part) {
  const int64_t at = cell * 2 + part;
  return {static_cast<A*>(args.partial) + at * 5 * args.width, static_cast<int64_t*>(args.partial_at) + at * 2 * args.width,
          args.width};
}

template <class T, class Index>
void cells_forward(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  using A = typename Accumulate<T>::type;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  const Accumulator<A> local = scratch_accumulator<A>(scratch, args.width);
  const int64_t first = begin * segment_cell, last = end == segment_cells(args.slots) ? args.slots + 1 : end * segment_cell;
  for (int64_t s = first_at(ptr, args.segments, first); s < args.segments && ptr[s] < last; ++s) {
    const int64_t n = ptr[s + 1] - ptr[s];
    if (n > segment_cell) continue;
    accumulate<T, Index>(args, ptr[s], ptr[s], ptr[s + 1], local);
    finish<T, Index>(args, s, n, local);
  }
  for (int64_t cell = begin; cell < end; ++cell) {
    for (int part = 0; part < 2; ++part) {
      int64_t first, from, to;
      piece_of_cell(ptr, args.segments, cell, part, first, from, to);
      if (from < to) accumulate<T, Index>(args, first, from, to, piece<A>(args, cell, part));
    }
  }
}

template <class T, class Index>
void merge_pieces(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  using A = typename Accumulate<T>::type;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  (void)scratch;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t from = ptr[s], to = ptr[s + 1];
    if (to - from <= segment_cell) continue;
    const int64_t cell = from / segment_cell;
    const Accumulator<A> total = piece<A>(args, cell, 1);
    for (int64_t next = cell + 1; next * segment_cell < to; ++next) {
      const int64_t start = next * segment_cell, stop = start + segment_cell < to ? start + segment_cell : to;
      merge(args, total, start - from, piece<A>(args, next, 0), stop - start);
    }
    finish<T, Index>(args, s, to - from, total);
  }
}

template <class T, class Index>
void coefficients(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  using A = typename Accumulate<T>::type;
  (void)scratch;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  const int64_t width = args.width, fields = args.moments ? 3 : 1;
  const A eps = A(args.eps);
  for (int64_t s = begin; s < end; ++s) {
    A* constant = static_cast<A*>(const_cast<void*>(args.coefficients)) + s * fields * width;
    A *slope = constant + width, *pivot = slope + width;
    const A* moments = static_cast<const A*>(args.means) + s * 2 * width;
    const A n = A(ptr[s + 1] - ptr[s]);
    for (int64_t i = 0; i < fields * width; ++i) constant[i] = 0;
    if (n == A(0)) continue;
    for (int k = 0; k < args.num_reductions; ++k) {
      const T* grad = static_cast<const T*>(args.grad) + (s * args.num_reductions + k) * width;
      switch (args.reductions[k]) {
        case Reduction::sum:
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) constant[i] += load(grad[i]);
          break;
        case Reduction::mean:
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) constant[i] += load(grad[i]) / n;
          break;
        case Reduction::var:
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) slope[i] += A(2) * load(grad[i]) / n;
          break;
        case Reduction::std:
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) slope[i] += deviation_slope(A(load(grad[i])), moments[width + i], eps, n);
          break;
        default:
          break;  // min and max: in the rows, by arg
      }
    }
    if (args.moments) {
      const T* first = row_of_slot<T, Index>(args, ptr[s]);
      for (int64_t i = 0; i < width; ++i) {
        constant[i] -= slope[i] * moments[i];
        pivot[i] = load(first[i]);
      }
    }
  }
}

// Adds to total [width] what a slot of segment s contributes to its row. `again`: an earlier slot of the same segment
// read the same row, and has taken the gradients of min and max.
template <class T, class Index, class A>
void add_slot(const SegmentReduceArgs& args, int64_t s, int64_t row, bool again, A* total) {
  const int64_t width = args.width;
  const T* x = static_cast<const T*>(args.x) + row * width;
  const A* constant = static_cast<const A*>(args.coefficients) + s * (args.moments ? 3 : 1) * width;
  if (args.moments) {
    const A *slope = constant + width, *pivot = slope + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) total[i] += constant[i] + slope[i] * (load(x[i]) - pivot[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) total[i] += constant[i];
  }
  if (again) return;
  const Index* arg = static_cast<const Index*>(args.arg) + s * (args.min + args.max) * width;
  for (int k = 0; k < args.num_reductions; ++k) {
    if (args.reductions[k] != Reduction::min && args.reductions[k] != Reduction::max) continue;
    const T* grad = static_cast<const T*>(args.grad) + (s * args.num_reductions + k) * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) total[i] += arg[i] == Index(row) ? A(load(grad[i])) : A(0);
    arg += width;
  }
}

template <class T, class Index>
void rows_backward(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  using A = typename Accumulate<T>::type;
  const int64_t width = args.width;
  const Index* ptr = static_cast<const Index*>(args.ptr);
  const Index* row_ptr = static_cast<const Index*>(args.row_ptr);
  const Index* row_slots = static_cast<const Index*>(args.row_slots);
  const Index* segment_of_slot = static_cast<const Index*>(args.segment_of_slot);
  A* total = reinterpret_cast<A*>(scratch);
  int64_t s = begin < args.slots ? segment_holding(ptr, args.segments, begin) : args.segments;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < width; ++i) total[i] = 0;
    if (row_ptr == nullptr) {
      while (s < args.segments && int64_t(ptr[s + 1]) <= row) ++s;
      if (s < args.segments) add_slot<T, Index>(args, s, row, false, total);
    } else {
      int64_t last = -1;
      for (int64_t k = row_ptr[row]; k < int64_t(row_ptr[row + 1]); ++k) {
        const int64_t segment = segment_of_slot[row_slots[k]];
        add_slot<T, Index>(args, segment, row, segment == last, total);
        last = segment;
      }
    }
    T* to = static_cast<T*>(args.grad_x) + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(to[i], total[i]);
  }
}

// Calls function.template operator()<T, Index>() for the arguments' types.
template <class F>
void with_types(const SegmentReduceArgs& args, F function) {
  const auto with_index = [&]<class T>() {
    if (args.wide_index) return function.template operator()<T, int64_t>();
    return function.template operator()<T, int32_t>();
  };
  switch (args.dtype) {
    case Scalar::f32:
      return with_index.template operator()<float>();
    case Scalar::f64:
      return with_index.template operator()<double>();
    case Scalar::bf16:
      return with_index.template operator()<bfloat16>();
    case Scalar::f16:
      return with_index.template operator()<float16>();
  }
}

}  // namespace

void segment_cells_forward(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  with_types(args, [&]<class T, class Index>() { cells_forward<T, Index>(args, begin, end, scratch); });
}

void segment_merge(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  with_types(args, [&]<class T, class Index>() { merge_pieces<T, Index>(args, begin, end, scratch); });
}

void segment_coefficients(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  with_types(args, [&]<class T, class Index>() { coefficients<T, Index>(args, begin, end, scratch); });
}

void segment_rows_backward(const SegmentReduceArgs& args, int64_t begin, int64_t end, double* scratch) {
  with_types(args, [&]<class T, class Index>() { rows_backward<T, Index>(args, begin, end, scratch); });
}

}  // namespace scalegmn::SCALEGMN_ISA

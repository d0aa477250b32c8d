// What the row kernels of the composed `row_program` compute: one step on a chunk of rows, products apart. The rows'
// arithmetic is here, once, for the threads of a GPU (csrc/cuda/row_program.cu) and, in tests, one thread of a CPU
// (csrc/cpu/row_kernels.cpp).
//
// `Wide` is float, or double if args.wide. Strides count numbers. Results overwrite, or are added where `accumulate` is
// set. A result may lie where an operand of the same strides does.
#pragma once

#include "common/row_program.h"
#include "common/symmetrize.h"

#ifdef __CUDACC__
#define SCALEGMN_ROW __device__ __forceinline__
#else
#define SCALEGMN_ROW inline __attribute__((always_inline))
#endif

namespace scalegmn {

enum class RowMap {
  second,     // b
  add,        // a + b
  multiply,   // a * b
  scale,      // a * factor * b, b a number per row; without b, a * factor
  magnitude,  // |a|
  slope,      // a where b > 0, -a where b < 0, 0 at 0, NaN at NaN
  dropout,    // a * factor where the row and column are kept, else 0
};

struct RowMapArgs {
  RowMap map;
  bool wide, accumulate;
  int64_t rows, width;
  double factor;
  const void* a;  // Wide [rows, width], or null
  int64_t a_stride;
  const void* b;  // dtype b_dtype [*, width or 1], or null
  Scalar b_dtype;
  int64_t b_stride;
  RowIndex b_index;  // [rows]: which row of b; null: row by row
  const int64_t* seed;  // dropout: [2], where the rows are; null: another map
  double stream;        // dropout
  uint32_t threshold;   // dropout
  int64_t first;        // dropout: the number of the first row
  void* to;  // Wide [rows, width]
  int64_t to_stride;
};

// to [rows] = factor <a, b> row by row; all contiguous.
struct RowDotArgs {
  bool wide, accumulate;
  int64_t rows, width;
  double factor;
  const void *a, *b;  // Wide [rows, width]
  void* to;           // Wide [rows]
};

// act(x), of the layer norm of x where there is a weight; all contiguous.
struct RowNormArgs {
  bool wide, accumulate;
  int64_t rows, width;
  Activation activation;
  double w0;
  const void* x;                // Wide [rows, width]
  const void *weight, *shift;   // Wide [width], or both null
  const void* grad;             // backward: Wide [rows, width]
  void* to;                     // Wide [rows, width]: the result; backward: the gradient of x, or null
  void* partial;                // backward: Wide [blocks, 2, width], the gradients of weight and shift by blocks of
                                // row_norm_block rows; null: not wanted, or no norm
};

constexpr int64_t row_norm_block = 8;

// to[key] += values of all rows with that key, in the order of `order`, whose keys are nondecreasing. Runs of equal keys are
// summed by blocks of row_run_block rows; a run in one block goes to its place at once, parts of one in several blocks to
// `tails` (where it begins) and `heads`, which are joined in order.
struct RowRunArgs {
  bool wide;
  int64_t rows, width;
  RowIndex keys;         // [first + rows]: where each row belongs
  const int64_t* order;  // [rows]: numbers of rows from `first` on, sorted by key; null: as they are
  int64_t first;         // number of the first row
  const void* values;    // Wide [rows, width]
  void* to;              // Wide [*, width]
  void *heads, *tails;   // Wide [blocks, width]
};

constexpr int64_t row_run_block = 32;

inline int64_t row_blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// Launchers, on a stream of the current device where that is a GPU. Return null, or the error of the launch.
struct RowKernels {
  const char* (*map)(const RowMapArgs& args, void* stream);
  const char* (*dot)(const RowDotArgs& args, void* stream);
  const char* (*norm)(const RowNormArgs& args, void* stream);
  const char* (*norm_backward)(const RowNormArgs& args, void* stream);
  const char* (*add_runs)(const RowRunArgs& args, void* stream);
};

namespace SCALEGMN_ISA {

constexpr int row_columns = 4;

// `Lanes` are the threads that share a row: over(width, body) calls body(columns) for parts of a row, `columns` being the
// row_columns columns of a thread, with load_from, store_to, at and valid; sum adds over the threads; leads is true for one.

template <class A, class T>
struct MapRow {
  using Wide = A;

  template <class Lanes>
  static SCALEGMN_ROW void run(const Lanes& lanes, const RowMapArgs& args, int64_t row) {
    const A* a = static_cast<const A*>(args.a) + row * args.a_stride;
    const int64_t at = args.b_index.data == nullptr ? row : index_at(args.b_index, row);
    const T* b = static_cast<const T*>(args.b) + at * args.b_stride;
    A* to = static_cast<A*>(args.to) + row * args.to_stride;
    const bool by_row = args.map == RowMap::scale, reads_a = args.map != RowMap::second;
    const bool reads_b = args.b != nullptr && !by_row;
    const A factor = by_row && args.b != nullptr ? A(args.factor) * A(load(b[0])) : A(args.factor);
    uint32_t base = 0;
    if (args.seed != nullptr) {
      const uint32_t stream = dropout_stream(uint32_t(args.seed[0]), uint32_t(args.seed[1]), args.stream);
      base = mix(stream + uint32_t(args.first + row));
    }
    lanes.over(args.width, [&](const auto& columns) {
      A x[row_columns] = {}, y[row_columns] = {}, sum[row_columns] = {};
      if (reads_a) columns.load_from(a, x);
      if (reads_b) columns.load_from(b, y);
      if (args.accumulate) columns.load_from(to, sum);
      for (int i = 0; i < row_columns; ++i) {
        A value = y[i];
        switch (args.map) {
          case RowMap::second:
            break;
          case RowMap::add:
            value = x[i] + y[i];
            break;
          case RowMap::multiply:
            value = x[i] * y[i];
            break;
          case RowMap::scale:
            value = x[i] * factor;
            break;
          case RowMap::magnitude:
            value = magnitude(x[i]);
            break;
          case RowMap::slope:
            value = y[i] > A(0) ? x[i] : y[i] < A(0) ? -x[i] : y[i] * x[i];
            break;
          case RowMap::dropout:
            value = mix(base + uint32_t(columns.at(i))) >= args.threshold ? x[i] * factor : A(0);
            break;
        }
        sum[i] = args.accumulate ? sum[i] + value : value;
      }
      columns.store_to(to, sum);
    });
  }
};

template <class A>
struct DotRow {
  using Wide = A;

  template <class Lanes>
  static SCALEGMN_ROW void run(const Lanes& lanes, const RowDotArgs& args, int64_t row) {
    const A *a = static_cast<const A*>(args.a) + row * args.width, *b = static_cast<const A*>(args.b) + row * args.width;
    A sum = 0;
    lanes.over(args.width, [&](const auto& columns) {
      A x[row_columns], y[row_columns];
      columns.load_from(a, x);
      columns.load_from(b, y);
      for (int i = 0; i < row_columns; ++i) sum += x[i] * y[i];
    });
    sum = lanes.sum(sum) * A(args.factor);
    if (!lanes.leads()) return;
    A& to = static_cast<A*>(args.to)[row];
    to = args.accumulate ? to + sum : sum;
  }
};

template <class A>
struct RowMoments {
  A mean, rstd;
};

template <class A, class Lanes>
SCALEGMN_ROW RowMoments<A> row_moments(const Lanes& lanes, const A* x, int64_t width) {
  A sum = 0, squares = 0;
  lanes.over(width, [&](const auto& columns) {
    A value[row_columns];
    columns.load_from(x, value);
    for (int i = 0; i < row_columns; ++i) sum += value[i];
  });
  const A mean = lanes.sum(sum) / A(width);
  lanes.over(width, [&](const auto& columns) {
    A value[row_columns];
    columns.load_from(x, value, mean);
    for (int i = 0; i < row_columns; ++i) squares += (value[i] - mean) * (value[i] - mean);
  });
  return {mean, A(1) / square_root(lanes.sum(squares) / A(width) + A(row_norm_eps))};
}

template <class A>
struct NormRow {
  using Wide = A;

  template <class Lanes>
  static SCALEGMN_ROW void run(const Lanes& lanes, const RowNormArgs& args, int64_t row) {
    const A *x = static_cast<const A*>(args.x) + row * args.width, *weight = static_cast<const A*>(args.weight),
            *shift = static_cast<const A*>(args.shift);
    A* to = static_cast<A*>(args.to) + row * args.width;
    RowMoments<A> m{A(0), A(1)};
    if (weight != nullptr) m = row_moments(lanes, x, args.width);
    lanes.over(args.width, [&](const auto& columns) {
      A y[row_columns], w[row_columns], c[row_columns];
      columns.load_from(x, y);
      if (weight != nullptr) {
        columns.load_from(weight, w);
        columns.load_from(shift, c);
      }
      for (int i = 0; i < row_columns; ++i) {
        if (weight != nullptr) y[i] = (y[i] - m.mean) * m.rstd * w[i] + c[i];
        y[i] = activate(args.activation, y[i], A(args.w0));
      }
      columns.store_to(to, y);
    });
  }
};

// A block of row_norm_block rows.
template <class A>
struct NormBlockBackward {
  using Wide = A;

  template <class Lanes>
  static SCALEGMN_ROW void run(const Lanes& lanes, const RowNormArgs& args, int64_t block) {
    const int64_t width = args.width, first = block * row_norm_block;
    const int64_t last = first + row_norm_block < args.rows ? first + row_norm_block : args.rows;
    const A *weight = static_cast<const A*>(args.weight), *shift = static_cast<const A*>(args.shift), w0 = A(args.w0);
    A* weight_sum = static_cast<A*>(args.partial) + block * 2 * width;
    A* shift_sum = weight_sum + width;
    for (int64_t row = first; row < last; ++row) {
      const A *x = static_cast<const A*>(args.x) + row * width, *grad = static_cast<const A*>(args.grad) + row * width;
      A* to = static_cast<A*>(args.to) + row * width;
      RowMoments<A> m{A(0), A(1)};
      if (weight != nullptr) m = row_moments(lanes, x, width);
      // the standardised row, the gradient of what is activated, and the norm's weight; 0 in columns that are not there
      const auto slopes = [&](const auto& columns, A(&normal)[row_columns], A(&slope)[row_columns], A(&w)[row_columns]) {
        A c[row_columns];
        columns.load_from(x, normal, m.mean);
        columns.load_from(grad, slope);
        if (weight != nullptr) {
          columns.load_from(weight, w);
          columns.load_from(shift, c);
        }
        for (int i = 0; i < row_columns; ++i) {
          normal[i] = (normal[i] - m.mean) * m.rstd;
          if (weight == nullptr) w[i] = A(1), c[i] = A(0);
          slope[i] *= activate_derivative(args.activation, normal[i] * w[i] + c[i], w0);
        }
      };
      A mean_grad = 0, mean_product = 0;
      if (weight != nullptr && args.to != nullptr) {
        lanes.over(width, [&](const auto& columns) {
          A normal[row_columns], slope[row_columns], w[row_columns];
          slopes(columns, normal, slope, w);
          for (int i = 0; i < row_columns; ++i) {
            mean_grad += slope[i] * w[i];
            mean_product += slope[i] * w[i] * normal[i];
          }
        });
        mean_grad = lanes.sum(mean_grad) / A(width);
        mean_product = lanes.sum(mean_product) / A(width);
      }
      lanes.over(width, [&](const auto& columns) {
        A normal[row_columns], slope[row_columns], w[row_columns], sum[row_columns] = {}, product[row_columns] = {};
        slopes(columns, normal, slope, w);
        if (args.partial != nullptr) {
          if (row > first) {
            columns.load_from(weight_sum, product);
            columns.load_from(shift_sum, sum);
          }
          for (int i = 0; i < row_columns; ++i) {
            product[i] += slope[i] * normal[i];
            sum[i] += slope[i];
          }
          columns.store_to(weight_sum, product);
          columns.store_to(shift_sum, sum);
        }
        if (args.to == nullptr) return;
        A result[row_columns] = {};
        if (args.accumulate) columns.load_from(to, result);
        for (int i = 0; i < row_columns; ++i) {
          const A value = weight == nullptr
                              ? slope[i]
                              : standardize_backward(slope[i] * w[i], normal[i], m.rstd, mean_grad, mean_product);
          result[i] = args.accumulate ? result[i] + value : value;
        }
        columns.store_to(to, result);
      });
    }
  }
};

// Rows [begin, end) of a block, and whether its first run begins before it and its last one ends behind it.
struct RunBlock {
  const RowRunArgs& args;
  int64_t begin, end;
  bool enters, leaves;

  SCALEGMN_ROW RunBlock(const RowRunArgs& args, int64_t block) : args(args), begin(block * row_run_block) {
    end = begin + row_run_block < args.rows ? begin + row_run_block : args.rows;
    enters = begin > 0 && key(begin - 1) == key(begin);
    leaves = end < args.rows && key(end - 1) == key(end);
  }
  SCALEGMN_ROW int64_t row(int64_t place) const { return args.order == nullptr ? place : args.order[place] - args.first; }
  SCALEGMN_ROW int64_t key(int64_t place) const { return index_at(args.keys, args.first + row(place)); }
};

template <class A>
struct SumRuns {
  using Wide = A;

  template <class Lanes>
  static SCALEGMN_ROW void run(const Lanes& lanes, const RowRunArgs& args, int64_t block) {
    const RunBlock rows(args, block);
    const int64_t width = args.width;
    const A* values = static_cast<const A*>(args.values);
    for (int64_t begin = rows.begin, end; begin < rows.end; begin = end) {
      const int64_t key = rows.key(begin);
      for (end = begin + 1; end < rows.end && rows.key(end) == key;) ++end;
      const bool head = begin == rows.begin && rows.enters, tail = end == rows.end && rows.leaves;
      A* to = head   ? static_cast<A*>(args.heads) + block * width
              : tail ? static_cast<A*>(args.tails) + block * width
                     : static_cast<A*>(args.to) + key * width;
      lanes.over(width, [&](const auto& columns) {
        A sum[row_columns] = {}, value[row_columns];
        if (!head && !tail) columns.load_from(to, sum);
        for (int64_t place = begin; place < end; ++place) {
          columns.load_from(values + rows.row(place) * width, value);
          for (int i = 0; i < row_columns; ++i) sum[i] += value[i];
        }
        columns.store_to(to, sum);
      });
    }
  }
};

// The run that begins in a block and ends behind it, if there is one.
template <class A>
struct JoinRuns {
  using Wide = A;

  template <class Lanes>
  static SCALEGMN_ROW void run(const Lanes& lanes, const RowRunArgs& args, int64_t block) {
    const RunBlock rows(args, block);
    const int64_t width = args.width, key = rows.key(rows.end - 1);
    if (!rows.leaves || (rows.enters && rows.key(rows.begin) == key)) return;
    const A *heads = static_cast<const A*>(args.heads), *tail = static_cast<const A*>(args.tails) + block * width;
    A* to = static_cast<A*>(args.to) + key * width;
    int64_t end = block + 1;
    while (end * row_run_block < args.rows && rows.key(end * row_run_block) == key) ++end;
    lanes.over(width, [&](const auto& columns) {
      A sum[row_columns], value[row_columns];
      columns.load_from(tail, sum);
      for (int64_t next = block + 1; next < end; ++next) {
        columns.load_from(heads + next * width, value);
        for (int i = 0; i < row_columns; ++i) sum[i] += value[i];
      }
      columns.load_from(to, value);
      for (int i = 0; i < row_columns; ++i) value[i] += sum[i];
      columns.store_to(to, value);
    });
  }
};

// Calls launch(body) with the body for the dtypes of a map.
template <class Launch>
void with_map(const RowMapArgs& args, Launch launch) {
  if (args.wide) {
    switch (args.b_dtype) {
      case Scalar::f64:
        return launch(MapRow<double, double>());
      case Scalar::f32:
        return launch(MapRow<double, float>());
      case Scalar::bf16:
        return launch(MapRow<double, bfloat16>());
      case Scalar::f16:
        return launch(MapRow<double, float16>());
    }
  }
  switch (args.b_dtype) {
    case Scalar::bf16:
      return launch(MapRow<float, bfloat16>());
    case Scalar::f16:
      return launch(MapRow<float, float16>());
    default:
      return launch(MapRow<float, float>());
  }
}

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

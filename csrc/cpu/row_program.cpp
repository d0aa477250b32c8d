#include "cpu/row_program.h"

#include "common/symmetrize.h"
#include "cpu/activations.h"

namespace scalegmn::SCALEGMN_ISA {
namespace {

// -- elementwise ------------------------------------------------------------------------------------------------------

// 1 / d for d in [1, 2^126], to 1 unit in the last place; several times faster than a division in vectors of floats.
inline __attribute__((always_inline)) float reciprocal(float d) {
  float r = from_bits(0x7ef311c7u - to_bits(d));  // to 12%
  r = r * (2.f - d * r);
  r = r * (2.f - d * r);
  return r + r * (1.f - d * r);
}

// logistic, to 2 units in the last place. On machines without fused multiply-add that of common/math.h, which reduces the
// argument exactly without one.
inline __attribute__((always_inline)) float sigmoid(float y) {
#ifdef __FMA__
  const float x = clamp(-y, -87.f, 87.f), shift = 0x1.8p23f;
  const float shifted = x * 0x1.715476p0f + shift, n = shifted - shift;
  const float f = (x * 0x1.715476p0f - n) + x * 0x1.4ae0bfp-26f;
  float p = 0x1.430912p-13f;  // 2^f - 1 over f, |f| <= 1/2
  p = p * f + 0x1.5d87fep-10f;
  p = p * f + 0x1.3b2ab6p-7f;
  p = p * f + 0x1.c6b08ep-5f;
  p = p * f + 0x1.ebfbe0p-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.f;
  return reciprocal(1.f + p * power_of_2(to_bits(shifted) - to_bits(shift)));
#else
  return logistic(y);
#endif
}

inline __attribute__((always_inline)) double sigmoid(double y) { return logistic(y); }

template <Activation activation, class A>
inline __attribute__((always_inline)) A value_and_derivative(A y, A w0, A& derivative) {
  if constexpr (activation == Activation::silu) {
    const A s = sigmoid(y), value = y * s;
    derivative = s + value * (A(1) - s);
    return value;
  } else if constexpr (activation == Activation::sigmoid) {
    const A s = sigmoid(y);
    derivative = s * (A(1) - s);
    return s;
  } else if constexpr (activation == Activation::tanh) {
    const A t = hyperbolic_tangent(y);
    derivative = A(1) - t * t;
    return t;
  } else {
    derivative = activate_derivative(activation, y, w0);
    return activate(activation, y, w0);
  }
}

template <Activation activation, class A>
inline __attribute__((always_inline)) A value_alone(A y, A w0) {
  if constexpr (activation == Activation::silu) return y * sigmoid(y);
  if constexpr (activation == Activation::sigmoid) return sigmoid(y);
  return activate(activation, y, w0);
}

template <class A, class Term>
inline __attribute__((always_inline)) A row_sum(int64_t width, Term term) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < width; ++i) total += term(i);
  return total;
}

template <class A>
struct Moments {
  A mean, rstd;
};

template <class A>
inline __attribute__((always_inline)) Moments<A> moments(const A* x, int64_t width) {
  const A mean = row_sum<A>(width, [=](int64_t i) { return x[i]; }) / A(width);
  const A squares = row_sum<A>(width, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return {mean, A(1) / square_root(squares / A(width) + A(row_norm_eps))};
}

// -- one step on a tile -----------------------------------------------------------------------------------------------

template <class A>
struct Tile {
  const RowProgramArgs& args;
  const RowPartition& partition;
  int64_t first, rows;  // rows [first, first + rows) of all
  A* workspace;
  bool backward;  // values are kept, and with them what the backward steps need

  A* at(int64_t offset) const { return workspace + offset; }
  const RowStep& step(int number) const { return partition.section->steps[number]; }
  A* value(int number) const { return at(step(number).value); }
  A* grad(int number) const { return step(number).grad < 0 ? nullptr : at(step(number).grad); }
  // Its first rows.
  Tile narrowed(int64_t count) const { return {args, partition, first, count, workspace, backward}; }
  // Where a step adds its contribution to the gradient of a; null: nowhere.
  A* grad_of_a(const RowStep& step) const { return step.a < 0 || step.passes_a ? nullptr : grad(step.a); }
};

void gemm(const RowProgramArgs& args, char ta, char tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
          const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  const int m_ = int(m), n_ = int(n), k_ = int(k), a_ = int(lda), b_ = int(ldb), c_ = int(ldc);
  const float one = 1;
  args.gemm32(&ta, &tb, &m_, &n_, &k_, &one, a, &a_, b, &b_, &beta, c, &c_);
}

void gemm(const RowProgramArgs& args, char ta, char tb, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda,
          const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  const int m_ = int(m), n_ = int(n), k_ = int(k), a_ = int(lda), b_ = int(ldb), c_ = int(ldc);
  const double one = 1;
  args.gemm64(&ta, &tb, &m_, &n_, &k_, &one, a, &a_, b, &b_, &beta, c, &c_);
}

// Calls use(row of the tile, its row of the table as T*).
template <class T, class Use>
inline __attribute__((always_inline)) void each_table_row(const RowProgramArgs& args, const RowStep& step, int64_t first,
                                                          int64_t rows, Use use) {
  const RowTable& table = args.tables[step.table];
  const T* data = static_cast<const T*>(table.data);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = step.index < 0 ? first + r : index_at(args.indices[step.index], first + r);
    use(r, data + at * table.stride);
  }
}

template <class F>
inline __attribute__((always_inline)) void with_scalar(Scalar dtype, F function) {
  switch (dtype) {
    case Scalar::f32:
      return function.template operator()<float>();
    case Scalar::f64:
      return function.template operator()<double>();
    case Scalar::bf16:
      return function.template operator()<bfloat16>();
    case Scalar::f16:
      return function.template operator()<float16>();
  }
}

// The distinct rows of a tile that a step loads (RowStep::distinct).
struct DistinctRows {
  int32_t *count, *place, *first;

  template <class A>
  DistinctRows(const Tile<A>& t, const RowStep& step)
      : count(reinterpret_cast<int32_t*>(t.at(step.distinct))), place(count + 1), first(place + t.args.tile_rows) {}

  void find(const RowIndex& index, int64_t begin, int64_t rows) {
    constexpr int bits = 9;
    static_assert(2 * most_tile_rows <= 1 << bits);
    int32_t table[1 << bits];
    for (int32_t& entry : table) entry = -1;
    *count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = index_at(index, begin + r);
      uint64_t at = uint64_t(row) * 0x9e3779b97f4a7c15u >> (64 - bits);
      while (table[at] >= 0 && index_at(index, begin + first[table[at]]) != row) at = (at + 1) % (1 << bits);
      if (table[at] < 0) {
        first[*count] = int32_t(r);
        table[at] = (*count)++;
      }
      place[r] = table[at];
    }
  }
};

template <class A>
void load_distinct(const Tile<A>& t, const RowStep& step) {
  const RowIndex& index = t.args.indices[step.index];
  const RowTable& table = t.args.tables[step.table];
  DistinctRows distinct(t, step);
  distinct.find(index, t.first, t.rows);
  with_scalar(table.dtype, [&]<class T>() {
    for (int64_t k = 0; k < *distinct.count; ++k) {
      const T* from = static_cast<const T*>(table.data) + index_at(index, t.first + distinct.first[k]) * table.stride;
      A* to = t.at(step.value) + k * step.width;
#pragma omp simd
      for (int64_t i = 0; i < step.width; ++i) to[i] = A(load(from[i]));
    }
  });
}

template <class A>
void forward_load(const Tile<A>& t, const RowStep& step) {
  if (step.distinct >= 0) return load_distinct(t, step);
  const int64_t width = step.width;
  A* out = t.at(step.value);
  const A* a = step.a < 0 ? nullptr : t.value(step.a);
  with_scalar(t.args.tables[step.table].dtype, [&]<class T>() {
    each_table_row<T>(t.args, step, t.first, t.rows, [&](int64_t r, const T* from) {
      A* to = out + r * width;
      const A* left = a + r * width;
      if (step.op == RowOp::load) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = A(load(from[i]));
      } else if (step.op == RowOp::load_mul) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = left[i] * A(load(from[i]));
      } else if (step.op == RowOp::load_add) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = left[i] + A(load(from[i]));
      } else {
        const A factor = A(load(from[0]));
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = left[i] * factor;
      }
    });
  });
}

// Products of rows are compiled for their shape, so a tile's rows are rounded up: its buffers have the room, and what
// is computed of the rows beyond is never read.
inline int64_t padded(int64_t rows) { return (rows + 15) / 16 * 16; }

template <class A>
uint16_t* narrow_scratch(const Tile<A>& t) {
  return reinterpret_cast<uint16_t*>(t.at(t.args.scratch));
}

inline void to_bfloat16(const float* from, int64_t count, uint16_t* to) {
  bfloat16* narrow = reinterpret_cast<bfloat16*>(to);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(narrow[i], from[i]);
}

inline uint32_t bfloat16_bits(float x) {
  bfloat16 narrow;
  store(narrow, x);
  return narrow.bits;
}

// c (+)= a b on the rows of a tile, b as float [k, n] or of bfloat16 in pairs.
void row_product(const Tile<float>& t, int64_t n, int64_t k, const float* a, const float* b, const uint16_t* pairs,
                 bool accumulate, float* c) {
  const int64_t rows = padded(t.rows);
  if (pairs == nullptr) return t.args.row32(rows, n, k, k, n, n, accumulate, a, b, c);
  uint16_t* narrow = narrow_scratch(t);
  to_bfloat16(a, rows * k, narrow);
  t.args.row16(rows, n, k, k, n, n, accumulate, narrow, pairs, c);
}

// to [width, rows'] = x [rows, width]^T, rows' the padded rows, which get 0; store(x) writes an element.
template <class T, class Convert>
inline __attribute__((always_inline)) void transpose(const float* x, int64_t rows, int64_t width, T* to, Convert convert) {
  constexpr int64_t block = 16;
  const int64_t stride = padded(rows);
  for (int64_t first = 0; first < stride; first += block) {
    for (int64_t left = 0; left < width; left += block) {
      if (first + block <= rows && left + block <= width) {
        for (int64_t i = left; i < left + block; ++i) {
          for (int64_t r = first; r < first + block; ++r) to[i * stride + r] = convert(x[r * width + i]);
        }
        continue;
      }
      for (int64_t i = left; i < left + block && i < width; ++i) {
        for (int64_t r = first; r < first + block; ++r) {
          to[i * stride + r] = convert(r < rows ? x[r * width + i] : 0.f);
        }
      }
    }
  }
}

// to += grad^T a: the gradient of a weight, by the rows of a tile.
void weight_product(const Tile<float>& t, const RowStep& step, const float* grad, float* a, float* to) {
  const int64_t rows = padded(t.rows), n = step.width, k = step.in_width;
  for (int64_t i = t.rows * k; i < rows * k; ++i) a[i] = 0;  // rows that nobody reads but this product
  if (step.pairs == nullptr) {
    float* turned = t.at(t.args.scratch);
    transpose(grad, t.rows, n, turned, [](float x) { return x; });
    return t.args.row32(n, k, rows, rows, k, k, true, turned, a, to);
  }
  uint16_t *turned = narrow_scratch(t), *pairs = turned + n * rows;
  transpose(grad, t.rows, n, turned, [](float x) { return uint16_t(bfloat16_bits(x)); });
  for (int64_t r = 0; r < rows; r += 2) {
    const float *even = a + r * k, *odd = even + k;
    uint32_t* pair = reinterpret_cast<uint32_t*>(pairs + r * k);
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) pair[i] = bfloat16_bits(even[i]) | bfloat16_bits(odd[i]) << 16;
  }
  t.args.row16(n, k, rows, rows, k, k, true, turned, pairs, to);
}

// Whether products of rows serve the step; the type of the tile is float then.
inline bool by_rows(const RowStep& step) { return step.weight_t != nullptr || step.pairs != nullptr; }

template <class A>
void apply_linear(const Tile<A>& t, const RowStep& step, A* out) {
  const A* bias = static_cast<const A*>(step.bias);
  if (bias != nullptr) {
    for (int64_t r = 0; r < t.rows; ++r) {
#pragma omp simd
      for (int64_t i = 0; i < step.width; ++i) out[r * step.width + i] = bias[i];
    }
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    if (by_rows(step)) {
      return row_product(t, step.width, step.in_width, t.value(step.a), step.weight_t, step.pairs_t, bias != nullptr, out);
    }
  }
  gemm(t.args, 'T', 'N', step.width, t.rows, step.in_width, static_cast<const A*>(step.weight), step.weight_stride,
       t.value(step.a), step.in_width, A(bias != nullptr), out, step.width);
}

template <class A>
void forward_linear(const Tile<A>& t, const RowStep& step) {
  const RowStep& rows = t.step(step.a);
  A* out = t.at(step.value);
  if (rows.distinct < 0) return apply_linear(t, step, out);
  const DistinctRows distinct(t, rows);
  if (*distinct.count == t.rows) return apply_linear(t, step, out);
  A* results = t.at(t.args.spread);
  apply_linear(t.narrowed(*distinct.count), step, results);
  for (int64_t r = 0; r < t.rows; ++r) {
    const A* from = results + distinct.place[r] * step.width;
#pragma omp simd
    for (int64_t i = 0; i < step.width; ++i) out[r * step.width + i] = from[i];
  }
}

// The statistics of a few rows come before their elements: one row's sums wait for its square root, several overlap.
constexpr int64_t row_block = 8;

template <bool keep, Activation activation, class A>
inline __attribute__((always_inline)) A value_of(A y, A w0, A& derivative) {
  if constexpr (keep) return value_and_derivative<activation>(y, w0, derivative);
  return value_alone<activation>(y, w0);
}

template <bool keep, Activation activation, class A>
void norm_act_rows(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  const A* in = t.value(step.a);
  A *out = t.at(step.value), *aux = t.at(step.aux), *stats = t.at(step.stats);
  const A *weight = static_cast<const A*>(step.weight), *shift = static_cast<const A*>(step.shift);
  const A w0 = A(step.p0);
  for (int64_t begin = 0; begin < t.rows; begin += row_block) {
    const int64_t end = begin + row_block < t.rows ? begin + row_block : t.rows;
    Moments<A> rows[row_block];
    if (weight != nullptr) {
      for (int64_t r = begin; r < end; ++r) rows[r - begin] = moments(in + r * width, width);
    }
    for (int64_t r = begin; r < end; ++r) {
      const A* x = in + r * width;
      A *to = out + r * width, *derivative = keep ? aux + r * width : to;
      if (weight == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = value_of<keep, activation>(x[i], w0, derivative[i]);
        continue;
      }
      const Moments<A> m = rows[r - begin];
      if (keep) stats[2 * r] = m.mean, stats[2 * r + 1] = m.rstd;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        to[i] = value_of<keep, activation>((x[i] - m.mean) * m.rstd * weight[i] + shift[i], w0, derivative[i]);
      }
    }
  }
}

template <class A>
void forward_norm_act(const Tile<A>& t, const RowStep& step) {
  with_activation(step.activation, [&]<Activation activation>() {
    t.backward ? norm_act_rows<true, activation>(t, step) : norm_act_rows<false, activation>(t, step);
  });
}

template <class A>
struct BranchMoments {
  A mean, rstd_plus, rstd_minus;
};

// The bias has mean 0 where there is a norm, so bias + (h - mean) and bias - (h - mean) are the centred branches.
template <class A>
inline __attribute__((always_inline)) BranchMoments<A> branch_moments(const A* h, const A* bias, int64_t width) {
  const A mean = row_sum<A>(width, [=](int64_t i) { return h[i]; }) / A(width);
  A squares_plus = 0, squares_minus = 0;
#pragma omp simd reduction(+ : squares_plus, squares_minus)
  for (int64_t i = 0; i < width; ++i) {
    const A x = h[i] - mean, plus = bias[i] + x, minus = bias[i] - x;
    squares_plus += plus * plus;
    squares_minus += minus * minus;
  }
  return {mean, A(1) / square_root(squares_plus / A(width) + A(row_norm_eps)),
          A(1) / square_root(squares_minus / A(width) + A(row_norm_eps))};
}

template <bool keep, Activation activation, class A>
void symmetrize_rows(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  const A* in = t.value(step.a);
  A *out = t.at(step.value), *stats = t.at(step.stats), *aux = t.at(step.aux), *aux_minus = aux + t.args.tile_rows * width;
  const A *weight = static_cast<const A*>(step.weight), *shift = static_cast<const A*>(step.shift);
  const A *bias = static_cast<const A*>(step.bias), w0 = A(step.p0);
  for (int64_t begin = 0; begin < t.rows; begin += row_block) {
    const int64_t end = begin + row_block < t.rows ? begin + row_block : t.rows;
    BranchMoments<A> rows[row_block];
    if (weight != nullptr) {
      for (int64_t r = begin; r < end; ++r) rows[r - begin] = branch_moments(in + r * width, bias, width);
    }
    for (int64_t r = begin; r < end; ++r) {
      const A* h = in + r * width;
      A *to = out + r * width, *d_plus = keep ? aux + r * width : to, *d_minus = keep ? aux_minus + r * width : to;
      if (weight == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          to[i] = value_of<keep, activation>(bias[i] + h[i], w0, d_plus[i]) +
                  value_of<keep, activation>(bias[i] - h[i], w0, d_minus[i]);
        }
        continue;
      }
      const BranchMoments<A> m = rows[r - begin];
      if (keep) stats[3 * r] = m.mean, stats[3 * r + 1] = m.rstd_plus, stats[3 * r + 2] = m.rstd_minus;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A x = h[i] - m.mean;
        const A plus = (bias[i] + x) * m.rstd_plus * weight[i] + shift[i];
        const A minus = (bias[i] - x) * m.rstd_minus * weight[i] + shift[i];
        to[i] = value_of<keep, activation>(plus, w0, d_plus[i]) + value_of<keep, activation>(minus, w0, d_minus[i]);
      }
    }
  }
}

template <class A>
void forward_symmetrize(const Tile<A>& t, const RowStep& step) {
  with_activation(step.activation, [&]<Activation activation>() {
    t.backward ? symmetrize_rows<true, activation>(t, step) : symmetrize_rows<false, activation>(t, step);
  });
}

template <class A>
A largest_magnitude(const A* h, int64_t width) {
  A largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < width; ++i) largest = largest < magnitude(h[i]) ? magnitude(h[i]) : largest;
  return largest;
}

template <class A>
void forward_normalize(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  for (int64_t r = 0; r < t.rows; ++r) {
    const A* h = t.value(step.a) + r * width;
    A* to = t.at(step.value) + r * width;
    const A factor = safe_factor(largest_magnitude(h, width));
    const A norm = square_root(row_sum<A>(width, [=](int64_t i) { return (h[i] * factor) * (h[i] * factor); }));
    const A scale = normalize_scale(norm, factor, A(step.p0));
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = h[i] * factor * scale;
  }
}

template <class A>
void apply_dropout(const Tile<A>& t, const RowStep& step, const A* from, A* to, bool accumulate) {
  const int64_t width = step.width;
  const A factor = A(1) / (A(1) - A(step.p0));
  const uint32_t threshold = dropout_threshold(step.p0);
  const uint32_t stream = dropout_stream(t.args.seed0, t.args.seed1, step.p1);
  for (int64_t r = 0; r < t.rows; ++r) {
    const uint32_t base = mix(stream + uint32_t(t.first + r));
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A kept = mix(base + uint32_t(i)) >= threshold ? from[r * width + i] * factor : A(0);
      to[r * width + i] = accumulate ? to[r * width + i] + kept : kept;
    }
  }
}

template <class A>
void forward_step(const Tile<A>& t, const RowStep& step) {
  const int64_t count = t.rows * step.width;
  A* out = t.at(step.value);
  const A* a = step.a < 0 ? nullptr : t.value(step.a);
  const A* b = step.b < 0 ? nullptr : t.value(step.b);
  switch (step.op) {
    case RowOp::load:
    case RowOp::load_mul:
    case RowOp::load_add:
    case RowOp::scale:
      return forward_load(t, step);
    case RowOp::linear:
      return forward_linear(t, step);
    case RowOp::symmetrize:
      return forward_symmetrize(t, step);
    case RowOp::norm_act:
      return forward_norm_act(t, step);
    case RowOp::normalize:
      return forward_normalize(t, step);
    case RowOp::dropout:
      return apply_dropout(t, step, a, out, false);
    case RowOp::add:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
      return;
    case RowOp::mul:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = a[i] * b[i];
      return;
    case RowOp::negate:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = -a[i];
      return;
    case RowOp::abs:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = magnitude(a[i]);
      return;
    case RowOp::add_vector: {
      const A* vector = static_cast<const A*>(step.bias);
      for (int64_t r = 0; r < t.rows; ++r) {
#pragma omp simd
        for (int64_t i = 0; i < step.width; ++i) out[r * step.width + i] = a[r * step.width + i] + vector[i];
      }
      return;
    }
    case RowOp::head_dot: {
      const int64_t head = step.in_width / step.width;
      for (int64_t k = 0; k < count; ++k) {
        const A *x = a + k * head, *y = b + k * head;
        out[k] = A(step.p0) * row_sum<A>(head, [=](int64_t i) { return x[i] * y[i]; });
      }
      return;
    }
    case RowOp::concat: {
      const int64_t left = step.in_width, right = step.width - left;
      for (int64_t r = 0; r < t.rows; ++r) {
        for (int64_t i = 0; i < left; ++i) out[r * step.width + i] = a[r * left + i];
        for (int64_t i = 0; i < right; ++i) out[r * step.width + left + i] = b[r * right + i];
      }
      return;
    }
  }
}

// -- backward of one step ---------------------------------------------------------------------------------------------

// to = value, or to += value.
template <class A, class Value>
inline __attribute__((always_inline)) void contribute(A* to, int64_t count, bool writes, Value value) {
  if (writes) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = value(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] += value(i);
  }
}

template <class A>
A* parameter_grad(const Tile<A>& t, int64_t offset) {
  return offset < 0 ? nullptr : static_cast<A*>(t.partition.parameters) + offset;
}

// Where the gradient of a row of the step's table is added, or null.
template <class A>
struct TableGrad {
  const Tile<A>& t;
  const RowStep& step;
  A* to;
  int64_t first = 0;
  const int32_t* local = nullptr;

  TableGrad(const Tile<A>& t, const RowStep& step) : t(t), step(step) {
    if (step.use < 0) {
      to = static_cast<A*>(t.args.tables[step.table].grad);
      return;
    }
    const RowScatter& scatter = t.partition.scatters[step.use];
    to = static_cast<A*>(scatter.to);
    first = scatter.first;
    local = scatter.local;
  }

  A* row(int64_t r) const {
    const int64_t row = t.first + r;
    const int64_t at = local != nullptr ? local[row - t.partition.begin]
                       : step.use < 0   ? row
                                        : index_at(t.args.indices[step.index], row) - first;
    return to + at * t.args.tables[step.table].width;
  }
};

template <class A>
void backward_load(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  const A* grad = t.at(step.grad);
  A* grad_a = t.grad_of_a(step);
  const TableGrad<A> table(t, step);
  if (step.distinct >= 0) {
    if (table.to == nullptr) return;
    const DistinctRows distinct(t, step);
    for (int64_t k = 0; k < *distinct.count; ++k) {
      const A* g = grad + k * width;
      contribute(table.row(distinct.first[k]), width, false, [=](int64_t i) { return g[i]; });
    }
    return;
  }
  const A* a = step.a < 0 ? nullptr : t.value(step.a);
  with_scalar(t.args.tables[step.table].dtype, [&]<class T>() {
    each_table_row<T>(t.args, step, t.first, t.rows, [&](int64_t r, const T* from) {
      const A* g = grad + r * width;
      if (table.to != nullptr) {
        A* to = table.row(r);
        const A* left = a + r * width;
        if (step.op == RowOp::scale) {
          const A sum = row_sum<A>(width, [=](int64_t i) { return g[i] * left[i]; });
          to[0] = step.writes_table ? sum : to[0] + sum;
        } else if (step.op == RowOp::load_mul) {
          contribute(to, width, step.writes_table, [=](int64_t i) { return g[i] * left[i]; });
        } else {
          contribute(to, width, step.writes_table, [=](int64_t i) { return g[i]; });
        }
      }
      if (grad_a == nullptr) return;
      A* to = grad_a + r * width;
      if (step.op == RowOp::load_mul) {
        contribute(to, width, step.writes_a, [=](int64_t i) { return g[i] * A(load(from[i])); });
      } else if (step.op == RowOp::scale) {
        const A factor = A(load(from[0]));
        contribute(to, width, step.writes_a, [=](int64_t i) { return g[i] * factor; });
      } else {
        contribute(to, width, step.writes_a, [=](int64_t i) { return g[i]; });
      }
    });
  });
}

template <class A>
void add_column_sums(const A* grad, int64_t rows, int64_t width, A* to) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] += grad[r * width + i];
  }
}

template <class A>
void linear_grads(const Tile<A>& t, const RowStep& step, const A* grad) {
  if (A* to = parameter_grad(t, step.bias_grad)) add_column_sums(grad, t.rows, step.width, to);
  A *weight_grad = parameter_grad(t, step.weight_grad), *grad_a = t.grad(step.a);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (by_rows(step)) {
      if (weight_grad != nullptr) weight_product(t, step, grad, t.value(step.a), weight_grad);
      if (grad_a != nullptr) {
        row_product(t, step.in_width, step.width, grad, static_cast<const float*>(step.weight), step.pairs, !step.writes_a,
                    grad_a);
      }
      return;
    }
  }
  if (weight_grad != nullptr) {
    gemm(t.args, 'N', 'T', step.in_width, step.width, t.rows, t.value(step.a), step.in_width, grad, step.width, A(1),
         weight_grad, step.in_width);
  }
  if (grad_a != nullptr) {
    gemm(t.args, 'N', 'N', step.in_width, t.rows, step.width, static_cast<const A*>(step.weight), step.weight_stride, grad,
         step.width, A(!step.writes_a), grad_a, step.in_width);
  }
}

template <class A>
void backward_linear(const Tile<A>& t, const RowStep& step) {
  const RowStep& rows = t.step(step.a);
  const A* grad = t.at(step.grad);
  if (rows.distinct < 0) return linear_grads(t, step, grad);
  const DistinctRows distinct(t, rows);
  if (*distinct.count == t.rows) return linear_grads(t, step, grad);
  A* sums = t.at(t.args.spread);
  for (int64_t i = 0; i < *distinct.count * step.width; ++i) sums[i] = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    A* to = sums + distinct.place[r] * step.width;
#pragma omp simd
    for (int64_t i = 0; i < step.width; ++i) to[i] += grad[r * step.width + i];
  }
  linear_grads(t.narrowed(*distinct.count), step, sums);
}

template <class A>
void backward_norm_act(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  const A *grads = t.at(step.grad), *in = t.value(step.a), *aux = t.at(step.aux), *stats = t.at(step.stats);
  const A* weight = static_cast<const A*>(step.weight);
  A *weight_grad = parameter_grad(t, step.weight_grad), *shift_grad = parameter_grad(t, step.shift_grad);
  A* grad_a = t.grad(step.a);
  for (int64_t r = 0; r < t.rows; ++r) {
    const A *g = grads + r * width, *x = in + r * width, *derivative = aux + r * width;
    A* to = grad_a == nullptr ? nullptr : grad_a + r * width;
    if (weight == nullptr) {
      if (to != nullptr) contribute(to, width, step.writes_a, [=](int64_t i) { return g[i] * derivative[i]; });
      continue;
    }
    const A mean = stats[2 * r], rstd = stats[2 * r + 1];
    if (weight_grad != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) weight_grad[i] += g[i] * derivative[i] * ((x[i] - mean) * rstd);
    }
    if (shift_grad != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) shift_grad[i] += g[i] * derivative[i];
    }
    if (to == nullptr) continue;
    A mean_grad = 0, mean_product = 0;
#pragma omp simd reduction(+ : mean_grad, mean_product)
    for (int64_t i = 0; i < width; ++i) {
      const A gn = g[i] * derivative[i] * weight[i];
      mean_grad += gn;
      mean_product += gn * ((x[i] - mean) * rstd);
    }
    mean_grad /= A(width);
    mean_product /= A(width);
    contribute(to, width, step.writes_a, [=](int64_t i) {
      return standardize_backward(g[i] * derivative[i] * weight[i], (x[i] - mean) * rstd, rstd, mean_grad, mean_product);
    });
  }
}

template <class A>
void backward_symmetrize(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  const A *grads = t.at(step.grad), *in = t.value(step.a), *stats = t.at(step.stats);
  A *aux = t.at(step.aux), *aux_minus = aux + t.args.tile_rows * width;
  const A *weight = static_cast<const A*>(step.weight), *bias = static_cast<const A*>(step.bias);
  A *weight_grad = parameter_grad(t, step.weight_grad), *shift_grad = parameter_grad(t, step.shift_grad);
  A *bias_grad = parameter_grad(t, step.bias_grad), *grad_a = t.grad(step.a);
  for (int64_t r = 0; r < t.rows; ++r) {
    const A *g = grads + r * width, *h = in + r * width;
    A *d_plus = aux + r * width, *d_minus = aux_minus + r * width;
    A* to = grad_a == nullptr ? nullptr : grad_a + r * width;
    if (weight == nullptr) {
      if (bias_grad != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) bias_grad[i] += g[i] * (d_plus[i] + d_minus[i]);
      }
      if (to != nullptr) contribute(to, width, step.writes_a, [=](int64_t i) { return g[i] * (d_plus[i] - d_minus[i]); });
      continue;
    }
    const A mean = stats[3 * r], rstd_plus = stats[3 * r + 1], rstd_minus = stats[3 * r + 2];
    if (weight_grad != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A x = h[i] - mean;
        weight_grad[i] += g[i] * (d_plus[i] * ((bias[i] + x) * rstd_plus) + d_minus[i] * ((bias[i] - x) * rstd_minus));
      }
    }
    if (shift_grad != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) shift_grad[i] += g[i] * (d_plus[i] + d_minus[i]);
    }
    if (to == nullptr && bias_grad == nullptr) continue;
    A sum_plus = 0, sum_minus = 0, along_plus = 0, along_minus = 0;
#pragma omp simd reduction(+ : sum_plus, sum_minus, along_plus, along_minus)
    for (int64_t i = 0; i < width; ++i) {
      const A x = h[i] - mean, gw = g[i] * weight[i], plus = gw * d_plus[i], minus = gw * d_minus[i];
      d_plus[i] = plus;  // the derivatives are not read again
      d_minus[i] = minus;
      sum_plus += plus;
      sum_minus += minus;
      along_plus += plus * ((bias[i] + x) * rstd_plus);
      along_minus += minus * ((bias[i] - x) * rstd_minus);
    }
    sum_plus /= A(width), sum_minus /= A(width), along_plus /= A(width), along_minus /= A(width);
    if (bias_grad != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A x = h[i] - mean;
        bias_grad[i] += standardize_backward(d_plus[i], (bias[i] + x) * rstd_plus, rstd_plus, sum_plus, along_plus) +
                        standardize_backward(d_minus[i], (bias[i] - x) * rstd_minus, rstd_minus, sum_minus, along_minus);
      }
    }
    if (to == nullptr) continue;
    contribute(to, width, step.writes_a, [=](int64_t i) {
      const A x = h[i] - mean;
      return standardize_backward(d_plus[i], (bias[i] + x) * rstd_plus, rstd_plus, sum_plus, along_plus) -
             standardize_backward(d_minus[i], (bias[i] - x) * rstd_minus, rstd_minus, sum_minus, along_minus);
    });
  }
}

// (g - u (u . g) n / (n + eps)) / (n + eps) with n the norm and u = h / n.
template <class A>
void backward_normalize(const Tile<A>& t, const RowStep& step) {
  const int64_t width = step.width;
  for (int64_t r = 0; r < t.rows; ++r) {
    const A *h = t.value(step.a) + r * width, *g = t.at(step.grad) + r * width;
    const A factor = safe_factor(largest_magnitude(h, width));
    const A norm = square_root(row_sum<A>(width, [=](int64_t i) { return (h[i] * factor) * (h[i] * factor); }));
    const A scale = normalize_scale(norm, factor, A(step.p0));
    const A to_unit = norm == A(0) ? A(0) : factor / norm;
    const A along = row_sum<A>(width, [=](int64_t i) { return g[i] * (h[i] * to_unit); }) * (norm * scale);
    contribute(t.grad(step.a) + r * width, width, step.writes_a,
               [=](int64_t i) { return (g[i] - h[i] * to_unit * along) * (scale * factor); });
  }
}

template <class A>
void backward_step(const Tile<A>& t, const RowStep& step) {
  const int64_t count = t.rows * step.width;
  const A* grad = t.at(step.grad);
  const A* a = step.a < 0 ? nullptr : t.value(step.a);
  const A* b = step.b < 0 ? nullptr : t.value(step.b);
  A* grad_a = t.grad_of_a(step);
  A* grad_b = step.b < 0 ? nullptr : t.grad(step.b);
  switch (step.op) {
    case RowOp::load:
    case RowOp::load_mul:
    case RowOp::load_add:
    case RowOp::scale:
      return backward_load(t, step);
    case RowOp::linear:
      return backward_linear(t, step);
    case RowOp::symmetrize:
      return backward_symmetrize(t, step);
    case RowOp::norm_act:
      return backward_norm_act(t, step);
    case RowOp::normalize:
      if (grad_a != nullptr) backward_normalize(t, step);
      return;
    case RowOp::dropout:
      if (grad_a != nullptr) apply_dropout(t, step, grad, grad_a, !step.writes_a);
      return;
    case RowOp::add:
      if (grad_a != nullptr) contribute(grad_a, count, step.writes_a, [=](int64_t i) { return grad[i]; });
      if (grad_b != nullptr) contribute(grad_b, count, step.writes_b, [=](int64_t i) { return grad[i]; });
      return;
    case RowOp::mul:
      if (grad_a != nullptr) contribute(grad_a, count, step.writes_a, [=](int64_t i) { return grad[i] * b[i]; });
      if (grad_b != nullptr) contribute(grad_b, count, step.writes_b, [=](int64_t i) { return grad[i] * a[i]; });
      return;
    case RowOp::negate:
      if (grad_a != nullptr) contribute(grad_a, count, step.writes_a, [=](int64_t i) { return -grad[i]; });
      return;
    case RowOp::abs:
      if (grad_a != nullptr) {
        contribute(grad_a, count, step.writes_a, [=](int64_t i) {
          return a[i] > A(0) ? grad[i] : a[i] < A(0) ? -grad[i] : a[i] * grad[i];  // 0 at 0, NaN at NaN
        });
      }
      return;
    case RowOp::add_vector:
      if (A* to = parameter_grad(t, step.bias_grad)) add_column_sums(grad, t.rows, step.width, to);
      if (grad_a != nullptr) contribute(grad_a, count, step.writes_a, [=](int64_t i) { return grad[i]; });
      return;
    case RowOp::head_dot: {
      const int64_t head = step.in_width / step.width;
      for (int64_t k = 0; k < count; ++k) {
        const A g = A(step.p0) * grad[k];
        const A *x = a + k * head, *y = b + k * head;
        if (grad_a != nullptr) contribute(grad_a + k * head, head, step.writes_a, [=](int64_t i) { return g * y[i]; });
        if (grad_b != nullptr) contribute(grad_b + k * head, head, step.writes_b, [=](int64_t i) { return g * x[i]; });
      }
      return;
    }
    case RowOp::concat: {
      const int64_t left = step.in_width, right = step.width - left;
      for (int64_t r = 0; r < t.rows; ++r) {
        const A* g = grad + r * step.width;
        if (grad_a != nullptr) contribute(grad_a + r * left, left, step.writes_a, [=](int64_t i) { return g[i]; });
        if (grad_b != nullptr) contribute(grad_b + r * right, right, step.writes_b, [=](int64_t i) { return g[left + i]; });
      }
      return;
    }
  }
}

// -- outputs ----------------------------------------------------------------------------------------------------------

// The segment that holds a row; ptr may hold empty segments.
int64_t segment_of(const RowProgramArgs& args, int64_t row) {
  int64_t low = 0, high = args.segments;  // ptr[low] <= row < ptr[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (args.ptr[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Calls use(row of the tile, segment).
template <class Use>
inline __attribute__((always_inline)) void each_segment_row(const RowProgramArgs& args, int64_t first, int64_t rows,
                                                            Use use) {
  int64_t segment = segment_of(args, first);
  for (int64_t r = 0; r < rows; ++r) {
    while (args.ptr[segment + 1] <= first + r) ++segment;
    use(r, segment);
  }
}

template <class A>
void add_up(const Tile<A>& t, const A* values) {
  const int64_t width = t.args.width;
  each_segment_row(t.args, t.first, t.rows, [&](int64_t r, int64_t segment) {
    const bool continued = t.args.ptr[segment] < t.partition.begin;
    A* to = continued ? static_cast<A*>(t.partition.head) : static_cast<A*>(t.args.reduced) + segment * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] += values[r * width + i];
  });
}

// Until the segment is complete the mean and the variance are sums of differences to its first row, and of their squares.
template <class A>
void add_to_statistics(const Tile<A>& t, const A* values) {
  const int64_t width = t.args.width;
  each_segment_row(t.args, t.first, t.rows, [&](int64_t r, int64_t segment) {
    const A* x = values + r * width;
    A* sums = static_cast<A*>(t.args.reduced) + 4 * segment * width;
    A *squares = sums + width, *least = squares + width, *largest = least + width;
    A *pivot = static_cast<A*>(t.args.kept) + 2 * segment * width, *offset = pivot + width;
    int32_t *least_row = t.args.extremes + 2 * segment * width, *largest_row = least_row + width;
    const int32_t row = int32_t(t.first + r);
    if (t.args.ptr[segment] == t.first + r) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        pivot[i] = least[i] = largest[i] = x[i];
        sums[i] = squares[i] = 0;
        least_row[i] = largest_row[i] = row;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const A difference = x[i] - pivot[i];
        sums[i] += difference;
        squares[i] += difference * difference;
        const bool unordered = x[i] != x[i], less = x[i] < least[i] || unordered, more = x[i] > largest[i] || unordered;
        least[i] = less ? x[i] : least[i];
        least_row[i] = less ? row : least_row[i];
        largest[i] = more ? x[i] : largest[i];
        largest_row[i] = more ? row : largest_row[i];
      }
    }
    if (t.args.ptr[segment + 1] != t.first + r + 1) return;
    const A count = A(t.args.ptr[segment + 1] - t.args.ptr[segment]);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      offset[i] = sums[i] / count;
      const A variance = squares[i] / count - offset[i] * offset[i];
      squares[i] = variance < A(0) ? A(0) : variance;
      sums[i] = pivot[i] + offset[i];
    }
  });
}

// Calls use(first row of the tile, end, segment) for each run of rows of one segment.
template <class Use>
inline __attribute__((always_inline)) void each_run(const RowProgramArgs& args, int64_t first, int64_t rows, Use use) {
  int64_t segment = segment_of(args, first);
  for (int64_t begin = 0; begin < rows;) {
    while (args.ptr[segment + 1] <= first + begin) ++segment;
    const int64_t rest = args.ptr[segment + 1] - first, end = rest < rows ? rest : rows;
    use(begin, end, segment);
    begin = end;
  }
}

// The sums so far are of weights exp(logit - largest so far); logits are overwritten by the weights.
template <class A>
void attend(const Tile<A>& t, const A* values, A* logits) {
  const int64_t width = t.args.width, heads = t.args.heads, head = width / heads;
  each_run(t.args, t.first, t.rows, [&](int64_t begin, int64_t end, int64_t segment) {
    A* to = static_cast<A*>(t.args.reduced) + segment * width;
    A *largest = static_cast<A*>(t.args.kept) + 2 * segment * heads, *total = largest + heads;
    const bool starts = t.args.ptr[segment] == t.first + begin;
    for (int64_t h = 0; h < heads; ++h) {
      A most = starts ? logits[begin * heads + h] : largest[h];
      for (int64_t r = begin; r < end; ++r) most = logits[r * heads + h] > most ? logits[r * heads + h] : most;
      if (!starts && most != largest[h]) {
        const A factor = exponential(largest[h] - most);
        total[h] *= factor;
        for (int64_t i = h * head; i < (h + 1) * head; ++i) to[i] *= factor;
      }
      largest[h] = most;
    }
    for (int64_t r = begin; r < end; ++r) {
#pragma omp simd
      for (int64_t h = 0; h < heads; ++h) logits[r * heads + h] -= largest[h];
    }
#pragma omp simd
    for (int64_t i = begin * heads; i < end * heads; ++i) logits[i] = exponential(logits[i]);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        const A weight = logits[r * heads + h];
        total[h] += weight;
        const A* x = values + r * width + h * head;
#pragma omp simd
        for (int64_t i = 0; i < head; ++i) to[h * head + i] += weight * x[i];
      }
    }
    if (t.args.ptr[segment + 1] != t.first + end) return;
    for (int64_t h = 0; h < heads; ++h) {
      total[h] = A(1) / total[h];
#pragma omp simd
      for (int64_t i = h * head; i < (h + 1) * head; ++i) to[i] *= total[h];
    }
  });
}

template <class A>
void write_outputs(const Tile<A>& t) {
  const RowProgramArgs& args = t.args;
  const RowSection& section = *t.partition.section;
  if (section.reduced_step >= 0) {
    const A* values = t.value(section.reduced_step);
    switch (args.reduction) {
      case RowReduction::none:
        break;
      case RowReduction::sum:
        add_up(t, values);
        break;
      case RowReduction::statistics:
        add_to_statistics(t, values);
        break;
      case RowReduction::attention:
        attend(t, values, t.value(section.logits_step));
        break;
    }
  }
  if (section.rows_step >= 0) {
    const int64_t width = t.step(section.rows_step).width;
    const A* values = t.value(section.rows_step);
    with_scalar(args.rows_dtype, [&]<class T>() {
      T* to = static_cast<T*>(args.rows_out) + t.first * width;
#pragma omp simd
      for (int64_t i = 0; i < t.rows * width; ++i) store(to[i], typename Accumulate<T>::type(values[i]));
    });
  }
}

template <class T, class A>
void statistics_grads(const Tile<A>& t, const A* values, A* to) {
  const int64_t width = t.args.width;
  each_segment_row(t.args, t.first, t.rows, [&](int64_t r, int64_t segment) {
    const T *mean = static_cast<const T*>(t.args.grad_reduced) + 4 * segment * width, *variance = mean + width;
    const T *least = variance + width, *largest = least + width;
    const A *pivot = static_cast<const A*>(t.args.kept) + 2 * segment * width, *offset = pivot + width;
    const int32_t *least_row = t.args.extremes + 2 * segment * width, *largest_row = least_row + width;
    const int32_t row = int32_t(t.first + r);
    const A share = A(1) / A(t.args.ptr[segment + 1] - t.args.ptr[segment]);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A centred = (values[r * width + i] - pivot[i]) - offset[i];
      A grad = share * (A(load(mean[i])) + A(2) * A(load(variance[i])) * centred);
      grad += least_row[i] == row ? A(load(least[i])) : A(0);
      grad += largest_row[i] == row ? A(load(largest[i])) : A(0);
      to[r * width + i] = grad;
    }
  });
}

// Logits are overwritten by the weights. grad_logits may be null, and so may to.
template <class T, class A>
void attention_grads(const Tile<A>& t, const A* values, A* logits, A* grad_logits, A* to) {
  const int64_t width = t.args.width, heads = t.args.heads, head = width / heads;
  each_run(t.args, t.first, t.rows, [&](int64_t begin, int64_t end, int64_t segment) {
    const T* grad = static_cast<const T*>(t.args.grad_reduced) + segment * width;
    const A *largest = static_cast<const A*>(t.args.kept) + 2 * segment * heads, *share = largest + heads;
    const A* along = static_cast<const A*>(t.args.along) + segment * heads;
    for (int64_t r = begin; r < end; ++r) {
#pragma omp simd
      for (int64_t h = 0; h < heads; ++h) logits[r * heads + h] -= largest[h];
    }
#pragma omp simd
    for (int64_t i = begin * heads; i < end * heads; ++i) logits[i] = exponential(logits[i]);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        const A weight = logits[r * heads + h] * share[h];
        const A* x = values + r * width + h * head;
        const T* g = grad + h * head;
        if (grad_logits != nullptr) {
          const A product = row_sum<A>(head, [=](int64_t i) { return A(load(g[i])) * x[i]; });
          grad_logits[r * heads + h] = weight * (product - along[h]);
        }
        if (to == nullptr) continue;
        A* grad_value = to + r * width + h * head;
#pragma omp simd
        for (int64_t i = 0; i < head; ++i) grad_value[i] = weight * A(load(g[i]));
      }
    }
  });
}

template <class A>
void reduction_grads(const Tile<A>& t) {
  const RowProgramArgs& args = t.args;
  const RowSection& section = *t.partition.section;
  const int64_t width = args.width;
  A* to = t.grad(section.reduced_step);
  with_scalar(args.rows_dtype, [&]<class T>() {
    if (args.reduction == RowReduction::attention) {
      A* grad_logits = t.grad(section.logits_step);
      if (to == nullptr && grad_logits == nullptr) return;
      return attention_grads<T>(t, t.value(section.reduced_step), t.value(section.logits_step), grad_logits, to);
    }
    if (to == nullptr) return;
    if (args.reduction == RowReduction::statistics) return statistics_grads<T>(t, t.value(section.reduced_step), to);
    each_segment_row(args, t.first, t.rows, [&](int64_t r, int64_t segment) {
      const T* from = static_cast<const T*>(args.grad_reduced) + segment * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[r * width + i] = A(load(from[i]));
    });
  });
}

template <class A>
void read_output_grads(const Tile<A>& t) {
  const RowProgramArgs& args = t.args;
  const RowSection& section = *t.partition.section;
  if (section.reduced_step >= 0) reduction_grads(t);
  if (section.rows_step >= 0 && t.grad(section.rows_step) != nullptr) {
    const int64_t width = t.step(section.rows_step).width;
    A* to = t.grad(section.rows_step);
    with_scalar(args.rows_dtype, [&]<class T>() {
      const T* from = static_cast<const T*>(args.grad_rows) + t.first * width;
#pragma omp simd
      for (int64_t i = 0; i < t.rows * width; ++i) to[i] = A(load(from[i]));
    });
  }
}

template <class A>
void run(const RowProgramArgs& args, const RowPartition& partition) {
  const RowSection& section = *partition.section;
  for (int64_t first = partition.begin; first < partition.end; first += args.tile_rows) {
    const int64_t rest = partition.end - first, rows = rest < args.tile_rows ? rest : args.tile_rows;
    const Tile<A> tile{args, partition, first, rows, static_cast<A*>(partition.workspace), args.backward};
    for (int number = 0; number < section.num_steps; ++number) {
      if (section.steps[number].value >= 0) forward_step(tile, section.steps[number]);
    }
    if (!args.backward) {
      write_outputs(tile);
      continue;
    }
    read_output_grads(tile);
    for (int number = section.num_steps - 1; number >= 0; --number) {
      if (section.steps[number].grad >= 0) backward_step(tile, section.steps[number]);
    }
  }
}

}  // namespace

void row_program_run(const RowProgramArgs& args, const RowPartition& partition) {
  args.wide_compute ? run<double>(args, partition) : run<float>(args, partition);
}

}  // namespace scalegmn::SCALEGMN_ISA

#include "cpu/symmetrize.h"

#include "cpu/activations.h"

namespace scalegmn::SCALEGMN_ISA {
namespace {

// A row in the type to compute in: itself, or converted into the buffer.
template <class T, class A>
const A* load_row(const T* row, A* buffer, int64_t width) {
  if constexpr (__is_same(T, A)) {
    return row;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) buffer[i] = load(row[i]);
    return buffer;
  }
}

// Where to write a row's results: itself, or the buffer that store_row converts.
template <class T, class A>
A* result_row(T* row, A* buffer) {
  if constexpr (__is_same(T, A)) {
    return row;
  } else {
    return buffer;
  }
}

template <class T, class A>
void store_row(T* row, const A* values, int64_t width) {
  if constexpr (!__is_same(T, A)) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(row[i], values[i]);
  }
}

// The sums over a row of what term(i, terms) sets. Lanes are summed side by side and then in pairs, so that the order, and
// with it the bits, do not depend on the instruction set.
template <int N, class A, class Term>
inline __attribute__((always_inline)) void row_sums(int64_t width, A (&sums)[N], Term term) {
  constexpr int lanes = 32;
  A parts[N][lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
#pragma omp simd
    for (int k = 0; k < lanes; ++k) {
      A terms[N];
      term(i + k, terms);
      for (int n = 0; n < N; ++n) parts[n][k] += terms[n];
    }
  }
  for (int k = 0; i + k < width; ++k) {
    A terms[N];
    term(i + k, terms);
    for (int n = 0; n < N; ++n) parts[n][k] += terms[n];
  }
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int n = 0; n < N; ++n) {
#pragma omp simd
      for (int k = 0; k < half; ++k) parts[n][k] += parts[n][k + half];
    }
  }
  for (int n = 0; n < N; ++n) sums[n] = parts[n][0];
}

template <class A>
struct Parameters {
  int64_t width;
  A eps, w0;
  const A *bias, *weight, *shift;
};

template <class A>
struct Spread {
  A mean, rstd_plus, rstd_minus;
};

// h - mean + bias and bias - (h - mean) are the two centred branches (bias has mean 0).
template <class A>
Spread<A> spread(const A* h, const Parameters<A>& p) {
  A sum[1], squares[2];
  row_sums(p.width, sum, [=](int64_t i, A(&terms)[1]) { terms[0] = h[i]; });
  const A mean = sum[0] / A(p.width);
  const A* bias = p.bias;
  row_sums(p.width, squares, [=](int64_t i, A(&terms)[2]) {
    const A x = h[i] - mean;
    terms[0] = (bias[i] + x) * (bias[i] + x);
    terms[1] = (bias[i] - x) * (bias[i] - x);
  });
  return {mean, A(1) / square_root(squares[0] / A(p.width) + p.eps),
          A(1) / square_root(squares[1] / A(p.width) + p.eps)};
}

template <Activation activation, class A>
void activation_forward(const A* h, A* out, const Parameters<A>& p) {
  if (p.weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < p.width; ++i) {
      out[i] = activate(activation, p.bias[i] + h[i], p.w0) + activate(activation, p.bias[i] - h[i], p.w0);
    }
    return;
  }
  const Spread<A> s = spread(h, p);
#pragma omp simd
  for (int64_t i = 0; i < p.width; ++i) {
    const A x = h[i] - s.mean;
    const A plus = (p.bias[i] + x) * s.rstd_plus * p.weight[i] + p.shift[i];
    const A minus = (p.bias[i] - x) * s.rstd_minus * p.weight[i] + p.shift[i];
    out[i] = activate(activation, plus, p.w0) + activate(activation, minus, p.w0);
  }
}

// Adds to sums [3, width]: bias, weight, shift.
template <Activation activation, class A>
void activation_backward(const A* grad, const A* h, A* grad_h, A* sums, A* scratch, const Parameters<A>& p) {
  const int64_t width = p.width;
  A *bias_sum = sums, *weight_sum = sums + width, *shift_sum = sums + 2 * width;
  if (p.weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A plus = grad[i] * activate_derivative(activation, p.bias[i] + h[i], p.w0);
      const A minus = grad[i] * activate_derivative(activation, p.bias[i] - h[i], p.w0);
      bias_sum[i] += plus + minus;
      grad_h[i] = plus - minus;
    }
    return;
  }
  const Spread<A> s = spread(h, p);
  A *grad_plus = scratch, *grad_minus = scratch + width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const A x = h[i] - s.mean;
    const A plus = (p.bias[i] + x) * s.rstd_plus, minus = (p.bias[i] - x) * s.rstd_minus;
    const A g_plus = grad[i] * activate_derivative(activation, plus * p.weight[i] + p.shift[i], p.w0);
    const A g_minus = grad[i] * activate_derivative(activation, minus * p.weight[i] + p.shift[i], p.w0);
    weight_sum[i] += g_plus * plus + g_minus * minus;
    shift_sum[i] += g_plus + g_minus;
    grad_plus[i] = g_plus * p.weight[i];
    grad_minus[i] = g_minus * p.weight[i];
  }
  A means[4];
  row_sums(width, means, [=, bias = p.bias](int64_t i, A(&terms)[4]) {
    const A x = h[i] - s.mean;
    terms[0] = grad_plus[i];
    terms[1] = grad_minus[i];
    terms[2] = grad_plus[i] * ((bias[i] + x) * s.rstd_plus);
    terms[3] = grad_minus[i] * ((bias[i] - x) * s.rstd_minus);
  });
  for (A& mean : means) mean /= A(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const A x = h[i] - s.mean;
    const A plus = (p.bias[i] + x) * s.rstd_plus, minus = (p.bias[i] - x) * s.rstd_minus;
    const A z_plus = standardize_backward(grad_plus[i], plus, s.rstd_plus, means[0], means[2]);
    const A z_minus = standardize_backward(grad_minus[i], minus, s.rstd_minus, means[1], means[3]);
    bias_sum[i] += z_plus + z_minus;
    grad_h[i] = z_plus - z_minus;
  }
}

template <class A>
A largest_magnitude(const A* h, int64_t width) {
  A largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < width; ++i) {
    const A value = magnitude(h[i]);
    largest = largest < value ? value : largest;
  }
  return largest;
}

template <class A>
A scaled_norm(const A* h, A factor, int64_t width) {
  A sum[1];
  row_sums(width, sum, [=](int64_t i, A(&terms)[1]) { terms[0] = (h[i] * factor) * (h[i] * factor); });
  return square_root(sum[0]);
}

template <class A>
void normalize_forward(const A* h, A* out, int64_t width, A eps) {
  const A factor = safe_factor(largest_magnitude(h, width));
  const A scale = normalize_scale(scaled_norm(h, factor, width), factor, eps);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = h[i] * factor * scale;
}

// (g - u (u . g) n / (n + eps)) / (n + eps) with n the norm and u = h / n.
template <class A>
void normalize_backward(const A* grad, const A* h, A* grad_h, int64_t width, A eps) {
  const A factor = safe_factor(largest_magnitude(h, width));
  const A norm = scaled_norm(h, factor, width);
  const A scale = normalize_scale(norm, factor, eps);
  const A to_unit = norm == A(0) ? A(0) : factor / norm;
  A product[1];
  row_sums(width, product, [=](int64_t i, A(&terms)[1]) { terms[0] = grad[i] * (h[i] * to_unit); });
  const A along = product[0] * (norm * scale);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) grad_h[i] = (grad[i] - h[i] * to_unit * along) * (scale * factor);
}

template <class A>
Parameters<A> parameters(const SymmetrizeArgs& args) {
  return {args.width,
          A(args.eps),
          A(args.w0),
          static_cast<const A*>(args.bias),
          static_cast<const A*>(args.weight),
          static_cast<const A*>(args.shift)};
}

template <class T>
void forward(const SymmetrizeArgs& args, int64_t begin, int64_t end, double* scratch) {
  using A = typename Accumulate<T>::type;
  const int64_t width = args.width;
  A* buffer = reinterpret_cast<A*>(scratch);
  const Parameters<A> p = parameters<A>(args);
  for (int64_t row = begin; row < end; ++row) {
    const A* h = load_row(static_cast<const T*>(args.h) + row * width, buffer, width);
    T* to = static_cast<T*>(args.out) + row * width;
    A* out = result_row(to, buffer);
    if (args.kind == Kind::activation) {
      with_activation(args.activation, [&]<Activation activation>() { activation_forward<activation>(h, out, p); });
    } else if (args.kind == Kind::normalize) {
      normalize_forward(h, out, width, p.eps);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) out[i] = magnitude(h[i]);
    }
    store_row(to, out, width);
  }
}

template <class T>
void backward(const SymmetrizeArgs& args, int64_t begin, int64_t end, double* scratch) {
  using A = typename Accumulate<T>::type;
  const int64_t width = args.width;
  A* buffers = reinterpret_cast<A*>(scratch);
  A *h_buffer = buffers, *grad_buffer = buffers + width, *out_buffer = buffers + 2 * width, *work = buffers + 3 * width;
  A* unwanted = buffers + 5 * width;
  const Parameters<A> p = parameters<A>(args);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_rows;
    const int64_t last = first + args.block_rows < args.rows ? first + args.block_rows : args.rows;
    A* sums = args.partial == nullptr ? unwanted : static_cast<A*>(args.partial) + block * 3 * width;
    for (int64_t i = 0; i < 3 * width; ++i) sums[i] = 0;
    for (int64_t row = first; row < last; ++row) {
      const A* h = load_row(static_cast<const T*>(args.h) + row * width, h_buffer, width);
      const A* grad = load_row(static_cast<const T*>(args.grad) + row * width, grad_buffer, width);
      T* to = static_cast<T*>(args.grad_h) + row * width;
      A* grad_h = result_row(to, out_buffer);
      if (args.kind == Kind::activation) {
        with_activation(args.activation, [&]<Activation activation>() {
          activation_backward<activation>(grad, h, grad_h, sums, work, p);
        });
      } else if (args.kind == Kind::normalize) {
        normalize_backward(grad, h, grad_h, width, p.eps);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          grad_h[i] = h[i] > A(0) ? grad[i] : h[i] < A(0) ? -grad[i] : h[i] * grad[i];  // 0 at 0, NaN at NaN
        }
      }
      store_row(to, grad_h, width);
    }
  }
}

}  // namespace

void symmetrize_forward(const SymmetrizeArgs& args, int64_t begin, int64_t end, double* scratch) {
  switch (args.dtype) {
    case Scalar::f32:
      return forward<float>(args, begin, end, scratch);
    case Scalar::f64:
      return forward<double>(args, begin, end, scratch);
    case Scalar::bf16:
      return forward<bfloat16>(args, begin, end, scratch);
    case Scalar::f16:
      return forward<float16>(args, begin, end, scratch);
  }
}

void symmetrize_backward(const SymmetrizeArgs& args, int64_t begin, int64_t end, double* scratch) {
  switch (args.dtype) {
    case Scalar::f32:
      return backward<float>(args, begin, end, scratch);
    case Scalar::f64:
      return backward<double>(args, begin, end, scratch);
    case Scalar::bf16:
      return backward<bfloat16>(args, begin, end, scratch);
    case Scalar::f16:
      return backward<float16>(args, begin, end, scratch);
  }
}

}  // namespace scalegmn::SCALEGMN_ISA

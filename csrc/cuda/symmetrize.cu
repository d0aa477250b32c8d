// A group of threads owns a row: a warp up to 128 columns, four warps beyond; each thread holds 4 columns, next to each
// other where addresses allow, and rows of more than 512 columns are taken in tiles of that many. Nothing but h (and grad)
// is read, nothing but the result written. Bound by memory: 8 bytes per element forward, 12 backward, in float32.
#include "cuda/symmetrize.h"

#include "cuda/rows.cuh"

namespace scalegmn {
namespace SCALEGMN_ISA {
namespace {

template <class A>
struct Spread {
  A mean, rstd_plus, rstd_minus;
};

template <class T, class A, int WARPS, bool VECTOR, bool TILED>
__device__ Spread<A> spread(const Group<WARPS>& group, const T* h, const A* bias, int64_t width, A eps) {
  A sum = 0;
  over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
    A x[kColumns];
    columns.load_from(h, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += x[i];
  });
  const A mean = group.sum(sum) / A(width);
  A plus = 0, minus = 0;
  over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
    A x[kColumns], b[kColumns];
    columns.load_from(h, x, mean);
    columns.load_from(bias, b);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const A y = x[i] - mean;
      plus += (b[i] + y) * (b[i] + y);
      minus += (b[i] - y) * (b[i] - y);
    }
  });
  return {mean, A(1) / square_root(group.sum(plus) / A(width) + eps),
          A(1) / square_root(group.sum(minus) / A(width) + eps)};
}

template <class T, int WARPS, bool VECTOR, bool TILED>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(const SymmetrizeArgs args) {
  using A = typename Accumulate<T>::type;
  const Group<WARPS> group;
  if (group.index >= args.rows) return;  // whole groups: with several warps a group is the block
  const int64_t width = args.width;
  const A eps = A(args.eps), w0 = A(args.w0);
  const T* h = static_cast<const T*>(args.h) + group.index * width;
  T* out = static_cast<T*>(args.out) + group.index * width;
  const A *bias = static_cast<const A*>(args.bias), *weight = static_cast<const A*>(args.weight),
          *shift = static_cast<const A*>(args.shift);

  if (args.kind == Kind::activation) {
    Spread<A> s{A(0), A(1), A(1)};
    if (weight != nullptr) s = spread<T, A, WARPS, VECTOR, TILED>(group, h, bias, width, eps);
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A x[kColumns], b[kColumns], w[kColumns], c[kColumns];
      columns.load_from(h, x);
      columns.load_from(bias, b);
      if (weight != nullptr) {
        columns.load_from(weight, w);
        columns.load_from(shift, c);
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const A y = x[i] - s.mean;
        A plus = b[i] + y, minus = b[i] - y;
        if (weight != nullptr) {
          plus = plus * s.rstd_plus * w[i] + c[i];
          minus = minus * s.rstd_minus * w[i] + c[i];
        }
        x[i] = activate(args.activation, plus, w0) + activate(args.activation, minus, w0);
      }
      columns.store_to(out, x);
    });
    return;
  }

  A factor = 1, scale = 1;
  if (args.kind == Kind::normalize) {
    A largest = 0, sum = 0;
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A x[kColumns];
      columns.load_from(h, x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) largest = largest < magnitude(x[i]) ? magnitude(x[i]) : largest;
    });
    factor = safe_factor(group.max(largest));
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A x[kColumns];
      columns.load_from(h, x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum += (x[i] * factor) * (x[i] * factor);
    });
    scale = normalize_scale(square_root(group.sum(sum)), factor, eps);
  }
  over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
    A x[kColumns];
    columns.load_from(h, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] = args.kind == Kind::abs ? magnitude(x[i]) : x[i] * factor * scale;
    columns.store_to(out, x);
  });
}

// grad_h of kinds abs and normalize.
template <class T, int WARPS, bool VECTOR, bool TILED>
__global__ void __launch_bounds__(kThreads) backward_kernel(const SymmetrizeArgs args) {
  using A = typename Accumulate<T>::type;
  const Group<WARPS> group;
  if (group.index >= args.rows) return;
  const int64_t width = args.width;
  const T* h = static_cast<const T*>(args.h) + group.index * width;
  const T* grad = static_cast<const T*>(args.grad) + group.index * width;
  T* grad_h = static_cast<T*>(args.grad_h) + group.index * width;
  A to_unit = 0, scale = 0, along = 0;
  if (args.kind == Kind::normalize) {
    A largest = 0, sum = 0;
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A x[kColumns];
      columns.load_from(h, x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) largest = largest < magnitude(x[i]) ? magnitude(x[i]) : largest;
    });
    const A factor = safe_factor(group.max(largest));
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A x[kColumns];
      columns.load_from(h, x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum += (x[i] * factor) * (x[i] * factor);
    });
    const A norm = square_root(group.sum(sum));
    scale = normalize_scale(norm, factor, A(args.eps));
    to_unit = norm == A(0) ? A(0) : factor / norm;
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A x[kColumns], g[kColumns];
      columns.load_from(h, x);
      columns.load_from(grad, g);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) along += g[i] * (x[i] * to_unit);
    });
    along = group.sum(along) * (norm * scale);
    scale *= factor;
  }
  over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
    A x[kColumns], g[kColumns];
    columns.load_from(h, x);
    columns.load_from(grad, g);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (args.kind == Kind::abs) {
        x[i] = x[i] > A(0) ? g[i] : x[i] < A(0) ? -g[i] : x[i] * g[i];  // 0 at 0, NaN at NaN
      } else {
        x[i] = (g[i] - x[i] * to_unit * along) * scale;
      }
    }
    columns.store_to(grad_h, x);
  });
}

// grad_h of kind activation for a block of rows, one group per block of rows, and its row of args.partial.
template <class T, int WARPS, bool VECTOR, bool TILED>
__global__ void __launch_bounds__(kThreads, kBlocks) activation_backward_kernel(const SymmetrizeArgs args) {
  using A = typename Accumulate<T>::type;
  const Group<WARPS> group;
  const int64_t width = args.width, first = group.index * args.block_rows;
  if (first >= args.rows) return;
  const int64_t last = first + args.block_rows < args.rows ? first + args.block_rows : args.rows;
  const A eps = A(args.eps), w0 = A(args.w0);
  const A *bias = static_cast<const A*>(args.bias), *weight = static_cast<const A*>(args.weight),
          *shift = static_cast<const A*>(args.shift);
  A* partial = args.partial == nullptr ? nullptr : static_cast<A*>(args.partial) + group.index * 3 * width;
  // a thread's columns are its own: sums stay in registers, or, with several tiles, in its places of `partial`
  A sums[3][kColumns] = {};

  for (int64_t row = first; row < last; ++row) {
    const T* h = static_cast<const T*>(args.h) + row * width;
    const T* grad = static_cast<const T*>(args.grad) + row * width;
    T* grad_h = static_cast<T*>(args.grad_h) + row * width;
    Spread<A> s{A(0), A(1), A(1)};
    A grad_sum[2] = {}, product_sum[2] = {};

    // the two branches standardised, and the gradients of the standardised ones; 0 in columns that are not there
    const auto branches = [&](const auto& columns, A(&x)[kColumns], A(&normal)[2][kColumns], A(&slope)[2][kColumns]) {
      A b[kColumns], w[kColumns], c[kColumns], g[kColumns];
      columns.load_from(h, x, s.mean);
      columns.load_from(grad, g);
      columns.load_from(bias, b);
      if (weight != nullptr) {
        columns.load_from(weight, w);
        columns.load_from(shift, c);
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const A y = x[i] - s.mean;
        normal[0][i] = (b[i] + y) * s.rstd_plus;
        normal[1][i] = (b[i] - y) * s.rstd_minus;
        if (weight == nullptr) w[i] = A(1), c[i] = A(0);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          slope[k][i] = g[i] * activate_derivative(args.activation, normal[k][i] * w[i] + c[i], w0);
        }
        x[i] = w[i];
      }
    };

    if (weight != nullptr) {
      s = spread<T, A, WARPS, VECTOR, TILED>(group, h, bias, width, eps);
      over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
        A w[kColumns], normal[2][kColumns], slope[2][kColumns];
        branches(columns, w, normal, slope);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            grad_sum[k] += slope[k][i] * w[i];
            product_sum[k] += slope[k][i] * w[i] * normal[k][i];
          }
        }
      });
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        grad_sum[k] = group.sum(grad_sum[k]) / A(width);
        product_sum[k] = group.sum(product_sum[k]) / A(width);
      }
    }
    over_tiles<WARPS, VECTOR, TILED>(group, width, [&](const auto& columns) {
      A w[kColumns], normal[2][kColumns], slope[2][kColumns], result[kColumns];
      branches(columns, w, normal, slope);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        A plus = slope[0][i], minus = slope[1][i];
        const A weight_sum = plus * normal[0][i] + minus * normal[1][i], shift_sum = plus + minus;
        if (weight != nullptr) {
          plus = standardize_backward(plus * w[i], normal[0][i], s.rstd_plus, grad_sum[0], product_sum[0]);
          minus = standardize_backward(minus * w[i], normal[1][i], s.rstd_minus, grad_sum[1], product_sum[1]);
        }
        result[i] = plus - minus;
        if constexpr (TILED) {
          if (partial != nullptr && columns.valid(i)) {
            A* to = partial + columns.at(i);
            to[0] = (row == first ? A(0) : to[0]) + (plus + minus);
            to[width] = (row == first ? A(0) : to[width]) + weight_sum;
            to[2 * width] = (row == first ? A(0) : to[2 * width]) + shift_sum;
          }
        } else {
          sums[0][i] += plus + minus;
          sums[1][i] += weight_sum;
          sums[2][i] += shift_sum;
        }
      }
      columns.store_to(grad_h, result);
    });
  }
  if (!TILED && partial != nullptr) {
    const Columns<WARPS, VECTOR> columns(group, 0, width);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (columns.valid(i)) partial[k * width + columns.at(i)] = sums[k][i];
      }
    }
  }
}

// sums [columns] of partial [blocks, columns]: 32 columns per block, kRuns runs of blocks side by side, then in order.
constexpr int kRuns = 32;
template <class A>
__global__ void sum_blocks_kernel(const A* partial, A* sums, int64_t blocks, int64_t columns) {
  __shared__ A parts[kRuns][32];
  const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const int64_t run = (blocks + kRuns - 1) / kRuns, first = threadIdx.y * run;
  const int64_t last = first + run < blocks ? first + run : blocks;
  A sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t block = first; block < last; ++block) sum += partial[block * columns + column];
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int i = 1; i < kRuns; ++i) sum += parts[i][threadIdx.x];
  sums[column] = sum;
}

template <class T, int WARPS, bool VECTOR, bool TILED>
void launch_forward(const SymmetrizeArgs& args, cudaStream_t stream) {
  forward_kernel<T, WARPS, VECTOR, TILED><<<blocks_for<WARPS>(args.rows), kThreads, 0, stream>>>(args);
}

template <class T, int WARPS, bool VECTOR, bool TILED>
void launch_backward(const SymmetrizeArgs& args, cudaStream_t stream) {
  if (args.kind != Kind::activation) {
    backward_kernel<T, WARPS, VECTOR, TILED><<<blocks_for<WARPS>(args.rows), kThreads, 0, stream>>>(args);
    return;
  }
  const int64_t groups = (args.rows + args.block_rows - 1) / args.block_rows;
  activation_backward_kernel<T, WARPS, VECTOR, TILED><<<blocks_for<WARPS>(groups), kThreads, 0, stream>>>(args);
}

// Calls launch(warps, vector, tiled), integral constants, with what suits the width and the alignment.
template <class T, class Launch>
void with_shape(int64_t width, bool vector, Launch launch) {
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, 4>;
  if (width > Group<4>::tile) return launch(Four{}, std::false_type{}, std::true_type{});
  if constexpr (sizeof(T) < 8) {
    if (vector && width <= Group<1>::tile) return launch(One{}, std::true_type{}, std::false_type{});
    if (vector) return launch(Four{}, std::true_type{}, std::false_type{});
  }
  if (width <= Group<1>::tile) return launch(One{}, std::false_type{}, std::false_type{});
  launch(Four{}, std::false_type{}, std::false_type{});
}

}  // namespace
}  // namespace SCALEGMN_ISA

const char* symmetrize_forward_cuda(const SymmetrizeArgs& args, void* stream) {
  with_scalar(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename cuda::Accumulate<T>::type;
    const bool vector = aligned(args.width, cuda::kColumns, sizeof(T), args.h, args.out) &&
                        aligned(args.width, cuda::kColumns, sizeof(A), args.bias, args.weight, args.shift);
    cuda::with_shape<T>(args.width, vector, [&](auto warps, auto packs, auto tiled) {
      cuda::launch_forward<T, warps(), packs(), tiled()>(args, as_stream(stream));
    });
  });
  return launch_error();
}

const char* symmetrize_backward_cuda(const SymmetrizeArgs& args, void* sums, void* stream) {
  with_scalar(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = typename cuda::Accumulate<T>::type;
    const bool vector = aligned(args.width, cuda::kColumns, sizeof(T), args.h, args.grad, args.grad_h) &&
                        aligned(args.width, cuda::kColumns, sizeof(A), args.bias, args.weight, args.shift);
    cuda::with_shape<T>(args.width, vector, [&](auto warps, auto packs, auto tiled) {
      cuda::launch_backward<T, warps(), packs(), tiled()>(args, as_stream(stream));
    });
    if (sums != nullptr) {
      const int64_t blocks = (args.rows + args.block_rows - 1) / args.block_rows, columns = 3 * args.width;
      const dim3 threads(32, cuda::kRuns);
      cuda::sum_blocks_kernel<<<unsigned((columns + 31) / 32), threads, 0, as_stream(stream)>>>(
          static_cast<const A*>(args.partial), static_cast<A*>(sums), blocks, columns);
    }
  });
  return launch_error();
}

}  // namespace scalegmn

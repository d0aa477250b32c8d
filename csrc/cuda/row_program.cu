// A warp owns a row, or a block of rows; each thread holds 4 columns of each 128, next to each other where addresses allow.
// Bound by memory, most of it L2: a map of two operands moves 12 bytes per element in float32.
#include "cuda/row_program.h"

#include "cuda/rows.cuh"

namespace scalegmn {
namespace SCALEGMN_ISA {
namespace {

static_assert(row_columns == kColumns, "the bodies of common/row_kernels.h hold what rows.cuh loads");

template <bool VECTOR>
struct WarpLanes {
  Group<1> group;

  template <class Body>
  __device__ __forceinline__ void over(int64_t width, Body body) const {
    over_tiles<1, VECTOR, true>(group, width, body);
  }
  template <class A>
  __device__ __forceinline__ A sum(A value) const {
    return group.sum(value);
  }
  __device__ __forceinline__ bool leads() const { return group.lane == 0; }
};

// Four blocks a multiprocessor at least: with this bound, and not without, the compiler finds code that never spills.
template <class Body, bool VECTOR, class Args>
__global__ void __launch_bounds__(kThreads, 4) row_kernel(const Args args, int64_t count) {
  const WarpLanes<VECTOR> lanes;
  if (lanes.group.index < count) Body::run(lanes, args, lanes.group.index);
}

// Runs the body for items [0, count), with packs of columns if `vector`; four doubles are more than an access.
template <class Body, class Args>
void launch(const Args& args, int64_t count, bool vector, void* stream) {
  if constexpr (sizeof(typename Body::Wide) == sizeof(float)) {
    if (vector) {
      row_kernel<Body, true><<<blocks_for<1>(count), kThreads, 0, as_stream(stream)>>>(args, count);
      return;
    }
  }
  row_kernel<Body, false><<<blocks_for<1>(count), kThreads, 0, as_stream(stream)>>>(args, count);
}

// As above, with the body for the type that the arguments compute in.
template <template <class> class Body, class Args>
const char* launch_wide(const Args& args, int64_t count, bool vector, void* stream) {
  args.wide ? launch<Body<double>>(args, count, vector, stream) : launch<Body<float>>(args, count, vector, stream);
  return launch_error();
}

template <class A, class T>
bool packs(const RowMapArgs& args, MapRow<A, T>) {
  const bool second = args.b == nullptr || args.map == RowMap::scale ||
                      (args.b_stride % kColumns == 0 && aligned(kColumns, kColumns, sizeof(T), args.b));
  return second && args.a_stride % kColumns == 0 && args.to_stride % kColumns == 0 &&
         aligned(args.width, kColumns, sizeof(A), args.a, args.to);
}

const char* map(const RowMapArgs& args, void* stream) {
  with_map(args, [&](auto body) { launch<decltype(body)>(args, args.rows, packs(args, body), stream); });
  return launch_error();
}

const char* dot(const RowDotArgs& args, void* stream) {
  const bool vector = aligned(args.width, kColumns, sizeof(float), args.a, args.b);
  return launch_wide<DotRow>(args, args.rows, vector, stream);
}

const char* norm(const RowNormArgs& args, void* stream) {
  const bool vector = aligned(args.width, kColumns, sizeof(float), args.x, args.to, args.weight, args.shift);
  return launch_wide<NormRow>(args, args.rows, vector, stream);
}

const char* norm_backward(const RowNormArgs& args, void* stream) {
  const bool vector = aligned(args.width, kColumns, sizeof(float), args.x, args.to, args.weight, args.shift, args.grad,
                              args.partial);
  return launch_wide<NormBlockBackward>(args, row_blocks(args.rows, row_norm_block), vector, stream);
}

const char* add_runs(const RowRunArgs& args, void* stream) {
  const int64_t blocks = row_blocks(args.rows, row_run_block);
  const bool vector = aligned(args.width, kColumns, sizeof(float), args.values, args.to, args.heads, args.tails);
  const char* error = launch_wide<SumRuns>(args, blocks, vector, stream);
  return error != nullptr ? error : launch_wide<JoinRuns>(args, blocks, vector, stream);
}

}  // namespace
}  // namespace SCALEGMN_ISA

RowKernels row_kernels_cuda() { return {cuda::map, cuda::dot, cuda::norm, cuda::norm_backward, cuda::add_runs}; }

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(as_stream(stream), &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

}  // namespace scalegmn

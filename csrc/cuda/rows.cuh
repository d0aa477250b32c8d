// How kernels over rows share a row among threads: a group of warps owns it, each thread holds kColumns columns of a tile,
// next to each other where addresses allow.
#pragma once

#include "cuda/common.cuh"

namespace scalegmn::SCALEGMN_ISA {

constexpr int kColumns = 4;  // of a thread in a tile
constexpr int kThreads = 128;

// A group of WARPS warps; a block has kThreads / (32 WARPS) of them.
template <int WARPS>
struct Group {
  static constexpr int threads = 32 * WARPS;
  static constexpr int per_block = kThreads / threads;
  static constexpr int tile = threads * kColumns;

  int lane = threadIdx.x % threads;
  int64_t index = int64_t(blockIdx.x) * per_block + threadIdx.x / threads;

  // The same for all threads of the group, in an order that does not depend on timing.
  template <class A, class Combine>
  __device__ A reduce(A value, Combine combine) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if constexpr (WARPS > 1) {
      __shared__ A parts[kThreads / 32];
      __syncthreads();  // earlier readers of parts
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
      __syncthreads();
      const int first = threadIdx.x / threads * WARPS;
      value = parts[first];
      for (int i = 1; i < WARPS; ++i) value = combine(value, parts[first + i]);
    }
    return value;
  }

  template <class A>
  __device__ A sum(A value) const {
    return reduce(value, [](A a, A b) { return a + b; });
  }

  template <class A>
  __device__ A max(A value) const {
    return reduce(value, [](A a, A b) { return a < b ? b : a; });
  }
};

// The columns of a thread in a tile, and loads and stores of them; columns from `width` on are `other`, and not stored.
template <int WARPS, bool VECTOR>
struct Columns {
  int64_t first, width;

  __device__ Columns(const Group<WARPS>& group, int64_t tile, int64_t width)
      : first(tile * Group<WARPS>::tile + (VECTOR ? group.lane * kColumns : group.lane)), width(width) {}

  __device__ int64_t at(int i) const { return first + (VECTOR ? i : i * Group<WARPS>::threads); }
  __device__ bool valid(int i) const { return at(i) < width; }

  template <class T, class A>
  __device__ void load_from(const T* row, A (&values)[kColumns], A other = A(0)) const {
    if constexpr (VECTOR) {
      if (first < width) {
        load_pack<kColumns>(row + first, values);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) values[i] = other;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) values[i] = valid(i) ? A(load(row[at(i)])) : other;
    }
  }

  template <class T, class A>
  __device__ void store_to(T* row, const A (&values)[kColumns]) const {
    if constexpr (VECTOR) {
      if (first < width) store_pack<kColumns>(row + first, values);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (valid(i)) store(row[at(i)], values[i]);
      }
    }
  }
};

// Calls body(columns) for the tiles of a row: a single one unless TILED.
template <int WARPS, bool VECTOR, bool TILED, class Body>
__device__ void over_tiles(const Group<WARPS>& group, int64_t width, Body body) {
  if constexpr (TILED) {
    for (int64_t tile = 0; tile * Group<WARPS>::tile < width; ++tile) body(Columns<WARPS, VECTOR>(group, tile, width));
  } else {
    body(Columns<WARPS, VECTOR>(group, 0, width));
  }
}

template <int WARPS>
unsigned blocks_for(int64_t groups) {
  return unsigned((groups + Group<WARPS>::per_block - 1) / Group<WARPS>::per_block);
}

}  // namespace scalegmn::SCALEGMN_ISA

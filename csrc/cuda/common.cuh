// What every CUDA kernel needs: vector loads and stores, launch errors.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#include "common/scalar.h"

namespace scalegmn {

// Blocks of a multiprocessor at least: the bound of kernels for which the compiler finds code without spills only then.
constexpr int kBlocks = 3;

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// The error of the launches before it, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether rows of `width` elements of `size` bytes can be read `vector` elements at a time at all these addresses.
template <class... Pointer>
bool aligned(int64_t width, int vector, int size, const Pointer*... pointers) {
  const uintptr_t mask = uintptr_t(vector) * size - 1;
  return width % vector == 0 && (... && ((reinterpret_cast<uintptr_t>(pointers) & mask) == 0));
}

// A type as a value: lambdas of C++17 have no template parameters.
template <class T>
struct Type {
  using type = T;
};

// Calls function(Type<T>{}) for the element type.
template <class F>
auto with_scalar(Scalar dtype, F function) {
  switch (dtype) {
    case Scalar::f64:
      return function(Type<double>{});
    case Scalar::bf16:
      return function(Type<cuda::bfloat16>{});
    case Scalar::f16:
      return function(Type<cuda::float16>{});
    default:
      return function(Type<float>{});
  }
}

namespace SCALEGMN_ISA {

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// V consecutive elements as one access, in the type to compute in. V > 1 needs an address aligned to the pack.
template <int V, class T, class A>
__device__ __forceinline__ void load_pack(const T* from, A (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = load(pack.values[i]);
}

template <int V, class T, class A>
__device__ __forceinline__ void store_pack(T* to, const A (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) store(pack.values[i], from[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

// Element types of the kernels: how they are named, loaded and stored. Shared by the CPU and the CUDA kernels.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SCALEGMN_HD __host__ __device__ __forceinline__
#else
#define SCALEGMN_HD inline __attribute__((always_inline))
#endif

// Everything that has code lives in a namespace of its instruction set, so that the linker cannot mix them.
#ifndef SCALEGMN_ISA
#ifdef __CUDACC__
#define SCALEGMN_ISA cuda
#else
#define SCALEGMN_ISA baseline
#endif
#endif

namespace scalegmn {

enum class Scalar { f32, f64, bf16, f16 };

namespace SCALEGMN_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type to compute in: float, or double for double.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

SCALEGMN_HD uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
SCALEGMN_HD float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }

SCALEGMN_HD float load(const float& x) { return x; }
SCALEGMN_HD double load(const double& x) { return x; }
SCALEGMN_HD float load(const bfloat16& x) { return from_bits(uint32_t(x.bits) << 16); }
SCALEGMN_HD float load(const float16& x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const float finite = from_bits(magnitude) * 0x1p112f;  // rebias the exponent: exact, subnormals included
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = magnitude >= 0x0f800000u ? special : to_bits(finite);
  return from_bits(bits | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

// Stores round to nearest, ties to even.
SCALEGMN_HD void store(float& to, float x) { to = x; }
SCALEGMN_HD void store(double& to, double x) { to = x; }
SCALEGMN_HD void store(bfloat16& to, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
SCALEGMN_HD void store(float16& to, float x) {
#ifdef __CUDA_ARCH__
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);  // 0.5 has float16's last place
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = uint16_t((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
#endif
}

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

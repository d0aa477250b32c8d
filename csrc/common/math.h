// Elementary functions and activations on one element. On the CPU the float versions are branch-free, so that loops over
// them vectorise; on a GPU and for double they are the platform's.
#pragma once

#include "common/scalar.h"

namespace scalegmn {

enum class Activation { identity, relu, elu, silu, tanh, sigmoid, sine, gelu };

namespace SCALEGMN_ISA {

#ifdef __CUDACC__
#define SCALEGMN_LIBM(name) ::name
#else
#define SCALEGMN_LIBM(name) __builtin_##name
#endif

SCALEGMN_HD float square_root(float x) { return SCALEGMN_LIBM(sqrtf)(x); }
SCALEGMN_HD double square_root(double x) { return SCALEGMN_LIBM(sqrt)(x); }
SCALEGMN_HD float magnitude(float x) { return SCALEGMN_LIBM(fabsf)(x); }
SCALEGMN_HD double magnitude(double x) { return SCALEGMN_LIBM(fabs)(x); }

SCALEGMN_HD double exponential(double x) { return SCALEGMN_LIBM(exp)(x); }
SCALEGMN_HD double exponential_minus_1(double x) { return SCALEGMN_LIBM(expm1)(x); }
SCALEGMN_HD double hyperbolic_tangent(double x) { return SCALEGMN_LIBM(tanh)(x); }
SCALEGMN_HD double sine(double x) { return SCALEGMN_LIBM(sin)(x); }
SCALEGMN_HD double cosine(double x) { return SCALEGMN_LIBM(cos)(x); }
SCALEGMN_HD double error_function(double x) { return SCALEGMN_LIBM(erf)(x); }

#ifdef __CUDACC__

SCALEGMN_HD float exponential(float x) { return ::expf(x); }
SCALEGMN_HD float exponential_minus_1(float x) { return ::expm1f(x); }
SCALEGMN_HD float hyperbolic_tangent(float x) { return ::tanhf(x); }
SCALEGMN_HD float sine(float x) { return ::sinf(x); }
SCALEGMN_HD float cosine(float x) { return ::cosf(x); }
SCALEGMN_HD float error_function(float x) { return ::erff(x); }

#else

// x clamped to [low, high]; NaN stays.
SCALEGMN_HD float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

SCALEGMN_HD float power_of_2(uint32_t n) { return from_bits((n + 127u) << 23); }

// x = n log 2 + r, |r| <= log(2) / 2: returns exp(r) - 1 to 2e-8 of itself and sets n (two's complement).
SCALEGMN_HD float exponential_core(float x, uint32_t& n) {
  const float shift = 0x1.8p23f;  // adding it rounds to an integer, which then is in the low bits
  const float shifted = x * 0x1.715476p0f + shift;
  n = to_bits(shifted) - to_bits(shift);
  const float rounded = shifted - shift;
  const float r = (x - rounded * 0x1.62e4p-1f) - rounded * 0x1.7f7d1cp-20f;  // first product exact: 15 + 8 bits
  float p = 1.f / 5040.f;
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  return p * r * r + r;
}

SCALEGMN_HD float exponential(float x) {
  uint32_t n;
  const float p = exponential_core(clamp(x, -104.f, 89.f), n);
  const uint32_t half = uint32_t(int32_t(n) >> 1);  // in two steps: 2^n alone may be out of range
  const float scale = power_of_2(half);
  return (p * scale + scale) * power_of_2(n - half);
}

// For x <= 80; beyond, exp(80): whoever selects by the sign of x does not read it.
SCALEGMN_HD float exponential_minus_1(float x) {
  uint32_t n;
  const float p = exponential_core(clamp(x, -80.f, 80.f), n);
  const float scale = power_of_2(n);
  return p * scale + (scale - 1.f);
}

// Exactly odd.
SCALEGMN_HD float hyperbolic_tangent(float x) {
  const float e = exponential_minus_1(2.f * clamp(magnitude(x), 0.f, 10.f));
  return from_bits(to_bits(e / (e + 2.f)) ^ (to_bits(x) & 0x80000000u));
}

// Minimax polynomials of erf(x) / x - 1 up to 1 and of -log(erfc(x)) / x up to 4; to 2 units in the last place.
SCALEGMN_HD float error_function(float x) {
  const float s = x * x, t = clamp(magnitude(x), 0.f, 4.f);
  float p = 0x1.4ae4c6p-14f;
  p = p * s - 0x1.a485e8p-11f;
  p = p * s + 0x1.5419f4p-8f;
  p = p * s - 0x1.b7fbb4p-6f;
  p = p * s + 0x1.ce2d20p-4f;
  p = p * s - 0x1.81273ep-2f;
  p = p * s + 0x1.06eba8p-3f;
  const float near = x + x * p;
  float q = 0x1.dd69d6p-19f;
  q = q * t - 0x1.dd1104p-16f;
  q = q * t - 0x1.22faa4p-13f;
  q = q * t + 0x1.a112b8p-9f;
  q = q * t - 0x1.7a555ep-6f;
  q = q * t + 0x1.b0d20ap-4f;
  q = q * t + 0x1.45547ap-1f;
  q = q * t + 0x1.20ebe8p+0f;
  const float far = from_bits(to_bits(1.f - exponential(-(q * t))) | (to_bits(x) & 0x80000000u));
  return s > 1.f ? far : near;  // NaN stays
}

// Quadrant q and remainder r of x = q pi/2 + r in double, so that products of large w0 and x keep their phase: exact to
// float up to |x| = 1e6, error |x| 1e-16 beyond. Bounded for any finite x, NaN for infinite ones.
SCALEGMN_HD float quarter_turns(float x, uint32_t& q) {
  const double wide = x;
  const double shift = 0x1.8p52;
  const double shifted = wide * 0x1.45f306dc9c883p-1 + shift;
  q = uint32_t(__builtin_bit_cast(uint64_t, shifted));
  const double turns = shifted - shift;
  // pi / 2 in three parts of 33, 33 and 53 bits
  const double r = ((wide - turns * 0x1.921fb544p0) - turns * 0x1.0b4611a6p-34) - turns * 0x1.3198a2e037073p-69;
  return clamp(float(r), -0.8f, 0.8f);
}

SCALEGMN_HD float sine_of_quadrant(float r, uint32_t q) {
  const float s = r * r;
  float odd = 0x1.71de36p-19f;
  odd = odd * s - 0x1.a01a02p-13f;
  odd = odd * s + 0x1.111112p-7f;
  odd = odd * s - 0x1.555556p-3f;
  odd = odd * s * r + r;
  float even = -0x1.27e4fcp-22f;
  even = even * s + 0x1.a01a02p-16f;
  even = even * s - 0x1.6c16c2p-10f;
  even = even * s + 0x1.555556p-5f;
  even = even * s * s + (1.f - 0.5f * s);
  const float value = (q & 1u) ? even : odd;
  return from_bits(to_bits(value) ^ ((q & 2u) << 30));
}

SCALEGMN_HD float sine(float x) {
  uint32_t q;
  const float r = quarter_turns(x, q);
  return sine_of_quadrant(r, q);
}

SCALEGMN_HD float cosine(float x) {
  uint32_t q;
  const float r = quarter_turns(x, q);
  return sine_of_quadrant(r, q + 1u);
}

#endif

// The distribution and the density of the standard normal.
template <class A>
SCALEGMN_HD A normal_distribution(A y) {
  return A(0.5) + A(0.5) * error_function(y * A(0.70710678118654752440));
}

template <class A>
SCALEGMN_HD A normal_density(A y) {
  return exponential(A(-0.5) * y * y) * A(0.39894228040143267794);
}

template <class A>
SCALEGMN_HD A logistic(A y) {
  return A(1) / (A(1) + exponential(-y));
}

template <class A>
SCALEGMN_HD A activate(Activation activation, A y, A w0) {
  switch (activation) {
    case Activation::relu:
      return y < A(0) ? A(0) : y;  // NaN stays
    case Activation::elu:
      return y > A(0) ? y : exponential_minus_1(y);
    case Activation::silu:
      return y / (A(1) + exponential(-y));
    case Activation::tanh:
      return hyperbolic_tangent(y);
    case Activation::sigmoid:
      return logistic(y);
    case Activation::sine:
      return sine(w0 * y);
    case Activation::gelu:
      return y * normal_distribution(y);
    default:
      return y;
  }
}

template <class A>
SCALEGMN_HD A activate_derivative(Activation activation, A y, A w0) {
  switch (activation) {
    case Activation::relu:
      return y > A(0) ? A(1) : A(0);
    case Activation::elu:
      return y > A(0) ? A(1) : exponential(y);
    case Activation::silu: {
      const A s = logistic(y);
      return s * (A(1) + y * (A(1) - s));
    }
    case Activation::tanh: {
      const A t = hyperbolic_tangent(y);
      return A(1) - t * t;
    }
    case Activation::sigmoid: {
      const A s = logistic(y);
      return s * (A(1) - s);
    }
    case Activation::sine:
      return w0 * cosine(w0 * y);
    case Activation::gelu:
      return normal_distribution(y) + y * normal_density(y);
    default:
      return A(1);
  }
}

}  // namespace SCALEGMN_ISA
}  // namespace scalegmn

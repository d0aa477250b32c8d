// Activations as template arguments of the CPU kernels.
#pragma once

#include "common/math.h"

namespace scalegmn::SCALEGMN_ISA {

// Calls function.template operator()<activation>() for the activation's value.
template <class F>
inline __attribute__((always_inline)) void with_activation(Activation activation, F function) {
  switch (activation) {
    case Activation::identity:
      return function.template operator()<Activation::identity>();
    case Activation::relu:
      return function.template operator()<Activation::relu>();
    case Activation::elu:
      return function.template operator()<Activation::elu>();
    case Activation::silu:
      return function.template operator()<Activation::silu>();
    case Activation::tanh:
      return function.template operator()<Activation::tanh>();
    case Activation::sigmoid:
      return function.template operator()<Activation::sigmoid>();
    case Activation::sine:
      return function.template operator()<Activation::sine>();
    case Activation::gelu:
      return function.template operator()<Activation::gelu>();
  }
}

}  // namespace scalegmn::SCALEGMN_ISA

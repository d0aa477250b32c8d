// What every op's host file needs: dtypes, checks, and the CUDA device and stream of a call.
#pragma once

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include "common/scalar.h"

namespace scalegmn {

inline Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::f32;
    case at::kDouble:
      return Scalar::f64;
    case at::kBFloat16:
      return Scalar::bf16;
    case at::kHalf:
      return Scalar::f16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16, float16 or float64, got ", tensor.scalar_type());
  }
}

// The dtype that a kernel accumulates in.
inline at::ScalarType wide_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.is_contiguous(), name, ": expected contiguous rows [R, d], got shape ",
                    tensor.sizes(), " with strides ", tensor.strides());
}

inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& other, const char* other_name) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes() && tensor.is_contiguous(), name, ": expected contiguous ",
                    other.sizes(), " like ", other_name, ", got shape ", tensor.sizes(), " with strides ",
                    tensor.strides());
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, ": expected ", other.scalar_type(), " like ",
                   other_name, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, ": expected device ", other.device(), " like ", other_name,
                    ", got ", tensor.device());
}

// The current stream of the tensor's device as a cudaStream_t; through the accelerator interface, which a build of torch
// without CUDA has too.
inline void* stream_of(const at::Tensor& tensor) {
  return at::accelerator::getCurrentStream(tensor.device().index()).native_handle();
}

// Launchers return a cudaError_t's text, or null.
inline void check_launch(const char* error, const char* op) {
  TORCH_CHECK(error == nullptr, op, ": CUDA launch failed: ", error);
}

}  // namespace scalegmn

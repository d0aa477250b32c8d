#include "ops/symmetrize.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "cpu/symmetrize.h"
#include "ops/common.h"
#include "ops/pool.h"
#ifdef SCALEGMN_CUDA
#include "cuda/symmetrize.h"
#endif

namespace scalegmn {
namespace {

constexpr int64_t grain_elements = 16384;  // a task is worth handing to another thread from about 10 microseconds on

Kind kind_of(std::string_view name) {
  if (name == "activation") return Kind::activation;
  if (name == "abs") return Kind::abs;
  TORCH_CHECK_VALUE(name == "normalize", "kind: expected activation, abs or normalize, got ", name);
  return Kind::normalize;
}

Activation activation_of(std::string_view name) {
  constexpr std::array<std::string_view, 7> names = {"identity", "relu", "elu", "silu", "tanh", "sigmoid", "sine"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, "activation: expected identity, relu, elu, silu, tanh, sigmoid or sine, got ", name);
}

// The arguments of a call and the tensors they point into.
struct Call {
  SymmetrizeArgs args{};
  std::vector<at::Tensor> owned;

  const void* keep(at::Tensor tensor) {
    owned.push_back(std::move(tensor));
    return owned.back().const_data_ptr();
  }
};

at::Tensor parameter(const at::Tensor& tensor, const char* name, const at::Tensor& h) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == h.size(1), name, ": expected shape [", h.size(1), "], got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == h.device(), name, ": expected device ", h.device(), ", got ", tensor.device());
  scalar_of(tensor, name);
  return tensor.to(wide_of(h)).contiguous();
}

Call prepare(const at::Tensor& h, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm_weight,
             const std::optional<at::Tensor>& norm_bias, std::string_view kind, std::string_view activation, double eps,
             double w0) {
  check_rows(h, "h");
  TORCH_CHECK_VALUE(norm_weight.has_value() == norm_bias.has_value(),
                    "norm_weight, norm_bias: expected both or none, got one");
  Call call;
  SymmetrizeArgs& args = call.args;
  args.rows = h.size(0);
  args.width = h.size(1);
  args.dtype = scalar_of(h, "h");
  args.kind = kind_of(kind);
  args.activation = activation_of(activation);
  args.eps = eps;
  args.w0 = w0;
  args.h = h.const_data_ptr();
  args.block_rows = symmetrize_block_rows(args.rows, h.is_cuda());
  if (args.kind == Kind::activation && h.numel() > 0) {
    at::Tensor b = bias ? parameter(*bias, "bias", h) : at::zeros({args.width}, h.options().dtype(wide_of(h)));
    args.bias = call.keep(bias && norm_weight ? b.sub(b.mean()) : b);
    if (norm_weight) {
      args.weight = call.keep(parameter(*norm_weight, "norm_weight", h));
      args.shift = call.keep(parameter(*norm_bias, "norm_bias", h));
    }
  }
  return call;
}

int64_t blocks_of(const SymmetrizeArgs& args) { return (args.rows + args.block_rows - 1) / args.block_rows; }

// partial [blocks, 3, width] summed over blocks, in order, into sums [3, width].
template <class A>
void sum_blocks(const at::Tensor& partial, at::Tensor& sums) {
  const int64_t blocks = partial.size(0), columns = sums.numel();
  const A* from = partial.const_data_ptr<A>();
  A* to = sums.mutable_data_ptr<A>();
  for (int64_t i = 0; i < columns; ++i) to[i] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < columns; ++i) to[i] += from[block * columns + i];
  }
}

// The parameters' gradients from their sums [3, d], in the parameters' dtypes; [0] for absent ones.
at::Tensor gradient(const std::optional<at::Tensor>& parameter, const at::Tensor& sums, int64_t k,
                    const at::Tensor& grad_h) {
  if (!parameter) return at::empty({0}, grad_h.options());
  if (!sums.defined()) return at::zeros(parameter->sizes(), parameter->options());
  return sums.select(0, k).to(parameter->scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

void forward_cpu(const SymmetrizeArgs& args) {
  const auto kernel = SCALEGMN_CPU(symmetrize_forward);
  at::parallel_for(0, args.rows, grain_elements / args.width + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(symmetrize_scratch(args.width));
    kernel(args, begin, end, scratch.data());
  });
}

void backward_cpu(const SymmetrizeArgs& args, const at::Tensor& partial, at::Tensor& sums) {
  const auto kernel = SCALEGMN_CPU(symmetrize_backward);
  const int64_t grain = grain_elements / (args.width * args.block_rows) + 1;
  at::parallel_for(0, blocks_of(args), grain, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(symmetrize_scratch(args.width));
    kernel(args, begin, end, scratch.data());
  });
  if (!partial.defined()) return;
  args.dtype == Scalar::f64 ? sum_blocks<double>(partial, sums) : sum_blocks<float>(partial, sums);
}

}  // namespace

at::Tensor symmetrize(const at::Tensor& h, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
                      std::string_view kind, std::string_view activation, double eps, double w0) {
  const c10::DeviceGuard guard(h.device());
  Call call = prepare(h, bias, norm_weight, norm_bias, kind, activation, eps, w0);
  at::Tensor out = pooled_empty(h.sizes(), h.options());
  if (h.numel() == 0) return out;
  call.args.out = out.mutable_data_ptr();
#ifdef SCALEGMN_CUDA
  if (h.is_cuda()) {
    check_launch(symmetrize_forward_cuda(call.args, stream_of(h)), "symmetrize");
    return out;
  }
#endif
  forward_cpu(call.args);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> symmetrize_backward(
    const at::Tensor& grad, const at::Tensor& h, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias, std::string_view kind,
    std::string_view activation, double eps, double w0) {
  const c10::DeviceGuard guard(h.device());
  Call call = prepare(h, bias, norm_weight, norm_bias, kind, activation, eps, w0);
  check_like(grad, "grad", h, "h");
  at::Tensor grad_h = pooled_empty(h.sizes(), h.options()), partial, sums;
  SymmetrizeArgs& args = call.args;
  if (h.numel() > 0) {
    args.grad = grad.const_data_ptr();
    args.grad_h = grad_h.mutable_data_ptr();
    if (bias || norm_weight) {
      const auto options = h.options().dtype(wide_of(h));
      partial = at::empty({blocks_of(args), 3, args.width}, options);
      sums = at::empty({3, args.width}, options);
      args.partial = partial.mutable_data_ptr();
    }
#ifdef SCALEGMN_CUDA
    if (h.is_cuda()) {
      void* to = sums.defined() ? sums.mutable_data_ptr() : nullptr;
      check_launch(symmetrize_backward_cuda(args, to, stream_of(h)), "symmetrize_backward");
    } else {
      backward_cpu(args, partial, sums);
    }
#else
    backward_cpu(args, partial, sums);
#endif
  }
  return {grad_h, gradient(bias, sums, 0, grad_h), gradient(norm_weight, sums, 1, grad_h),
          gradient(norm_bias, sums, 2, grad_h)};
}

TORCH_LIBRARY_FRAGMENT(scalegmn_fast_native, m) {
  m.def(
      "symmetrize(Tensor h, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, str kind, str activation, float eps, "
      "float w0) -> Tensor");
  m.def(
      "symmetrize_backward(Tensor grad, Tensor h, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, str kind, "
      "str activation, float eps, float w0) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(scalegmn_fast_native, CPU, m) {
  m.impl("symmetrize", &symmetrize);
  m.impl("symmetrize_backward", &symmetrize_backward);
}

#ifdef SCALEGMN_CUDA
TORCH_LIBRARY_IMPL(scalegmn_fast_native, CUDA, m) {
  m.impl("symmetrize", &symmetrize);
  m.impl("symmetrize_backward", &symmetrize_backward);
}
#endif

}  // namespace scalegmn

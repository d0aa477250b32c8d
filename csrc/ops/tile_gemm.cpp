#include "ops/tile_gemm.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/BFloat16.h>
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "cpu/isa.h"

namespace scalegmn {
namespace {

template <class A>
void torch_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k, const A*, const A* a,
                const int* lda, const A* b, const int* ldb, const A* beta, A* c, const int* ldc) {
  const c10::InferenceMode guard;
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<A>::value);
  const auto matrix = [&](const A* data, bool transposed, int64_t rows, int64_t columns, int64_t stride) {
    A* start = const_cast<A*>(data);
    return transposed ? at::from_blob(start, {columns, rows}, {stride, 1}, options).t()
                      : at::from_blob(start, {rows, columns}, {stride, 1}, options);
  };
  at::Tensor to = matrix(c, false, *n, *m, *ldc);
  const at::Tensor left = matrix(b, *tb == 'T', *n, *k, *ldb), right = matrix(a, *ta == 'T', *k, *m, *lda);
  if (*beta == A(0)) to.zero_();
  at::addmm_out(to, to, left, right);
}

template <class Function>
Function blas(const char* name, Function fallback) {
  void* found = dlsym(RTLD_DEFAULT, name);
  return found == nullptr ? fallback : reinterpret_cast<Function>(found);
}

void row32(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const float* a,
           const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
}

void row16(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const uint16_t* a,
           const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

void release() { at::native::cpublas::brgemm_release(true); }

// Whether a product of ones comes out right: torch throws where oneDNN does not serve the machine or the type.
template <class T, class Gemm>
bool serves(Gemm gemm, T one) {
  constexpr int64_t size = 32;
  std::array<T, size * size> a, b;
  std::array<float, size * size> c{};
  a.fill(one);
  b.fill(one);
  try {
    gemm(size, size, size, size, size, size, false, a.data(), b.data(), c.data());
    gemm(size, size, size, size, size, size, true, a.data(), b.data(), c.data());
  } catch (const std::exception&) {
    return false;
  }
  for (const float value : c) {
    if (value != float(2 * size)) return false;
  }
  return true;
}

TileGemms find() {
  TileGemms found{&torch_gemm<float>, &torch_gemm<double>, nullptr, nullptr, nullptr};
  const char* choice = std::getenv("SCALEGMN_FAST_GEMM");
  if (choice != nullptr && std::strcmp(choice, "torch") == 0) return found;
  found.gemm32 = blas("sgemm_", found.gemm32);
  found.gemm64 = blas("dgemm_", found.gemm64);
  if (choice != nullptr && std::strcmp(choice, "blas") == 0) return found;
  if (serves(&row32, 1.f)) found.row32 = &row32;
  if (bfloat16_products() && serves(&row16, uint16_t(0x3f80))) {
    found.row16 = &row16;
    found.release = &release;
  }
  return found;
}

}  // namespace

const TileGemms& tile_gemms() {
  static const TileGemms found = find();
  return found;
}

}  // namespace scalegmn

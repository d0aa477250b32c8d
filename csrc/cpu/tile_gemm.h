// Signatures of the matrix products that a tile calls; csrc/ops/tile_gemm.h has the functions.
#pragma once

#include <stdint.h>

namespace scalegmn {

using Gemm32 = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                        const int*, const float*, const int*, const float*, float*, const int*);
using Gemm64 = void (*)(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                        const int*, const double*, const int*, const double*, double*, const int*);

// c [m, n] (+)= a [m, k] b [k, n], rows lda, ldb and ldc apart. A new m, n or k costs a compilation: callers round m up.
using RowGemm32 = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
                           const float* a, const float* b, float* c);

// The same of bfloat16 (its bits), k even; b is stored in pairs of rows, [k / 2, n, 2], ldb numbers of 32 bits apart.
using RowGemm16 = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
                           const uint16_t* a, const uint16_t* b, float* c);

}  // namespace scalegmn

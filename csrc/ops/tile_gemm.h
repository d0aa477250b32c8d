// Matrix products of the size of a tile, by the libraries that torch carries.
//
// SCALEGMN_FAST_GEMM=blas keeps to the BLAS that torch exports, =torch to at::addmm.
#pragma once

#include "cpu/tile_gemm.h"

namespace scalegmn {

// Found once per process. Each is null where the machine or torch has none; gemm32 and gemm64 always work.
struct TileGemms {
  Gemm32 gemm32;      // column-major, as BLAS has it
  Gemm64 gemm64;
  RowGemm32 row32;    // row-major, untransposed: compiled for the shape by oneDNN, faster than BLAS on a tile
  RowGemm16 row16;    // of bfloat16, added up in float
  void (*release)();  // gives back what row32 and row16 hold of the thread; null where they are
};

const TileGemms& tile_gemms();

}  // namespace scalegmn

// The instruction sets that the CPU kernels are compiled for, and which one this machine runs.
//
// A kernel is declared once with SCALEGMN_DECLARE_CPU(name, parameters) and called as SCALEGMN_CPU(name)(arguments).
// SCALEGMN_FAST_ISA=baseline|avx2|avx512 lowers the choice, to compare or to reproduce another machine's bits.
#pragma once

namespace scalegmn {

enum class Isa { baseline, avx2, avx512 };

// The newest compiled set that this processor has, found once.
Isa isa();
const char* isa_name();

// Whether the processor multiplies bfloat16 faster than float.
bool bfloat16_products();

}  // namespace scalegmn

#if defined(__x86_64__) || defined(_M_X64)
#define SCALEGMN_DECLARE_CPU(name, ...)            \
  namespace baseline { void name(__VA_ARGS__); }   \
  namespace avx2 { void name(__VA_ARGS__); }       \
  namespace avx512 { void name(__VA_ARGS__); }
#define SCALEGMN_CPU(name)                                                  \
  (::scalegmn::isa() == ::scalegmn::Isa::avx512 ? &::scalegmn::avx512::name \
   : ::scalegmn::isa() == ::scalegmn::Isa::avx2 ? &::scalegmn::avx2::name   \
                                                : &::scalegmn::baseline::name)
#else
#define SCALEGMN_DECLARE_CPU(name, ...) \
  namespace baseline { void name(__VA_ARGS__); }
#define SCALEGMN_CPU(name) (&::scalegmn::baseline::name)
#endif

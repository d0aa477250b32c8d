#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace scalegmn {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};

Isa detect() {
  Isa best = Isa::baseline;
#if defined(__x86_64__) || defined(_M_X64)
  // the levels x86-64-v3 and v4 that the files are compiled for, by the features that define them
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  if (const char* wanted = std::getenv("SCALEGMN_FAST_ISA")) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(wanted, names[static_cast<int>(isa)]) == 0) best = std::min(best, isa);
    }
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa found = detect();
  return found;
}

bool bfloat16_products() {
#if defined(__x86_64__) || defined(_M_X64)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* isa_name() { return names[static_cast<int>(isa())]; }

}  // namespace scalegmn

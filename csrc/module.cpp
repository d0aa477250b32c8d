// The Python module scalegmn_fast._C: how it was built. The ops themselves are registered with torch by csrc/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = BUILT_TORCH;
  info["compiler"] = BUILT_COMPILER;
  info["cpu_isas"] = split(BUILT_ISAS);
  info["cpu_isa"] = scalegmn::isa_name();
  info["cuda_archs"] = split(BUILT_CUDA_ARCHS);
  info["cuda_toolkit"] = BUILT_CUDA_TOOLKIT;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Fused kernels of scalegmn_fast; importing registers torch.ops.scalegmn_fast_native.";
  m.def("build_info", &build_info,
        "torch, compiler, cpu_isas (compiled), cpu_isa (in use), cuda_archs (empty: no CUDA), cuda_toolkit");
}

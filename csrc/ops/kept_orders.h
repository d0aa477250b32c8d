// Orders in which the rows that an index reads are added up: made once per index, kept for as long as its storage lives.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <vector>

namespace scalegmn {

// What make() gives for this index and key; from the second time on what it gave then, while the index has not been
// written to. `stream`: of the call, null on the CPU; another stream makes its own. `capturing`: into a CUDA graph, which
// begins when the device is done: it takes what is kept, of any stream, and keeps nothing of what it makes itself, which
// is not there before a replay. For any number of threads.
at::Tensor kept_order(const at::Tensor& index, std::vector<int64_t> key, const void* stream, bool capturing,
                      c10::function_ref<at::Tensor()> make);

}  // namespace scalegmn

#include "cpu/row_kernels.h"

namespace scalegmn::SCALEGMN_ISA {
namespace {

struct Columns {
  int64_t first, width;

  int64_t at(int i) const { return first + i; }
  bool valid(int i) const { return at(i) < width; }

  template <class T, class A>
  void load_from(const T* row, A (&values)[row_columns], A other = A(0)) const {
    for (int i = 0; i < row_columns; ++i) values[i] = valid(i) ? A(load(row[at(i)])) : other;
  }

  template <class A>
  void store_to(A* row, const A (&values)[row_columns]) const {
    for (int i = 0; i < row_columns; ++i) {
      if (valid(i)) row[at(i)] = values[i];
    }
  }
};

// A row's only thread.
struct OneThread {
  template <class Body>
  void over(int64_t width, Body body) const {
    for (int64_t first = 0; first < width; first += row_columns) body(Columns{first, width});
  }
  template <class A>
  A sum(A value) const {
    return value;
  }
  bool leads() const { return true; }
};

template <class Body, class Args>
const char* each(const Args& args, int64_t count) {
  for (int64_t i = 0; i < count; ++i) Body::run(OneThread(), args, i);
  return nullptr;
}

const char* map(const RowMapArgs& args, void*) {
  with_map(args, [&](auto body) { each<decltype(body)>(args, args.rows); });
  return nullptr;
}

const char* dot(const RowDotArgs& args, void*) {
  return args.wide ? each<DotRow<double>>(args, args.rows) : each<DotRow<float>>(args, args.rows);
}

const char* norm(const RowNormArgs& args, void*) {
  return args.wide ? each<NormRow<double>>(args, args.rows) : each<NormRow<float>>(args, args.rows);
}

const char* norm_backward(const RowNormArgs& args, void*) {
  const int64_t blocks = row_blocks(args.rows, row_norm_block);
  return args.wide ? each<NormBlockBackward<double>>(args, blocks) : each<NormBlockBackward<float>>(args, blocks);
}

const char* add_runs(const RowRunArgs& args, void*) {
  const int64_t blocks = row_blocks(args.rows, row_run_block);
  args.wide ? each<SumRuns<double>>(args, blocks) : each<SumRuns<float>>(args, blocks);
  return args.wide ? each<JoinRuns<double>>(args, blocks) : each<JoinRuns<float>>(args, blocks);
}

}  // namespace

void fill_row_kernels(RowKernels& kernels) { kernels = {map, dot, norm, norm_backward, add_runs}; }

}  // namespace scalegmn::SCALEGMN_ISA

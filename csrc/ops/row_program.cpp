#include "ops/row_program.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>

#include "cpu/row_program.h"
#include "ops/common.h"
#include "ops/pool.h"
#include "ops/row_program_plan.h"
#include "ops/tile_gemm.h"

namespace scalegmn {
namespace {

constexpr int64_t tile_floats = 448 * 1024;    // of a tile's workspace: what fits a core's L2 cache beside the weights
constexpr int64_t partition_rows = 2048;       // so many pay for a partition's own copy of the parameter gradients
constexpr int64_t most_partitions = 16;        // of a section; a power of two, as their number is: threads share them
constexpr int64_t fewest_rows_to_share = 256;  // from here on two cores have enough to do
constexpr int64_t smallest_row_product = 8;    // width from which a product compiled for its shape pays
constexpr int64_t few_rows = 256;              // so few have a place each, whether they occur or not

class Program : RowProgramPlan {
 public:
  Program(at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
          at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed)
      : RowProgramPlan(tensors, indices, bounds, code, constants, ptr, seed) {
    TORCH_CHECK_VALUE(tensors_[0].is_cpu(), "tensors: expected CPU tensors, got one on ", tensors_[0].device());
    for (Section& section : sections_) {
      check_indices(section);
      for (size_t k = 0; k < section.steps.size(); ++k) {
        if (section.steps[k].op == RowOp::linear) set_weight(section.steps[k], section.operands[k][0]);
      }
    }
    if (ptr) {
      const int64_t* p = ptr_.const_data_ptr<int64_t>();
      TORCH_CHECK_VALUE(p[0] == 0 && p[segments_] == rows_ && std::is_sorted(p, p + segments_ + 1),
                        "ptr: expected a nondecreasing sequence from 0 to ", rows_, ", got one from ", p[0], " to ",
                        p[segments_]);
      args_.ptr = p;
      args_.segments = segments_;
      check_segments();
    }
    args_.tables = tables_.data();
    args_.indices = index_views_.data();
    args_.wide_compute = wide_ == at::kDouble;
    args_.gemm32 = gemms_.gemm32;
    args_.gemm64 = gemms_.gemm64;
    args_.row32 = gemms_.row32;
    args_.row16 = gemms_.row16;
    args_.reduction = reduction_;
    args_.width = width_;
    args_.heads = heads_;
    args_.rows_dtype = scalar_of(at::empty({0}, result_), "tensors");
    if (seed) {
      args_.seed0 = uint32_t(seed_.const_data_ptr<int64_t>()[0]);
      args_.seed1 = uint32_t(seed_.const_data_ptr<int64_t>()[1]);
    }
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward() {
    plan_values(false, false, true);
    finish_plan();
    const bool reduces = width_ >= 0;
    at::Tensor reduced = pooled_empty({reduces ? segments_ : 0, reduces ? reduced_width() : 0}, wide_).zero_();
    at::Tensor rows = pooled_empty({rows_width_ < 0 ? 0 : written_rows_, std::max<int64_t>(rows_width_, 0)}, result_);
    const bool statistics = reduction_ == RowReduction::statistics;
    at::Tensor kept = pooled_empty(kept_sizes(), wide_).zero_();
    at::Tensor extremes = pooled_empty(statistics ? kept_sizes() : std::vector<int64_t>{0}, at::kInt).zero_();
    args_.reduced = reduced.mutable_data_ptr();
    args_.kept = kept.mutable_data_ptr();
    args_.extremes = statistics ? extremes.mutable_data_ptr<int32_t>() : nullptr;
    args_.rows_out = rows.mutable_data_ptr();
    cut();
    const int64_t head_width = reduction_ == RowReduction::sum ? width_ : 0;
    at::Tensor heads = at::zeros({int64_t(partitions_.size()), head_width}, wide_);
    const int64_t element = heads.element_size();
    for (size_t p = 0; p < partitions_.size(); ++p) {
      partitions_[p].head = static_cast<char*>(heads.mutable_data_ptr()) + int64_t(p) * head_width * element;
    }
    run();
    if (reduction_ == RowReduction::sum) wide_ == at::kDouble ? add_heads<double>(reduced) : add_heads<float>(reduced);
    return {pooled_cast(reduced, result_), rows, kept, extremes};
  }

  std::vector<at::Tensor> backward(const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced,
                                   const at::Tensor& kept, const at::Tensor& extremes, const std::vector<bool>& wanted) {
    const auto [grads, rows] = check_gradients(grad_reduced, grad_rows, reduced, kept, extremes, wanted);
    const at::Tensor kept_rows = kept.contiguous();
    args_.kept = const_cast<void*>(kept_rows.const_data_ptr());
    if (reduction_ == RowReduction::statistics) args_.extremes = const_cast<int32_t*>(extremes.const_data_ptr<int32_t>());
    at::Tensor along;
    if (reduction_ == RowReduction::attention) {
      const at::Tensor product = at::mul(grads.to(wide_), reduced.to(wide_));
      along = product.view({segments_, heads_, width_ / heads_}).sum(-1);
      args_.along = along.const_data_ptr();
    }
    args_.grad_reduced = grads.const_data_ptr();
    args_.grad_rows = rows.const_data_ptr();
    args_.backward = true;
    plan_gradients();
    plan_values(true, true, true);
    plan_parameters();
    finish_plan();
    cut();
    return wide_ == at::kDouble ? gradients<double>() : gradients<float>();
  }

 private:
  struct Weight {
    at::Tensor rows, transposed, pairs, pairs_t;
  };

  const TileGemms& gemms_ = tile_gemms();
  std::map<int64_t, Weight> weights_;  // by tensor
  std::vector<RowSection> views_;      // of sections_
  RowProgramArgs args_{};
  std::vector<RowPartition> partitions_;
  int64_t workspace_ = 0;

  int64_t index_value(int index, int64_t row) const { return baseline::index_at(index_views_[index], row); }

  // The least and the largest of entries [begin, end).
  std::pair<int64_t, int64_t> index_range(int index, int64_t begin, int64_t end) const {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = index_value(index, row);
      low = std::min(low, at);
      high = std::max(high, at);
    }
    return {low, high};
  }

  // The rows that an index names in a partition: all from `first` on, or, where they are fewer than half of those, the
  // ones that occur, in order, with the place of each entry's row among them.
  struct IndexRows {
    int64_t first = 0, count = 0;
    std::vector<int32_t> local;
    std::vector<int64_t> occurring;
  };

  IndexRows index_rows(int index, int64_t begin, int64_t end) const {
    const auto [low, high] = index_range(index, begin, end);
    IndexRows found{low, high - low + 1, {}, {}};
    if (found.count <= few_rows) return found;
    std::vector<int32_t> place(size_t(found.count), 0);
    for (int64_t row = begin; row < end; ++row) place[index_value(index, row) - low] = 1;
    if (2 * std::count(place.begin(), place.end(), 1) >= found.count) return found;
    for (int64_t i = 0; i < int64_t(place.size()); ++i) {
      if (place[i] == 0) continue;
      place[i] = int32_t(found.occurring.size());
      found.occurring.push_back(low + i);
    }
    found.local.resize(size_t(end - begin));
    for (int64_t row = begin; row < end; ++row) found.local[row - begin] = place[index_value(index, row) - low];
    found.count = int64_t(found.occurring.size());
    return found;
  }

  // The weight of a linear step, in the forms that its products read.
  void set_weight(RowStep& step, int64_t number) {
    const at::Tensor& given = tensors_[number];
    const auto [found, fresh] = weights_.try_emplace(number);
    Weight& forms = found->second;
    if (fresh) {
      const int64_t n = step.width, k = step.in_width;
      const bool large = wide_ == at::kFloat && n >= smallest_row_product && k >= smallest_row_product;
      if (large && given.scalar_type() == at::kBFloat16 && gemms_.row16 != nullptr && n % 2 == 0 && k % 2 == 0) {
        forms.pairs_t = given.reshape({n, k / 2, 2}).permute({1, 0, 2}).contiguous();
        forms.pairs = given.reshape({n / 2, 2, k}).permute({0, 2, 1}).contiguous();
      } else {
        at::Tensor rows = given.to(wide_);
        const bool packed = rows.stride(1) == 1 && rows.stride(0) >= k;
        const bool by_rows = large && gemms_.row32 != nullptr;
        forms.rows = (by_rows ? rows.is_contiguous() : packed) ? rows : rows.contiguous();
        if (by_rows) forms.transposed = rows.t().contiguous();
      }
    }
    if (forms.pairs.defined()) {
      step.pairs_t = static_cast<const uint16_t*>(forms.pairs_t.const_data_ptr());
      step.pairs = static_cast<const uint16_t*>(forms.pairs.const_data_ptr());
      return;
    }
    step.weight = forms.rows.const_data_ptr();
    step.weight_stride = std::max<int64_t>(forms.rows.stride(0), step.in_width);
    if (forms.transposed.defined()) step.weight_t = forms.transposed.const_data_ptr<float>();
  }

  // Statistics and attention are of whole segments.
  void check_segments() const {
    if (reduction_ == RowReduction::none || reduction_ == RowReduction::sum) return;
    for (const Section& section : sections_) {
      if (section.reduced_step < 0) continue;
      for (const int64_t bound : {section.begin, section.end}) {
        TORCH_CHECK_VALUE(std::binary_search(args_.ptr, args_.ptr + args_.segments + 1, bound),
                          "bounds: expected whole segments, got a section that begins or ends at row ", bound);
      }
    }
  }

  void check_indices(const Section& section) const {
    if (section.begin == section.end) return;
    for (const RowStep& step : section.steps) {
      if (step.table < 0 || step.index < 0 || !step.used) continue;
      const int64_t rows = tables_[step.table].rows;
      const auto [low, high] = index_range(step.index, section.begin, section.end);
      TORCH_CHECK_VALUE(low >= 0 && high < rows, "indices: expected rows in [0, ", rows, "), got ", low, " to ", high);
    }
  }

  // The rows of a tile, and offsets in numbers instead of numbers per row.
  void finish_plan() {
    int64_t widest = 1, scratch = 0, spread = 0;
    for (const Section& section : sections_) {
      widest = std::max<int64_t>(widest, section.slots);
      for (const RowStep& step : section.steps) {
        if (step.op == RowOp::linear && section.steps[step.a].distinct >= 0) spread = std::max(spread, step.width);
        if (step.weight_t != nullptr || step.pairs != nullptr) scratch = std::max({scratch, step.width, step.in_width});
      }
    }
    args_.tile_rows = std::clamp<int64_t>(tile_floats / (widest + spread + scratch) / 16 * 16, 16, most_tile_rows);
    args_.spread = widest * args_.tile_rows;
    args_.scratch = args_.spread + spread * args_.tile_rows;
    workspace_ = args_.scratch + scratch * args_.tile_rows;
    for (Section& section : sections_) {
      for (RowStep& step : section.steps) {
        for (int64_t* offset : {&step.value, &step.aux, &step.stats, &step.distinct, &step.grad}) {
          if (*offset >= 0) *offset *= args_.tile_rows;
        }
      }
      views_.push_back({section.steps.data(), int(section.steps.size()), section.reduced_step, section.rows_step,
                        section.logits_step});
    }
  }

  void cut() {
    for (size_t s = 0; s < sections_.size(); ++s) {
      const Section& section = sections_[s];
      const int64_t rows = section.end - section.begin;
      const bool works = section.reduced_step >= 0 || section.rows_step >= 0;
      if (rows == 0 || !works) continue;
      const int64_t wanted = std::max<int64_t>(rows / partition_rows, rows >= fewest_rows_to_share ? 2 : 1);
      int64_t count = 1;
      while (count < std::min(wanted, most_partitions)) count *= 2;
      int64_t begin = section.begin;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t end = p + 1 == count ? section.end : whole_segments(section, section.begin + rows * (p + 1) / count);
        if (begin < end) partitions_.push_back({&views_[s], begin, end, nullptr, nullptr, nullptr, nullptr});
        begin = end;
      }
    }
  }

  // The row itself, or where its segment ends if segments must not be cut.
  int64_t whole_segments(const Section& section, int64_t row) const {
    if (section.reduced_step < 0 || reduction_ == RowReduction::sum) return row;
    return *std::lower_bound(args_.ptr, args_.ptr + args_.segments + 1, row);
  }

  void run() {
    const auto kernel = SCALEGMN_CPU(row_program_run);
    const int64_t count = int64_t(partitions_.size()), bytes = workspace_ * (wide_ == at::kDouble ? 8 : 4);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
      void* workspace = scratch(bytes);
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t p = next++; p < count; p = next++) {
          RowPartition partition = partitions_[p];
          partition.workspace = workspace;
          kernel(args_, partition);
        }
      }
      if (gemms_.release != nullptr) gemms_.release();
    });
  }

  // The thread's workspace, kept between calls.
  static void* scratch(int64_t bytes) {
    thread_local std::unique_ptr<char[]> buffer;
    thread_local int64_t size = 0;
    if (size < bytes + 64) {
      size = bytes + 64;
      buffer.reset(new char[size]);
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.get()) + 63) / 64 * 64);
  }

  // Sums of segments that go on in later partitions, in the order of the partitions.
  template <class A>
  void add_heads(at::Tensor& sums) {
    const int64_t width = width_;
    A* to = sums.mutable_data_ptr<A>();
    for (size_t p = 0; p < partitions_.size(); ++p) {
      if (partitions_[p].section->reduced_step < 0) continue;
      const int64_t* after = std::upper_bound(args_.ptr, args_.ptr + args_.segments + 1, partitions_[p].begin);
      const int64_t segment = after - args_.ptr - 1;
      if (args_.ptr[segment] == partitions_[p].begin) continue;
      const A* from = static_cast<const A*>(partitions_[p].head);
      for (int64_t i = 0; i < width; ++i) to[segment * width + i] += from[i];
    }
  }

  template <class A>
  std::vector<at::Tensor> gradients() {
    std::vector<at::Tensor> grads(tensors_.size());
    const auto add = [&](int64_t number, at::Tensor grad) {
      if (!grads[number].defined()) {
        grads[number] = std::move(grad);
      } else {
        grads[number].add_(grad);
      }
    };
    // tables read by row number
    for (size_t k = 0; k < tables_.size(); ++k) {
      const auto [number, direct] = table_keys_[k];
      if (!direct || !wanted_[number]) continue;
      at::Tensor grad = pooled_empty({tables_[k].rows, tables_[k].width}, wide_);
      if (!covered(int(k))) grad.zero_();
      tables_[k].grad = grad.mutable_data_ptr();
      add(number, grad);
    }
    // partitions' own places
    std::vector<at::Tensor> blocks(partitions_.size());
    std::vector<std::vector<RowScatter>> scatters(partitions_.size());
    std::vector<std::vector<IndexRows>> reads(partitions_.size());
    at::parallel_for(0, int64_t(partitions_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        RowPartition& partition = partitions_[p];
        const Section& section = section_of(partition);
        std::vector<bool> used(uses_.size(), false);
        for (const RowStep& step : section.steps) {
          if (step.grad >= 0 && step.use >= 0 && wanted_[table_keys_[step.table].first]) used[step.use] = true;
        }
        reads[p].resize(index_views_.size());
        scatters[p].resize(uses_.size());
        int64_t size = section.parameters;
        for (size_t u = 0; u < uses_.size(); ++u) {
          if (!used[u]) continue;
          IndexRows& rows = reads[p][uses_[u].second];
          if (rows.count == 0) rows = index_rows(uses_[u].second, partition.begin, partition.end);
          size += rows.count * tables_[uses_[u].first].width;
        }
        blocks[p] = pooled_empty({size}, wide_);
        A* at = blocks[p].template mutable_data_ptr<A>();
        std::memset(at, 0, size_t(size) * sizeof(A));
        partition.parameters = at;
        at += section.parameters;
        for (size_t u = 0; u < uses_.size(); ++u) {
          if (!used[u]) continue;
          const IndexRows& rows = reads[p][uses_[u].second];
          scatters[p][u] = {at, rows.first, rows.local.empty() ? nullptr : rows.local.data()};
          at += rows.count * tables_[uses_[u].first].width;
        }
        partition.scatters = scatters[p].data();
      }
    });
    run();
    // parameters, over the partitions in order
    for (size_t s = 0; s < sections_.size(); ++s) {
      for (const auto& [number, offset] : sections_[s].parameter_at) {
        std::vector<const A*> from;
        for (const RowPartition& partition : partitions_) {
          if (partition.section == &views_[s]) from.push_back(static_cast<const A*>(partition.parameters) + offset);
        }
        at::Tensor grad = at::empty(tensors_[number].sizes(), wide_);
        A* to = grad.mutable_data_ptr<A>();
        at::parallel_for(0, grad.numel(), 8192, [&](int64_t begin, int64_t end) {
          std::fill(to + begin, to + end, A(0));
          for (const A* block : from) {
            for (int64_t i = begin; i < end; ++i) to[i] += block[i];
          }
        });
        add(number, grad);
      }
    }
    // tables read through an index
    for (size_t k = 0; k < tables_.size(); ++k) {
      const auto [number, direct] = table_keys_[k];
      if (direct || !wanted_[number]) continue;
      const int64_t width = tables_[k].width;
      at::Tensor& grad = grads[number];
      const bool adds = grad.defined();
      if (!adds) grad = pooled_empty({tables_[k].rows, width}, wide_);
      A* to = grad.mutable_data_ptr<A>();
      at::parallel_for(0, tables_[k].rows, 8192 / width + 1, [&](int64_t begin, int64_t end) {
        if (!adds) std::fill(to + begin * width, to + end * width, A(0));
        for (size_t p = 0; p < partitions_.size(); ++p) {
          for (size_t u = 0; u < uses_.size(); ++u) {
            const A* from = static_cast<const A*>(scatters[p][u].to);
            if (uses_[u].first != int(k) || from == nullptr) continue;
            const IndexRows& rows = reads[p][uses_[u].second];
            if (rows.local.empty()) {
              const int64_t low = std::max(begin, rows.first), high = std::min(end, rows.first + rows.count);
              for (int64_t i = 0; i < (high - low) * width; ++i) to[low * width + i] += from[(low - rows.first) * width + i];
              continue;
            }
            const auto low = std::lower_bound(rows.occurring.begin(), rows.occurring.end(), begin);
            for (auto row = low; row != rows.occurring.end() && *row < end; ++row) {
              const A* sum = from + (row - rows.occurring.begin()) * width;
              for (int64_t i = 0; i < width; ++i) to[*row * width + i] += sum[i];
            }
          }
        }
      });
    }
    for (size_t t = 0; t < grads.size(); ++t) {
      if (grads[t].defined()) grads[t] = pooled_cast(grads[t], tensors_[t].scalar_type());
    }
    return finished(std::move(grads));
  }

  const Section& section_of(const RowPartition& partition) const { return sections_[partition.section - views_.data()]; }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_program(
    at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
    at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed) {
  return Program(tensors, indices, bounds, code, constants, ptr, seed).forward();
}

std::vector<at::Tensor> row_program_backward(const at::Tensor& grad_reduced, const at::Tensor& grad_rows,
                                             const at::Tensor& reduced, const at::Tensor& kept,
                                             const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices,
                                             at::IntArrayRef bounds, at::IntArrayRef code, at::ArrayRef<double> constants,
                                             const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& seed,
                                             const std::vector<bool>& wanted) {
  return Program(tensors, indices, bounds, code, constants, ptr, seed)
      .backward(grad_reduced, grad_rows, reduced, kept, extremes, wanted);
}

TORCH_LIBRARY_FRAGMENT(scalegmn_fast_native, m) {
  m.def(
      "row_program(Tensor[] tensors, Tensor[] indices, int[] bounds, int[] code, float[] constants, Tensor? ptr, "
      "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "row_program_backward(Tensor grad_reduced, Tensor grad_rows, Tensor reduced, Tensor kept, Tensor extremes, "
      "Tensor[] tensors, Tensor[] indices, int[] bounds, int[] code, float[] constants, Tensor? ptr, Tensor? seed, "
      "bool[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(scalegmn_fast_native, CPU, m) {
  m.impl("row_program", [](at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds, at::IntArrayRef code,
                           at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
                           const std::optional<at::Tensor>& seed) {
    return row_program(tensors, indices, bounds, code, constants, ptr, seed);
  });
  m.impl("row_program_backward",
         [](const at::Tensor& grad_reduced, const at::Tensor& grad_rows, const at::Tensor& reduced, const at::Tensor& kept,
            const at::Tensor& extremes, at::TensorList tensors, at::TensorList indices, at::IntArrayRef bounds,
            at::IntArrayRef code, at::ArrayRef<double> constants, const std::optional<at::Tensor>& ptr,
            const std::optional<at::Tensor>& seed, const c10::List<bool>& wanted) {
           return row_program_backward(grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, bounds, code,
                                       constants, ptr, seed, std::vector<bool>(wanted.begin(), wanted.end()));
         });
}

}  // namespace scalegmn

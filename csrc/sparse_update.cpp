// ctr::embedding_lookup, and the updates of the rows that a step touched, on CPUs.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "sorted_ids.h"

namespace ctr {
namespace {

Ids ids_of(const Tensor& ids) {
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "ids must be int32 or int64");
  STD_TORCH_CHECK(ids.is_contiguous(), "ids must be contiguous");
  return {ids.const_data_ptr(), ids.numel(), type == ScalarType::Long};
}

// Checks a state tensor that a rule keeps, and gives its memory.
template <class T>
T* state_of(const std::optional<Tensor>& state, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(state.has_value(), name, " is missing, which the rule needs");
  check_shape(*state, shape, name);
  STD_TORCH_CHECK(state->is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(state->mutable_data_ptr());
}

}  // namespace

// For a table just allocated: its rows come in random order, and 4 KB pages then miss the TLB at nearly every row.
void use_huge_pages(Tensor table) { prefer_huge_pages(table); }

int64_t first_bad_id(Tensor ids, int64_t num_rows) {
  const Ids all = ids_of(ids);
  return find_bad(all, num_rows, 0, all.count);
}

// weight [num_rows, dim] of any dtype, ids of any shape [...] -> [..., dim]; widen: of a bf16 table, in fp32.
Tensor embedding_lookup(Tensor weight, Tensor ids, bool widen) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be [num_rows, dim] and contiguous");
  const Ids all = ids_of(ids);
  widen = widen && weight.scalar_type() == ScalarType::BFloat16;
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(weight.size(1));
  Tensor out = new_output(shape, widen ? ScalarType::Float : weight.scalar_type());
  RowLookup args{};
  args.ids = all;
  args.table = static_cast<const char*>(weight.const_data_ptr());
  args.out = static_cast<char*>(out.mutable_data_ptr());
  args.dim = weight.size(1);
  args.bytes = args.dim * static_cast<int64_t>(weight.element_size());
  args.widen = widen;
  args.around = args.bytes % 64 == 0 && !widen && streams(out);
  const KernelTable& kernels = kernels_for(0);
  const int64_t num_rows = weight.size(0);
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, all.count, 512, [&](int64_t first, int64_t last) {
    if (find_bad(all, num_rows, first, last) < 0) kernels.lookup_rows(args, first, last);
    else good = false;
  });
  if (!good) refuse(all, num_rows);
  return out;
}

// The element of an int64 tensor; 0 where there is none.
static int64_t number_of(const std::optional<Tensor>& t, const char* name) {
  if (!t.has_value()) return 0;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == 1, name, " must be one int64 element");
  return *static_cast<const int64_t*>(t->const_data_ptr());
}

// One step of a rule, in place (see ctr_kernels/sparse_update/rule.py): duplicates are summed, then each row is read and
// written once. rule: 0 SGD, 1 rowwise Adagrad, 2 Adagrad, 3 lazy Adam. Decay counts steps where `last` is given. Not used:
// sorted_ids and order, the ids sorted before, and lr_on_device, which are for GPUs.
void sparse_update(Tensor weight, std::optional<Tensor> first, std::optional<Tensor> second, std::optional<Tensor> last,
                   Tensor ids, Tensor rows, std::optional<Tensor> sorted_ids, std::optional<Tensor> order, int64_t rule,
                   double lr, std::optional<Tensor> lr_on_device, double weight_decay, double eps, double beta1,
                   double beta2, std::optional<Tensor> steps, std::optional<Tensor> key) {
  const int64_t step = number_of(steps, "step"), seed = number_of(key, "seed");
  RowUpdate args{};
  args.weight_type = args.state_type = type_of(weight, "weight");
  args.rows_type = type_of(rows, "rows");
  STD_TORCH_CHECK(rule >= 0 && rule <= 3, "rule ", rule, " is none of 0, 1, 2 and 3");
  args.rule = static_cast<RowRule>(rule);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be [num_rows, dim] and contiguous");
  args.num_rows = weight.size(0);
  args.dim = weight.size(1);
  const Ids all = ids_of(ids);
  check_shape(rows, {all.count, args.dim}, "rows");
  STD_TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  STD_TORCH_CHECK(std::isfinite(lr) && lr >= 0.0 && lr * weight_decay < 1.0, "lr ", lr, " with weight_decay ",
                  weight_decay, ": lr must be finite and not negative, and their product below 1");
  double rate = lr;
  if (args.rule == RowRule::lazy_adam) {
    args.first = state_of<void>(first, {args.num_rows, args.dim}, "the first moment");
    args.second = state_of<void>(second, {args.num_rows, args.dim}, "the second moment");
    args.state_type = type_of(*first, "the first moment");
    check_type(*second, first->scalar_type(), "the second moment");
    rate *= std::sqrt(1.0 - std::pow(beta2, step)) / (1.0 - std::pow(beta1, step));
  } else if (args.rule != RowRule::sgd) {
    const bool rowwise = args.rule == RowRule::rowwise_adagrad;
    args.first = rowwise ? state_of<void>(first, {args.num_rows}, "the accumulator")
                         : state_of<void>(first, {args.num_rows, args.dim}, "the accumulator");
    args.state_type = Type::f32;
    STD_TORCH_CHECK(first->scalar_type() == ScalarType::Float, "the accumulator must be float32");
  }
  if (last.has_value()) {
    STD_TORCH_CHECK(last->scalar_type() == ScalarType::Int, "last must be int32");
    args.last = state_of<int32_t>(last, {args.num_rows}, "last");
  }
  if (all.count == 0) return;
  args.weight = weight.mutable_data_ptr();
  args.rows = rows.const_data_ptr();
  args.rate = static_cast<float>(rate);
  args.eps = static_cast<float>(eps);
  args.fresh1 = static_cast<float>(1.0 - beta1);
  args.fresh2 = static_cast<float>(1.0 - beta2);
  args.keep = static_cast<float>(1.0 - lr * weight_decay);
  args.log2_keep = std::log2(1.0 - lr * weight_decay);
  args.step = static_cast<int32_t>(step);
  args.key = static_cast<uint64_t>(seed) + static_cast<uint64_t>(step) * 0x9E3779B97F4A7C15u;
  const SortedIds sorted(all, args.num_rows);
  const KernelTable& kernels = kernels_for(0);
  constexpr int64_t kTask = 2048;
  const int64_t tasks = (all.count + kTask - 1) / kTask;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    const int64_t begin = sorted.run_start(from * kTask);
    const int64_t end = sorted.run_start(std::min(to * kTask, all.count));
    if (begin < end) kernels.update_rows(args, sorted.grouped(begin, end), end - begin);
  });
}

}  // namespace ctr

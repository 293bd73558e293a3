// ctr::low_rank_cross and its backward on CPUs: weights packed once a call, tiles of rows shared among threads.
#include <algorithm>
#include <tuple>
#include <utility>

#include "aligned.h"
#include "tensor_args.h"

namespace ctr {
namespace {

// A matrix [rows, columns] with zeros to [padded_rows, pitch]: itself where it has that size, else a copy, or the
// transposed [columns, rows].
class Padded {
 public:
  Padded(const float* from, int64_t rows, int64_t columns, int64_t padded_rows, int64_t pitch) : data_(from) {
    if (rows == padded_rows && columns == pitch) return;
    copy_ = AlignedFloats::zeros(padded_rows * pitch);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * columns, columns, copy_.data() + r * pitch);
    data_ = copy_.data();
  }
  static Padded transposed(const float* from, int64_t rows, int64_t columns, int64_t padded_rows, int64_t pitch) {
    Padded p;
    p.copy_ = AlignedFloats::zeros(padded_rows * pitch);
    transpose_into(from, rows, columns, columns, p.copy_.data(), pitch);
    p.data_ = p.copy_.data();
    return p;
  }
  const float* data() const { return data_; }

 private:
  Padded() = default;
  const float* data_ = nullptr;
  AlignedFloats copy_;
};

// What both directions need of the inputs: x0, x [B, W], u [R, W], v [W, R], bias [W].
struct Cross {
  CrossArgs args{};
  int64_t rank, tiles;
  const float *u, *v;
  std::vector<Padded> weights;  // the memory that args point to

  Cross(const Tensor& x0, const Tensor& x, const Tensor& u_, const Tensor& v_, const Tensor& bias) {
    STD_TORCH_CHECK(x0.dim() == 2 && u_.dim() == 2, "x0 is [B, W] and u [R, W]");
    const int64_t rows = args.rows = x0.size(0), width = args.width = x0.size(1);
    rank = u_.size(0);
    tiles = (rows + kCrossTile - 1) / kCrossTile;
    args.wp = (width + 15) / 16 * 16;
    args.rp = (rank + 15) / 16 * 16;
    args.x0 = floats(x0, {rows, width}, "x0");
    args.x = floats(x, {rows, width}, "x");
    u = floats(u_, {rank, width}, "u");
    v = floats(v_, {width, rank}, "v");
    args.ut = keep(Padded::transposed(u, rank, width, width, args.rp));
    args.vt = keep(Padded::transposed(v, width, rank, args.rp, args.wp));
    args.bias = keep(Padded(floats(bias, {width}, "bias"), 1, width, 1, args.wp));
  }
  Cross(const Cross&) = delete;

  const float* keep(Padded matrix) {
    weights.push_back(std::move(matrix));
    return weights.back().data();
  }
};

}  // namespace

// -> [B, W]
Tensor low_rank_cross(Tensor x0, Tensor x, Tensor u, Tensor v, Tensor bias) {
  Cross cross(x0, x, u, v, bias);
  Tensor y = new_output({cross.args.rows, cross.args.width}, ScalarType::Float);
  cross.args.y = static_cast<float*>(y.mutable_data_ptr());
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, cross.tiles, 1, [&](int64_t first, int64_t last) {
    kernels.cross_forward(cross.args, first, last);
  });
  return y;
}

// The gradients of all inputs. Those of the weights are summed in tasks whose number does not depend on the threads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_cross_backward(Tensor grad_out, Tensor x0, Tensor x,
                                                                           Tensor u, Tensor v, Tensor bias) {
  constexpr int64_t kTasks = 16;
  Cross cross(x0, x, u, v, bias);
  CrossArgs& args = cross.args;
  args.u = cross.keep(Padded(cross.u, cross.rank, args.width, args.rp, args.wp));
  args.v = cross.keep(Padded(cross.v, args.width, cross.rank, args.width, args.rp));
  args.grad = floats(grad_out, {args.rows, args.width}, "grad_out");
  Tensor grad_x0 = new_output({args.rows, args.width}, ScalarType::Float);
  Tensor grad_x = new_output({args.rows, args.width}, ScalarType::Float);
  args.grad_x0 = static_cast<float*>(grad_x0.mutable_data_ptr());
  args.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  const int64_t tiles = (args.rows + kCrossBackwardTile - 1) / kCrossBackwardTile, tasks = std::min(tiles, kTasks);
  const int64_t matrix = args.width * args.rp, size = 2 * matrix + args.wp;  // of one task's sums
  Tensor sums = new_output({std::max<int64_t>(tasks, 1), size}, ScalarType::Float);
  float* data = static_cast<float*>(sums.mutable_data_ptr());
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float* own = data + task * size;
      kernels.cross_backward(args, CrossGradients{own, own + matrix, own + 2 * matrix}, tiles * task / tasks,
                             tiles * (task + 1) / tasks);
    }
  });
  if (tasks == 0) std::fill_n(data, size, 0.0f);
  torch::stable::parallel_for(0, size, 4096, [&](int64_t first, int64_t last) {
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = first; i < last; ++i) data[i] += data[task * size + i];
  });
  const int64_t rank = cross.rank;
  Tensor grad_u = torch::stable::empty({rank, args.width}, ScalarType::Float);
  Tensor grad_v = torch::stable::empty({args.width, rank}, ScalarType::Float);
  Tensor grad_bias = torch::stable::empty({args.width}, ScalarType::Float);
  transpose_into(data, args.width, rank, args.rp, static_cast<float*>(grad_u.mutable_data_ptr()), args.width);
  float* to = static_cast<float*>(grad_v.mutable_data_ptr());
  for (int64_t c = 0; c < args.width; ++c) std::copy_n(data + matrix + c * args.rp, rank, to + c * rank);
  std::copy_n(data + 2 * matrix, args.width, static_cast<float*>(grad_bias.mutable_data_ptr()));
  return {grad_x0, grad_x, grad_u, grad_v, grad_bias};
}

}  // namespace ctr

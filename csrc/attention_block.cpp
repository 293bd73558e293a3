// ctr::attention_block and its backward on CPUs: the attention half of a transformer layer, norm and residual included.
//
// A few samples at a time go through norm, projection, attention, projection, residual: what one step writes the next
// one reads from the cache. Backward the gradients of q | k | v and of the heads are in memory for those samples only.
#include <algorithm>
#include <tuple>

#include "attention.h"
#include "projection.h"

namespace ctr {
namespace {

constexpr int64_t kTasks = 32;

// Tokens that go through all steps together: of wide ones fewer fit the cache.
constexpr int64_t tokens_at_once(int64_t dim) { return (dim > 128 ? 2 : 3) * kLinearTile; }

// The sizes of a call. `rows`: the queries of a sample, its first tokens; `apart`: q has a projection of its own.
struct Shape {
  int64_t batch, fields, dim, width, rows;
  bool apart;

  Shape(const Tensor& x, const Tensor& w_out, int64_t norm, int64_t queries) {
    STD_TORCH_CHECK(norm == 0 || norm == 1, "norm=", norm, "; 0 and 1 are known here");
    STD_TORCH_CHECK(x.dim() == 3 && w_out.dim() == 2, "x is [B, F, D] and w_out [D, E]");
    batch = x.size(0), fields = x.size(1), dim = x.size(2), width = w_out.size(1);
    STD_TORCH_CHECK(dim >= 1 && width >= 1, "x is [B, F, ", dim, "] and w_out [D, ", width, "]; D and E are at least 1");
    STD_TORCH_CHECK(queries >= 0 && queries <= fields, "queries=", queries, " of ", fields, " tokens");
    apart = queries > 0;
    rows = apart ? queries : fields;
  }
  int64_t keys_width() const { return (apart ? 2 : 3) * width; }  // of the projection of all tokens
};

// Consecutive samples, some hundred tokens together.
struct Part {
  int64_t first, count;
};

struct Parts {
  int64_t batch, at_once, number;

  explicit Parts(const Shape& shape)
      : batch(shape.batch),
        at_once(std::max<int64_t>(1, tokens_at_once(shape.dim) / std::max<int64_t>(1, shape.fields))),
        number((batch + at_once - 1) / at_once) {}
  Part operator[](int64_t i) const { return {i * at_once, std::min(at_once, batch - i * at_once)}; }
};

AttentionArgs attention_of(const Shape& shape, const Tensor& qkv, const Tensor& q, int64_t num_heads, double scale,
                           double dropout_p, const std::optional<Tensor>& seed) {
  const int64_t e = shape.width, keys = shape.apart ? 0 : 1;  // where k begins
  return attention_args(shape.apart ? q : columns_of(qkv, 0, e), columns_of(qkv, keys, e), columns_of(qkv, keys + 1, e),
                        num_heads, scale, dropout_p, seed);
}

// Of the part's samples alone, in q, k, v and out.
AttentionArgs of_part(const AttentionArgs& args, const Part& part) {
  AttentionArgs some = args;
  some.first_sample += part.first;
  some.samples = part.count;
  some.cached = true;
  for (Strided* t : {&some.q, &some.k, &some.v, &some.out})
    if (t->data != nullptr) t->data = static_cast<float*>(t->data) + part.first * t->batch;
  return some;
}

// The first tokens of each sample [count, rows, dim] of x [count, fields, dim].
void gather_rows(const Shape& shape, const float* x, int64_t count, float* to) {
  const int64_t size = shape.rows * shape.dim;
  for (int64_t i = 0; i < count; ++i) std::copy_n(x + i * shape.fields * shape.dim, size, to + i * size);
}

// Adds to those tokens.
void scatter_add_rows(const Shape& shape, const float* from, int64_t count, float* x) {
  const int64_t size = shape.rows * shape.dim;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < size; ++j) x[i * shape.fields * shape.dim + j] += from[i * size + j];
}

float* data_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor empty_floats(std::vector<int64_t> shape) { return torch::stable::empty(shape, ScalarType::Float); }

}  // namespace

// y [B, Q, D]: x[:, :Q] + out(attention) with X = LN(x) or x (norm 1 and 0), the queries of the first Q tokens of X, keys and
// values of all. Backward keeps q | k | v [B, F, 3 E] and the heads' output [B, Q, E]; where `queries` is not 0, k | v
// [B, F, 2 E] and q [B, Q, E]. z is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_block(
    Tensor x, Tensor w_qkv, Tensor b_qkv, Tensor w_out, Tensor b_out, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t num_heads, int64_t queries, double scale,
    double dropout_p, std::optional<Tensor> seed) {
  const Shape shape(x, w_out, norm, queries);
  const int64_t fields = shape.fields, dim = shape.dim, width = shape.width, rows = shape.rows;
  const int64_t keys_width = shape.keys_width();
  const float* from = floats(x, {shape.batch, fields, dim}, "x");
  const float *weights = floats(w_qkv, {3 * width, dim}, "w_qkv"), *biases = floats(b_qkv, {3 * width}, "b_qkv");
  Tensor qkv = new_output({shape.batch, fields, keys_width}, ScalarType::Float);
  Tensor q = shape.apart ? new_output({shape.batch, rows, width}, ScalarType::Float) : empty_floats({0});
  Tensor heads = new_output({shape.batch, rows, width}, ScalarType::Float);
  Tensor y = new_output({shape.batch, rows, dim}, ScalarType::Float);

  const PaddedNorm normed = norm == 0 ? PaddedNorm() : PaddedNorm(norm_weight, norm_bias, eps, dim);
  const int64_t before = shape.apart ? width : 0;  // rows of w_qkv that are q's alone
  Projection in(dim, keys_width, weights + before * dim, biases + before);
  Projection in_q(dim, before, weights, biases);
  Projection out(width, dim, floats(w_out, {dim, width}, "w_out"), floats(b_out, {dim}, "b_out"));
  in.args.norm = in_q.args.norm = normed.args;
  out.args.around = dim % 16 == 0 && streams(y);
  AttentionArgs attention = attention_of(shape, qkv, q, num_heads, scale, dropout_p, seed);
  attention.out = strided(heads);

  const Parts parts(shape);
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, parts.number, 1, [&](int64_t first, int64_t last) {
    const AlignedFloats gathered(shape.apart ? parts.at_once * rows * dim : 0);
    for (int64_t i = first; i < last; ++i) {
      const Part part = parts[i];
      const int64_t first_row = part.first * rows, row_count = part.count * rows;
      LinearArgs in_part = in.args, out_part = out.args;
      in_part.tokens = part.count * fields;
      in_part.x = from + part.first * fields * dim;
      in_part.y = data_of(qkv) + part.first * fields * keys_width;
      kernels.linear_forward(in_part, 0, in.tiles(in_part.tokens));
      out_part.residual = in_part.x;
      if (shape.apart) {
        gather_rows(shape, in_part.x, part.count, gathered.data());
        LinearArgs q_part = in_q.args;
        q_part.tokens = row_count;
        q_part.x = out_part.residual = gathered.data();
        q_part.y = data_of(q) + first_row * width;
        kernels.linear_forward(q_part, 0, in_q.tiles(row_count));
      }
      kernels.attention_forward(of_part(attention, part), 0, part.count);
      out_part.tokens = row_count;
      out_part.x = data_of(heads) + first_row * width;
      out_part.y = data_of(y) + first_row * dim;
      kernels.linear_forward(out_part, 0, out.tiles(row_count));
    }
  });
  return {y, qkv, q, heads, empty_floats({0})};
}

// Gradients of x, w_qkv, b_qkv, w_out, b_out and the norm [2, D]. Those of the weights are summed in tasks whose number
// does not depend on the threads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    Tensor grad_out, Tensor x, Tensor qkv, Tensor q, Tensor heads, Tensor z, Tensor w_qkv, Tensor w_out,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t num_heads,
    int64_t queries, double scale, double dropout_p, std::optional<Tensor> seed) {
  const Shape shape(x, w_out, norm, queries);
  const int64_t fields = shape.fields, dim = shape.dim, width = shape.width, rows = shape.rows;
  const int64_t keys_width = shape.keys_width();
  const float* from = floats(x, {shape.batch, fields, dim}, "x");
  const float* grad = floats(grad_out, {shape.batch, rows, dim}, "grad_out");
  const float* attended = floats(heads, {shape.batch, rows, width}, "heads");
  const float* weights = floats(w_qkv, {3 * width, dim}, "w_qkv");
  floats(qkv, {shape.batch, fields, keys_width}, "qkv");
  if (shape.apart) floats(q, {shape.batch, rows, width}, "q");
  Tensor grad_x = new_output({shape.batch, fields, dim}, ScalarType::Float);

  const PaddedNorm normed = norm == 0 ? PaddedNorm() : PaddedNorm(norm_weight, norm_bias, eps, dim);
  const int64_t before = shape.apart ? width : 0;
  Projection in(dim, keys_width, weights + before * dim), in_q(dim, before, weights);
  Projection out(width, dim, floats(w_out, {dim, width}, "w_out"));
  in.args.norm = in_q.args.norm = normed.args;
  in.args.around = dim % 16 == 0 && !shape.apart && streams(grad_x);
  const AttentionArgs attention = attention_of(shape, qkv, q, num_heads, scale, dropout_p, seed);

  // Of one task's sums: w_qkv, b_qkv, gamma, beta, w_out, b_out.
  const int64_t in_p = in.args.in_p, width_p = out.args.in_p;
  const int64_t sizes[6] = {3 * width * in_p, padded_width(3 * width), in_p, in_p, dim * width_p, in_p};
  int64_t offsets[7] = {};
  for (int i = 0; i < 6; ++i) offsets[i + 1] = offsets[i] + sizes[i];
  const int64_t size = offsets[6];
  const Parts parts(shape);
  const int64_t tasks = std::min(parts.number, kTasks);
  Tensor sums = new_output({std::max<int64_t>(tasks, 1), size}, ScalarType::Float);
  float* data = data_of(sums);
  if (tasks == 0) std::fill_n(data, size, 0.0f);
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
    const int64_t most = parts.at_once * fields, most_rows = parts.at_once * rows;
    const AlignedFloats grad_heads(most_rows * width), grad_qkv(most * keys_width);
    const AlignedFloats grad_q(shape.apart ? most_rows * width : 0), gathered(shape.apart ? most_rows * dim : 0);
    const AlignedFloats grad_rows(shape.apart ? most_rows * dim : 0);
    for (int64_t task = first_task; task < last_task; ++task) {
      float* own = data + task * size;
      std::fill_n(own, size, 0.0f);
      const LinearGradients q_sums{own, own + offsets[1], own + offsets[2], own + offsets[3]};
      const LinearGradients in_sums{own + before * in_p, own + offsets[1] + before, q_sums.gamma, q_sums.beta};
      const LinearGradients out_sums{own + offsets[4], own + offsets[5], nullptr, nullptr};
      for (int64_t i = parts.number * task / tasks; i < parts.number * (task + 1) / tasks; ++i) {
        const Part part = parts[i];
        const int64_t first_row = part.first * rows, row_count = part.count * rows;
        LinearArgs in_part = in.args, out_part = out.args;
        out_part.tokens = row_count;
        out_part.x = attended + first_row * width;
        out_part.y = const_cast<float*>(grad) + first_row * dim;
        out_part.grad_x = grad_heads.data();
        kernels.linear_backward(out_part, out_sums, 0, out.tiles(row_count));
        AttentionArgs some = of_part(attention, part);
        some.grad_out = {grad_heads.data(), rows * width, width};
        float* const keys = grad_qkv.data() + (shape.apart ? 0 : width);
        some.dq = {shape.apart ? grad_q.data() : grad_qkv.data(), rows * (shape.apart ? width : keys_width),
                   shape.apart ? width : keys_width};
        some.dk = {keys, fields * keys_width, keys_width};
        some.dv = {keys + width, fields * keys_width, keys_width};
        kernels.attention_backward(some, 0, part.count);
        in_part.tokens = part.count * fields;
        in_part.x = from + part.first * fields * dim;
        in_part.y = grad_qkv.data();
        in_part.residual = shape.apart ? nullptr : out_part.y;
        in_part.grad_x = data_of(grad_x) + part.first * fields * dim;
        kernels.linear_backward(in_part, in_sums, 0, in.tiles(in_part.tokens));
        if (!shape.apart) continue;
        gather_rows(shape, in_part.x, part.count, gathered.data());
        LinearArgs q_part = in_q.args;
        q_part.tokens = row_count;
        q_part.x = gathered.data();
        q_part.y = grad_q.data();
        q_part.residual = out_part.y;
        q_part.grad_x = grad_rows.data();
        kernels.linear_backward(q_part, q_sums, 0, in_q.tiles(row_count));
        scatter_add_rows(shape, grad_rows.data(), part.count, in_part.grad_x);
      }
    }
  });
  torch::stable::parallel_for(0, size, 4096, [&](int64_t first, int64_t last) {
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = first; i < last; ++i) data[i] += data[task * size + i];
  });
  // Rows of `columns` out of rows of `pitch`.
  const auto taken = [&](std::vector<int64_t> shape_of, int first, int64_t count, int64_t columns, int64_t pitch) {
    Tensor t = empty_floats(shape_of);
    for (int64_t row = 0; row < count; ++row)
      std::copy_n(data + offsets[first] + row * pitch, columns, data_of(t) + row * columns);
    return t;
  };
  return {grad_x,
          taken({3 * width, dim}, 0, 3 * width, dim, in_p),
          taken({3 * width}, 1, 1, 3 * width, 0),
          taken({dim, width}, 4, dim, width, width_p),
          taken({dim}, 5, 1, dim, 0),
          norm == 0 ? empty_floats({0}) : taken({2, dim}, 2, 2, dim, in_p)};
}

}  // namespace ctr

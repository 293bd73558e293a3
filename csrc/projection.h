// The weights of a linear layer as the kernels read them: fp32, padded with zeros to multiples of 16.
#pragma once
#include "aligned.h"
#include "tensor_args.h"

namespace ctr {

inline int64_t padded_width(int64_t width) { return (width + 15) / 16 * 16; }

inline AlignedFloats padded_vector(const float* from, int64_t width) {
  AlignedFloats to = AlignedFloats::zeros(padded_width(width));
  std::copy_n(from, width, to.data());
  return to;
}

// LayerNorm of rows of `width`, or none; the padded weight and bias live as long as this.
struct PaddedNorm {
  AlignedFloats gamma, beta;
  NormArgs args{nullptr, nullptr, 0.0f};

  PaddedNorm() = default;
  PaddedNorm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, int64_t width) {
    STD_TORCH_CHECK(weight.has_value() && bias.has_value(), "a norm needs a weight and a bias");
    gamma = padded_vector(floats(*weight, {width}, "the norm's weight"), width);
    beta = padded_vector(floats(*bias, {width}, "the norm's bias"), width);
    args = {gamma.data(), beta.data(), static_cast<float>(eps)};
  }
};

// From rows of `in` to rows of `out`; weight [out, in] and bias [out] are rows of the layer's.
struct Projection {
  LinearArgs args{};

  // For the forward kernel.
  Projection(int64_t in, int64_t out, const float* weight, const float* bias) : Projection(in, out) {
    weight_ = args.out == args.out_p ? AlignedFloats(in * out) : AlignedFloats::zeros(in * args.out_p);
    transpose_into(weight, out, in, in, weight_.data(), args.out_p);
    bias_ = padded_vector(bias, out);
    args.weight = weight_.data();
    args.bias = bias_.data();
  }

  // For the backward kernel.
  Projection(int64_t in, int64_t out, const float* weight) : Projection(in, out) {
    args.weight = weight;
    if (in == args.in_p) return;
    weight_ = AlignedFloats::zeros(out * args.in_p);
    for (int64_t row = 0; row < out; ++row) std::copy_n(weight + row * in, in, weight_.data() + row * args.in_p);
    args.weight = weight_.data();
  }

  int64_t tiles(int64_t tokens) const { return (tokens + kLinearTile - 1) / kLinearTile; }

 private:
  Projection(int64_t in, int64_t out) {
    args.in = in;
    args.in_p = padded_width(in);
    args.out = out;
    args.out_p = padded_width(out);
  }
  AlignedFloats weight_, bias_;
};

}  // namespace ctr

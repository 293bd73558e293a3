// GELU (erf and tanh forms), ReLU and SiLU of a vector, with their derivatives.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

struct ValueAndSlope {
  Vec value, slope;
};

// x Phi(x), Phi the normal distribution function: Phi(-a) = exp(-a^2 / 2) g(a) for a = |x|, with a polynomial for
// g that is minimax for the weighted error over [0, 5.5] (2e-8 in exact arithmetic, 5e-8 as computed here).
inline ValueAndSlope gelu(Vec x) {
  const Vec a = vabs(x);
  const Vec bell = exp2_nonpositive(x * x * (-0.5f * kLog2e));
  const Vec t = vmin(splat(5.5f), a);  // NaN for NaN
  Vec g = splat(-3.1554663e-07f);
  g = g * t + 7.708849e-06f;
  g = g * t + -8.477157e-05f;
  g = g * t + 5.6365534e-04f;
  g = g * t + -2.5900975e-03f;
  g = g * t + 9.00386e-03f;
  g = g * t + -2.547183e-02f;
  g = g * t + 6.192394e-02f;
  g = g * t + -1.328058e-01f;
  g = g * t + 2.4997257e-01f;
  g = g * t + -3.989406e-01f;
  g = g * t + 0.5f;
  const Vec tail = bell * g;
  const Vec phi = x > 0.0f ? 1.0f - tail : tail;
  // x phi without a choice: x - x tail for x > 0, -a tail otherwise, and beyond 5.5 both are below 1e-7.
  return {vmax(x, Vec{}) - t * tail, phi + x * bell * 0.3989422804f};
}

struct Sigmoid {
  Vec value, rest;  // rest: 1 - value without cancellation
};

inline Sigmoid sigmoid(Vec x) {
  const Vec small = exp2_nonpositive((x < 0.0f ? x : -x) * kLog2e);
  const Vec inverse = 1.0f / (1.0f + small);
  return {x < 0.0f ? small * inverse : inverse, x < 0.0f ? inverse : small * inverse};
}

// x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3): the same as (x / 2) (1 + tanh(u / 2)).
inline ValueAndSlope gelu_tanh(Vec x) {
  constexpr float kRoot = 2.0f * 0.7978845608f, kCube = 0.044715f;
  const Vec square = x * x;
  const Sigmoid s = sigmoid(x * (kRoot + kRoot * kCube * square));
  return {x * s.value, s.value + x * s.value * s.rest * (kRoot + 3.0f * kRoot * kCube * square)};
}

// x sigmoid(x)
inline ValueAndSlope silu(Vec x) {
  const Sigmoid s = sigmoid(x);
  return {x * s.value, s.value + x * s.value * s.rest};
}

inline ValueAndSlope relu(Vec x) { return {x <= 0.0f ? Vec{} : x, x <= 0.0f ? Vec{} : splat(1.0f)}; }

// The function that is applied to the hidden, or to the half b of a gate.
template <Activation kActivation>
inline ValueAndSlope activate(Vec x) {
  if constexpr (kActivation == Activation::gelu || kActivation == Activation::geglu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::swiglu) return silu(x);
  return relu(x);
}

}  // namespace CTR_ISA
}  // namespace ctr

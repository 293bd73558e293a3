"""LayerNorm of a tile of tokens in Triton, and its gradient: prologue and epilogue of other kernels.

PRE is x + f(LN(x)), POST is LN(x + f(x)), NONE is f(x) for a kernel that computes f.
"""

import triton
import triton.language as tl

NORMS = {None: 0, "pre": 1, "post": 2}
NONE, PRE, POST = (tl.constexpr(i) for i in NORMS.values())


@triton.jit
def row_statistics(x, column, eps, D: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of fp32 rows [BM, DP] over their first D columns: [BM, 1] each."""
    mean = tl.sum(x, axis=1, keep_dims=True) / D
    centred = tl.where((column < D)[None, :], x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / D
    return mean, (1.0 + (variance - variance)) / tl.sqrt(variance + eps)  # NaN, not 0, where the variance overflows


@triton.jit
def vector(pointer, column, D: tl.constexpr):
    """fp32 [1, columns], zero beyond D."""
    return tl.load(pointer + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise_by(x, mean, scale, norm_weight, norm_bias, column, D: tl.constexpr):
    """LN(x) fp32 [BM, columns] of those columns, zero beyond D; mean and scale of whole rows [BM, 1]."""
    return (x.to(tl.float32) - mean) * scale * vector(norm_weight, column, D) + vector(norm_bias, column, D)


@triton.jit
def normalise(x, norm_weight, norm_bias, column, eps, D: tl.constexpr):
    """LN(x) fp32 [BM, DP] (Ba et al. 2016, eq. 4), zero beyond D."""
    x = x.to(tl.float32)
    mean, scale = row_statistics(x, column, eps, D)
    return normalise_by(x, mean, scale, norm_weight, norm_bias, column, D)


@triton.jit
def normalise_backward(x, dy, norm_weight, column, eps, D: tl.constexpr):
    """Gradient of x [BM, DP], and sums over rows [DP] for the gradients of norm_weight and norm_bias.

    With h = (x - mean) s and g = dy norm_weight: dx = s (g - mean(g) - h mean(g h)).
    """
    mean, scale = row_statistics(x, column, eps, D)
    unit = tl.where((column < D)[None, :], (x - mean) * scale, 0.0)
    g = dy * vector(norm_weight, column, D)
    dx = scale * (g - tl.sum(g, axis=1, keep_dims=True) / D - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / D))
    return dx, tl.sum(dy * unit, axis=0), tl.sum(dy, axis=0)

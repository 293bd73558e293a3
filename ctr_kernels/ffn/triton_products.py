"""Parts of the feed-forward network's Triton kernels: activations, slices of weights, products over D."""

import triton
import triton.language as tl

from ..triton_norm import PRE, normalise_by
from ..triton_support import dot, dropout_multipliers, exp2_flushed, operand, product, turned


@triton.jit
def _curve(a, CURVE: tl.constexpr, HALF: tl.constexpr):
    """Value and slope of GELU (erf), GELU (tanh), ReLU or SiLU, by number; HALF: they are rounded to fp16 or bf16.

    GELU is x Phi(x), Phi the normal distribution function: Phi(-t) = exp(-t^2 / 2) g(t) for t = |x|, with a polynomial
    for g that is minimax over [0, 5.5]: for the weighted error (5e-8 as computed), or where HALF for the relative one
    (1.9e-4, less than half a last place of fp16).
    """
    if CURVE == 0:
        bell = exp2_flushed(a * a * -0.7213475204)  # exp(-a^2 / 2)
        t = tl.minimum(tl.abs(a), 5.5)
        if HALF:
            g = t * 3.8993822e-06 - 1.066369e-04
            g = g * t + 1.2605457e-03
            g = g * t - 8.5135849e-03
            g = g * t + 3.6828331e-02
            g = g * t - 1.09577e-01
            g = g * t + 2.3821843e-01
            g = g * t - 3.9645551e-01
            g = g * t + 4.9990437e-01
        else:
            g = t * -3.1554663e-07 + 7.708849e-06
            g = g * t - 8.477157e-05
            g = g * t + 5.6365534e-04
            g = g * t - 2.5900975e-03
            g = g * t + 9.00386e-03
            g = g * t - 2.547183e-02
            g = g * t + 6.192394e-02
            g = g * t - 1.328058e-01
            g = g * t + 2.4997257e-01
            g = g * t - 3.989406e-01
            g = g * t + 0.5
        tail = bell * g
        phi = tl.where(a > 0, 1.0 - tail, tail)
        value = a * phi
        slope = phi + a * bell * 0.3989422804
    elif CURVE == 1:  # (x / 2) (1 + tanh(u)) = x sigmoid(2 u)
        square = a * a
        u = a * (0.7978845608 + 0.0356774081 * square)
        small = exp2_flushed(tl.abs(u) * -2.8853900818)
        inverse = 1.0 / (1.0 + small)
        sigmoid = tl.where(u < 0, small * inverse, inverse)
        rest = tl.where(u < 0, inverse, small * inverse)  # 1 - sigmoid without cancellation
        value = a * sigmoid
        slope = sigmoid + a * sigmoid * rest * (1.5957691216 + 0.2140644488 * square)
    elif CURVE == 2:
        value = tl.where(a <= 0, 0.0, a)
        slope = tl.where(a <= 0, 0.0, 1.0)
    else:
        small = exp2_flushed(tl.abs(a) * -1.4426950409)
        inverse = 1.0 / (1.0 + small)
        sigmoid = tl.where(a < 0, small * inverse, inverse)
        rest = tl.where(a < 0, inverse, small * inverse)  # 1 - sigmoid without cancellation
        value = a * sigmoid
        slope = sigmoid * (1.0 + a * rest)
    return value, slope


@triton.jit
def activate(a, b, ACTIVATION: tl.constexpr, HALF: tl.constexpr):
    """Value of a hidden unit, and its slopes by a and b; ACTIVATION is the index in reference.ACTIVATIONS, HALF as in
    `_curve`.

    Without a gate the value is act(a), and b, whose slope is that of a again, is not read.
    """
    if ACTIVATION < 3:
        value, slope_a = _curve(a, ACTIVATION, HALF)
        slope_b = slope_a
    else:
        curve, slope = _curve(b, 2 if ACTIVATION == 3 else (0 if ACTIVATION == 4 else 3), HALF)
        value, slope_a, slope_b = a * curve, curve, a * slope
    return value, slope_a, slope_b


@triton.jit
def units_of(w1, first, column, HALF: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr):
    """Rows of hidden units first, ..., first + BH - 1 of w1 [HIDDEN, D], contiguous, or of the second half of a gated
    one [2 HIDDEN, D] (HALF = 1): [BH, columns], zero beyond the edges."""
    unit = first + tl.arange(0, BH)
    inside = (unit < HIDDEN)[:, None] & (column < D)[None, :]
    return tl.load(w1 + HALF * HIDDEN * D + (unit[:, None] * D + column[None, :]), mask=inside, other=0.0)


@triton.jit
def bias_of(b1, first, HALF: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr):
    """fp32 [BH] of b1 [HIDDEN] or of its second half."""
    unit = first + tl.arange(0, BH)
    return tl.load(b1 + HALF * HIDDEN + unit, mask=unit < HIDDEN, other=0.0).to(tl.float32)


@triton.jit
def columns_of(w2, first, column, D: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr):
    """Columns of hidden units first, ..., first + BH - 1 of w2 [D, HIDDEN], contiguous: [rows, BH], zero beyond."""
    unit = first + tl.arange(0, BH)
    inside = (unit < HIDDEN)[None, :] & (column < D)[:, None]
    return tl.load(w2 + (column[:, None] * HIDDEN + unit[None, :]), mask=inside, other=0.0)


@triton.jit
def multipliers_of(seed, start, first, limit, inverse_keep, HIDDEN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """Dropout multipliers [BM, BH]; the row of the map is the token, the column the hidden unit."""
    rows = start + tl.arange(0, BM)
    return dropout_multipliers(tl.load(seed), rows, first // 32, (HIDDEN + 31) // 32, limit, inverse_keep, BH // 32)


@triton.jit
def _part(x, start, tokens, column, D: tl.constexpr, BM: tl.constexpr):
    """[BM, columns] of a [tokens, D] tensor from row `start`, zero beyond the edges."""
    row = tl.arange(0, BM)
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    return tl.load(x + start * D + (row[:, None] * D + column[None, :]), mask=inside, other=0.0)


@triton.jit
def first_products(
    rows_x,  # operand of [BM, DP], normalised if PRE; not read where DS < DP
    rows_a, rows_b,  # operands of [BH, DP], the slice's rows of w1, gated of both halves; not read where DS < DP
    x, mean, scale, norm_weight, norm_bias,  # read where DS < DP: the tokens again, and the statistics of PRE [BM, 1]
    w1, b1, start, first, tokens,
    D: tl.constexpr, DP: tl.constexpr, DS: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """A = [LN](X) W1^T + b1 of both halves of w1, fp32 [BM, BH] each; without a gate the second is the first."""
    if DS == DP:
        a = product(rows_x, turned(rows_a), None, PRECISION)
        if GATED:
            b = product(rows_x, turned(rows_b), None, PRECISION)
    else:
        a = tl.zeros((BM, BH), tl.float32)
        b = tl.zeros((BM, BH), tl.float32)
        for base in tl.range(0, D, DS, num_stages=STAGES, disable_licm=True):
            column = base + tl.arange(0, DS)
            part = _part(x, start, tokens, column, D, BM)
            if NORM == PRE:
                part = normalise_by(part, mean, scale, norm_weight, norm_bias, column, D)
            part = part.to(w1.dtype.element_ty)
            a = dot(part, tl.trans(units_of(w1, first, column, 0, D, HIDDEN, BH)), a, PRECISION)
            if GATED:
                b = dot(part, tl.trans(units_of(w1, first, column, 1, D, HIDDEN, BH)), b, PRECISION)
    a += bias_of(b1, first, 0, HIDDEN, BH)[None, :]
    if GATED:
        b += bias_of(b1, first, 1, HIDDEN, BH)[None, :]
    else:
        b = a
    return a, b


@triton.jit
def hidden_gradient(
    rows_dy,  # operand of [BM, DP]; not read where DS < DP
    dy,  # [tokens, D], contiguous; read where DS < DP
    w2, start, first, tokens,
    D: tl.constexpr, DP: tl.constexpr, DS: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """dH = dY W2, fp32 [BM, BH]."""
    if DS == DP:
        return product(rows_dy, operand(columns_of(w2, first, tl.arange(0, DP), D, HIDDEN, BH), PRECISION), None,
                       PRECISION)
    total = tl.zeros((BM, BH), tl.float32)
    for base in tl.range(0, D, DS, num_stages=STAGES, disable_licm=True):
        column = base + tl.arange(0, DS)
        part = _part(dy, start, tokens, column, D, BM).to(w2.dtype.element_ty)
        total = dot(part, columns_of(w2, first, column, D, HIDDEN, BH), total, PRECISION)
    return total

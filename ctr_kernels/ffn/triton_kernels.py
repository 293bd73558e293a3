"""The kernels of the feed-forward network in Triton; triton.py has the formulas, the traffic and the launches."""

import triton
import triton.language as tl

from ..triton_norm import NONE, POST, PRE, normalise, normalise_backward, vector
from ..triton_support import dot, dropout_multipliers


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    """Value and slope of GELU (erf), GELU (tanh) or ReLU: ACTIVATION is the index in reference.ACTIVATIONS.

    GELU is x Phi(x), Phi the normal distribution function: Phi(-t) = exp(-t^2 / 2) g(t) for t = |x|, with a polynomial
    for g that is minimax for the weighted error over [0, 5.5] (5e-8 as computed).
    """
    if ACTIVATION == 0:
        bell = tl.exp2(a * a * -0.7213475204)  # exp(-a^2 / 2)
        t = tl.minimum(tl.abs(a), 5.5)
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
    elif ACTIVATION == 1:  # (x / 2) (1 + tanh(u)) = x sigmoid(2 u)
        square = a * a
        u = a * (0.7978845608 + 0.0356774081 * square)
        small = tl.exp2(tl.abs(u) * -2.8853900818)
        inverse = 1.0 / (1.0 + small)
        sigmoid = tl.where(u < 0, small * inverse, inverse)
        rest = tl.where(u < 0, inverse, small * inverse)  # 1 - sigmoid without cancellation
        value = a * sigmoid
        slope = sigmoid + a * sigmoid * rest * (1.5957691216 + 0.2140644488 * square)
    else:
        value = tl.where(a <= 0, 0.0, a)
        slope = tl.where(a <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def _slice(
    w1,  # [HIDDEN, D], contiguous
    b1,  # [HIDDEN]
    w2,  # [D, HIDDEN], contiguous
    first, D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr,
):
    """Hidden units first, ..., first + BH - 1: w1 [BH, DP], b1 fp32 [BH], w2 [DP, BH]; zero beyond the edges."""
    unit, column = first + tl.arange(0, BH), tl.arange(0, DP)
    here, there = unit < HIDDEN, column < D
    tile_w1 = tl.load(w1 + (unit[:, None] * D + column[None, :]), mask=here[:, None] & there[None, :], other=0.0)
    tile_w2 = tl.load(w2 + (column[:, None] * HIDDEN + unit[None, :]), mask=here[None, :] & there[:, None], other=0.0)
    return tile_w1, tl.load(b1 + unit, mask=here, other=0.0).to(tl.float32), tile_w2


@triton.jit
def _multipliers(seed, start, first, limit, inverse_keep, HIDDEN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """Dropout multipliers [BM, BH]; the row of the map is the token, the column the hidden unit."""
    rows = start + tl.arange(0, BM)
    return dropout_multipliers(tl.load(seed), rows, first // 32, (HIDDEN + 31) // 32, limit, inverse_keep, BH // 32)


@triton.jit
def forward_kernel(
    x,  # [tokens, D], contiguous
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    b2,  # [D]
    norm_weight, norm_bias,  # [D] each; None without a norm
    seed,  # int64 [1]; None without DROPOUT
    y,  # [tokens, D], contiguous
    z,  # [tokens, D], contiguous: x + ffn(x) of POST
    tokens, eps, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """One tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    offsets = row[:, None] * D + column[None, :]
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
    if NORM == PRE:
        tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
    tile_x = tile_x.to(w1.dtype.element_ty)
    total = tl.zeros((BM, DP), tl.float32)
    for first in tl.range(0, HIDDEN, BH, num_stages=STAGES):
        tile_w1, tile_b1, tile_w2 = _slice(w1, b1, w2, first, D, DP, HIDDEN, BH)
        a = dot(tile_x, tl.trans(tile_w1), None, PRECISION) + tile_b1[None, :]
        hidden, _ = _activate(a, ACTIVATION)
        if DROPOUT:
            hidden *= _multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        total = dot(hidden.to(tile_x.dtype), tl.trans(tile_w2), total, PRECISION)
    total += vector(b2, column, D)
    if NORM != NONE:  # x again, from the cache: it would fill a quarter of the registers through the loop
        total += tl.load(x + start * D + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if NORM == POST:
        tl.store(z + start * D + offsets, total.to(z.dtype.element_ty), mask=inside)
        total = normalise(total, norm_weight, norm_bias, column, eps, D)
    tl.store(y + start * D + offsets, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def token_kernel(
    dy, x,  # [tokens, D], contiguous
    z,  # [tokens, D], contiguous, as the forward wrote it; None unless POST
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    norm_weight, norm_bias,  # [D] each; None without a norm
    seed,  # int64 [1]; None without DROPOUT
    dx,  # [tokens, D], contiguous
    dz,  # [tokens, D], contiguous: gradient of z; None unless POST
    partial,  # fp32 [tiles, 2, D]: sums for the gradients of norm_weight and norm_bias; None without a norm
    tokens, eps, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """dX of one tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    offsets = row[:, None] * D + column[None, :]
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
    tile_dy = tl.load(dy + start * D + offsets, mask=inside, other=0.0)
    if NORM == PRE:
        tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
    if NORM == POST:
        tile_z = tl.load(z + start * D + offsets, mask=inside, other=0.0).to(tl.float32)
        tile_dy, sum_weight, sum_bias = normalise_backward(tile_z, tile_dy.to(tl.float32), norm_weight, column, eps, D)
        tl.store(dz + start * D + offsets, tile_dy.to(dz.dtype.element_ty), mask=inside)
    tile_x, tile_dy = tile_x.to(w1.dtype.element_ty), tile_dy.to(w1.dtype.element_ty)
    total = tl.zeros((BM, DP), tl.float32)
    for first in tl.range(0, HIDDEN, BH, num_stages=STAGES):
        tile_w1, tile_b1, tile_w2 = _slice(w1, b1, w2, first, D, DP, HIDDEN, BH)
        a = dot(tile_x, tl.trans(tile_w1), None, PRECISION) + tile_b1[None, :]
        _, slope = _activate(a, ACTIVATION)
        if DROPOUT:
            slope *= _multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        da = dot(tile_dy, tile_w2, None, PRECISION) * slope
        total = dot(da.to(tile_x.dtype), tile_w1, total, PRECISION)
    if NORM == PRE:  # x and dy again, from the cache
        tile = tl.load(x + start * D + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total, sum_weight, sum_bias = normalise_backward(tile, total, norm_weight, column, eps, D)
        total += tl.load(dy + start * D + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if NORM == POST:
        tl.debug_barrier()  # dz again: other threads of the program have written what this one reads
        total += tl.load(dz + start * D + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if NORM != NONE:
        partial += tl.program_id(0).to(tl.int64) * (2 * D) + column
        tl.store(partial, sum_weight, mask=column < D)
        tl.store(partial + D, sum_bias, mask=column < D)
    tl.store(dx + start * D + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    dy, x,  # [tokens, D], contiguous; dy is the gradient of z for POST
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    norm_weight, norm_bias,  # [D] each; None without a norm
    seed,  # int64 [1]; None without DROPOUT
    partial,  # fp32 [programs a slice, HIDDEN D + D HIDDEN + HIDDEN + D]: dW1, dW2, db1, db2
    tokens, eps, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr, LAYERS: tl.constexpr,
):
    """The sums of one slice of hidden units over every so-manieth tile of tokens; slice 0 also sums db2.

    LAYERS: 1 sums dW1 and db1, 2 sums dW2 and db2, 3 both.
    """
    SLICES: tl.constexpr = (HIDDEN + BH - 1) // BH
    part, first = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BH
    row, column, unit = tl.arange(0, BM), tl.arange(0, DP), first + tl.arange(0, BH)
    offsets = row[:, None] * D + column[None, :]
    tile_w1, tile_b1, tile_w2 = _slice(w1, b1, w2, first, D, DP, HIDDEN, BH)
    tile_w2 = tl.trans(tile_w2)
    dw1 = tl.zeros((BH, DP), tl.float32)
    dw2 = tl.zeros((BH, DP), tl.float32)  # transposed
    db1 = tl.zeros((BH,), tl.float32)
    db2 = tl.zeros((DP,), tl.float32)
    for tile in tl.range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // SLICES, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BM
        inside = (row < tokens - start)[:, None] & (column < D)[None, :]
        tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
        tile_dy = tl.load(dy + start * D + offsets, mask=inside, other=0.0).to(w1.dtype.element_ty)
        if NORM == PRE:
            tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
        tile_x = tile_x.to(w1.dtype.element_ty)
        a = dot(tile_w1, tl.trans(tile_x), None, PRECISION) + tile_b1[:, None]  # [BH, BM]
        hidden, slope = _activate(a, ACTIVATION)
        if DROPOUT:
            kept = tl.trans(_multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH))
            hidden *= kept
            slope *= kept
        if LAYERS & 1:
            da = dot(tile_w2, tl.trans(tile_dy), None, PRECISION) * slope
            db1 += tl.sum(da, axis=1)
            dw1 = dot(da.to(tile_x.dtype), tile_x, dw1, PRECISION)
        if LAYERS & 2:
            dw2 = dot(hidden.to(tile_x.dtype), tile_dy, dw2, PRECISION)
            if first == 0:
                db2 += tl.sum(tile_dy.to(tl.float32), axis=0)
    partial += part.to(tl.int64) * (2 * D * HIDDEN + HIDDEN + D)
    inside = (unit < HIDDEN)[:, None] & (column < D)[None, :]
    if LAYERS & 1:
        tl.store(partial + (unit[:, None] * D + column[None, :]), dw1, mask=inside)
        tl.store(partial + 2 * D * HIDDEN + unit, db1, mask=unit < HIDDEN)
    if LAYERS & 2:
        tl.store(partial + D * HIDDEN + (column[None, :] * HIDDEN + unit[:, None]), dw2, mask=inside)
        tl.store(partial + 2 * D * HIDDEN + HIDDEN + column, db2, mask=(column < D) & (first == 0))

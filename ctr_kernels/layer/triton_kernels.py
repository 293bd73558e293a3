"""A linear layer in Triton with LayerNorm in front or behind and a residual sum; triton.py has traffic and launches."""

import triton
import triton.language as tl

from ..triton_norm import POST, PRE, normalise, normalise_backward, vector
from ..triton_support import dot


@triton.jit
def _rows(weight, first, column, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Rows first, ..., first + BN - 1 of a weight [N, D], contiguous: [BN, DP], zero beyond the edges."""
    unit = first + tl.arange(0, BN)
    return tl.load(weight + (unit[:, None] * D + column[None, :]), mask=(unit < N)[:, None] & (column < D)[None, :],
                   other=0.0)


@triton.jit
def forward_kernel(
    x,  # [tokens, D], contiguous
    weight, bias,  # [N, D], [N], contiguous
    residual,  # [tokens, N], contiguous; None without one
    norm_weight, norm_bias,  # of PRE [D], of POST [N]; None without a norm
    y,  # [tokens, N], contiguous
    z,  # [tokens, N], contiguous: the sum that POST normalises; None unless POST
    tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """y = [LN](x) W^T + b [+ residual], or LN of that: one tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    there = row < tokens - start
    tile_x = tl.load(x + start * D + row[:, None] * D + column[None, :], mask=there[:, None] & (column < D)[None, :],
                     other=0.0)
    if NORM == PRE:
        tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
    tile_x = tile_x.to(weight.dtype.element_ty)
    for first in range(0, N, BN):
        unit = first + tl.arange(0, BN)
        offsets, inside = row[:, None] * N + unit[None, :], there[:, None] & (unit < N)[None, :]
        total = dot(tile_x, tl.trans(_rows(weight, first, column, D, N, BN)), None, PRECISION) + vector(bias, unit, N)
        if residual is not None:
            total += tl.load(residual + start * N + offsets, mask=inside, other=0.0).to(tl.float32)
        if NORM == POST:  # BN >= N: the whole row is here
            tl.store(z + start * N + offsets, total.to(z.dtype.element_ty), mask=inside)
            total = normalise(total, norm_weight, norm_bias, unit, eps, N)
        tl.store(y + start * N + offsets, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def token_kernel(
    dy,  # [tokens, N], contiguous
    inner,  # [tokens, D or N], contiguous: what the norm took, x of PRE and z of POST; None without a norm
    residual,  # [tokens, D], contiguous: a gradient to add; None without one
    weight,  # [N, D], contiguous
    norm_weight,  # of PRE [D], of POST [N]; None without a norm
    dx,  # [tokens, D], contiguous
    dz,  # [tokens, N], contiguous: the gradient of z; None unless POST
    partial,  # fp32 [tiles, 2, D or N]: sums for the gradients of norm_weight and norm_bias; None without a norm
    tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """dX of one tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    there = row < tokens - start
    total = tl.zeros((BM, DP), tl.float32)
    for first in range(0, N, BN):
        unit = first + tl.arange(0, BN)
        offsets, inside = row[:, None] * N + unit[None, :], there[:, None] & (unit < N)[None, :]
        tile_dy = tl.load(dy + start * N + offsets, mask=inside, other=0.0)
        if NORM == POST:  # BN >= N: the whole row is here
            tile_z = tl.load(inner + start * N + offsets, mask=inside, other=0.0).to(tl.float32)
            tile_dy = tile_dy.to(tl.float32)
            tile_dy, sum_weight, sum_bias = normalise_backward(tile_z, tile_dy, norm_weight, unit, eps, N)
            tl.store(dz + start * N + offsets, tile_dy.to(dz.dtype.element_ty), mask=inside)
            sums = partial + tl.program_id(0).to(tl.int64) * (2 * N) + unit
            tl.store(sums, sum_weight, mask=unit < N)
            tl.store(sums + N, sum_bias, mask=unit < N)
        total = dot(tile_dy.to(weight.dtype.element_ty), _rows(weight, first, column, D, N, BN), total, PRECISION)
    offsets, inside = row[:, None] * D + column[None, :], there[:, None] & (column < D)[None, :]
    if NORM == PRE:
        tile_x = tl.load(inner + start * D + offsets, mask=inside, other=0.0).to(tl.float32)
        total, sum_weight, sum_bias = normalise_backward(tile_x, total, norm_weight, column, eps, D)
        sums = partial + tl.program_id(0).to(tl.int64) * (2 * D) + column
        tl.store(sums, sum_weight, mask=column < D)
        tl.store(sums + D, sum_bias, mask=column < D)
    if residual is not None:
        total += tl.load(residual + start * D + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + start * D + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    dy, x,  # [tokens, N], [tokens, D], contiguous
    weight,  # [N, D], not read: the product is computed in its dtype
    norm_weight, norm_bias,  # [D] each; None unless PRE
    partial,  # fp32 [programs a slice, N D + N]: dW, db
    tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """The sums of one slice of BN outputs over every so-manieth tile of tokens."""
    SLICES: tl.constexpr = (N + BN - 1) // BN
    part, first = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BN
    row, column, unit = tl.arange(0, BM), tl.arange(0, DP), first + tl.arange(0, BN)
    dw = tl.zeros((BN, DP), tl.float32)
    db = tl.zeros((BN,), tl.float32)
    for tile in range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // SLICES):
        start = tl.cast(tile, tl.int64) * BM
        there = row < tokens - start
        tile_dy = tl.load(dy + start * N + row[:, None] * N + unit[None, :], mask=there[:, None] & (unit < N)[None, :],
                          other=0.0)
        tile_x = tl.load(x + start * D + row[:, None] * D + column[None, :],
                         mask=there[:, None] & (column < D)[None, :], other=0.0)
        if NORM == PRE:
            tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
        db += tl.sum(tile_dy.to(tl.float32), axis=0)
        dw = dot(tl.trans(tile_dy.to(weight.dtype.element_ty)), tile_x.to(weight.dtype.element_ty), dw, PRECISION)
    partial += part.to(tl.int64) * (N * D + N)
    tl.store(partial + (unit[:, None] * D + column[None, :]), dw, mask=(unit < N)[:, None] & (column < D)[None, :])
    tl.store(partial + N * D + unit, db, mask=unit < N)

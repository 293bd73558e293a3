"""A linear layer in Triton with LayerNorm in front or behind and a residual sum; triton.py has traffic and launches.

QUERIES > 0: some of the tensors have the first QUERIES tokens of each sample alone, others all FIELDS of them.
"""

import triton
import triton.language as tl

from ..triton_norm import POST, PRE, normalise, normalise_backward, normalise_by, row_statistics, vector
from ..triton_support import dot, operand, product, turned


@triton.jit
def _rows(weight, first, column, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Rows first, ..., first + BN - 1 of a weight [N, D], contiguous: [BN, columns], zero beyond the edges."""
    unit = first + tl.arange(0, BN)
    return tl.load(weight + (unit[:, None] * D + column[None, :]), mask=(unit < N)[:, None] & (column < D)[None, :],
                   other=0.0)


@triton.jit
def _pointers(x, start, row, column, WIDTH: tl.constexpr, QUERIES: tl.constexpr, FIELDS: tl.constexpr):
    """[BM, columns] into x [tokens, WIDTH]: of rows from `start`, or where QUERIES > 0 of such rows of the queries, x
    having those of all tokens."""
    if QUERIES > 0:
        query = start + row
        token = query // QUERIES * FIELDS + query % QUERIES
        return x + (token[:, None] * WIDTH + column[None, :])
    return x + start * WIDTH + row[:, None] * WIDTH + column[None, :]  # only the first sum is 64 bits wide


@triton.jit
def _of_queries(x, start, row, column, tokens, WIDTH: tl.constexpr, QUERIES: tl.constexpr, FIELDS: tl.constexpr):
    """fp32 [BM, columns] of a tensor of all tokens' rows or, where QUERIES > 0, of the queries' rows alone; 0 for
    the others."""
    token = start + row
    inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    if QUERIES > 0:
        inside &= (token % FIELDS < QUERIES)[:, None]
        token = token // FIELDS * QUERIES + token % FIELDS
        return tl.load(x + (token[:, None] * WIDTH + column[None, :]), mask=inside, other=0.0).to(tl.float32)
    return tl.load(x + start * WIDTH + (row[:, None] * WIDTH + column[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x,  # [tokens, D], contiguous; QUERIES > 0 and no residual: tokens are the queries among all of x
    weight, bias,  # [N, D], [N], contiguous
    residual,  # [tokens, N], contiguous; None without one; QUERIES > 0: tokens are the queries among all of it
    norm_weight, norm_bias,  # of PRE [D], of POST [N]; None without a norm
    y,  # [tokens, N], contiguous
    z,  # [tokens, N], contiguous: the sum that POST normalises; None unless POST
    tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, FIELDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = [LN](x) W^T + b [+ residual], or LN of that: one tile of BM tokens, with DS columns of x at a time."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    there = row < tokens - start
    PICKED: tl.constexpr = QUERIES if residual is None else 0
    tile_x, mean, scale = 0, 0, 0
    if DS == DP or NORM == PRE:
        tile_x = tl.load(_pointers(x, start, row, column, D, PICKED, FIELDS),
                         mask=there[:, None] & (column < D)[None, :], other=0.0)
        if NORM == PRE:
            if DS == DP:
                tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
            else:
                mean, scale = row_statistics(tile_x.to(tl.float32), column, eps, D)
        tile_x = tile_x.to(weight.dtype.element_ty)
    if DS == DP:
        rows_x = operand(tile_x, PRECISION)
    for first in tl.range(0, N, BN, num_stages=STAGES):
        unit = first + tl.arange(0, BN)
        inside = there[:, None] & (unit < N)[None, :]
        if DS == DP:
            rows_w = operand(_rows(weight, first, column, D, N, BN), PRECISION)
            total = product(rows_x, turned(rows_w), None, PRECISION)
        else:
            total = tl.zeros((BM, BN), tl.float32)
            for base in tl.range(0, D, DS):
                part_column = base + tl.arange(0, DS)
                part = tl.load(_pointers(x, start, row, part_column, D, PICKED, FIELDS),
                               mask=there[:, None] & (part_column < D)[None, :], other=0.0)
                if NORM == PRE:
                    part = normalise_by(part, mean, scale, norm_weight, norm_bias, part_column, D)
                total = dot(part.to(weight.dtype.element_ty), tl.trans(_rows(weight, first, part_column, D, N, BN)),
                            total, PRECISION)
        total += vector(bias, unit, N)
        if residual is not None:
            total += tl.load(_pointers(residual, start, row, unit, N, QUERIES, FIELDS), mask=inside,
                             other=0.0).to(tl.float32)
        offsets = row[:, None] * N + unit[None, :]
        if NORM == POST:  # BN >= N: the whole row is here
            tl.store(z + start * N + offsets, total.to(z.dtype.element_ty), mask=inside)
            total = normalise(total, norm_weight, norm_bias, unit, eps, N)
        tl.store(y + start * N + offsets, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def token_kernel(
    dy,  # [tokens, N], contiguous
    inner,  # [tokens, D or N], contiguous: what the norm took, x of PRE and z of POST; None without a norm
    extra,  # [queries, D], contiguous: what to add to dy W; None without QUERIES
    residual,  # [tokens or queries, D], contiguous: a gradient to add; None without one
    weight,  # [N, D], contiguous
    norm_weight,  # of PRE [D], of POST [N]; None without a norm
    dx,  # [tokens, D], contiguous
    dz,  # [tokens, N], contiguous: the gradient of z; None unless POST
    partial,  # fp32 [tiles, 2, D or N]: sums for the gradients of norm_weight and norm_bias; None without a norm
    tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, FIELDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dX of one tile of BM tokens. NP: N rounded up to a power of two, BN at least."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    there = row < tokens - start
    source = dy
    if NORM == POST:
        output = tl.arange(0, NP)
        output_offsets, output_inside = row[:, None] * N + output[None, :], there[:, None] & (output < N)[None, :]
        tile_z = tl.load(inner + start * N + output_offsets, mask=output_inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + start * N + output_offsets, mask=output_inside, other=0.0).to(tl.float32)
        grad, sum_weight, sum_bias = normalise_backward(tile_z, grad, norm_weight, output, eps, N)
        tl.store(dz + start * N + output_offsets, grad.to(dz.dtype.element_ty), mask=output_inside)
        sums = partial + tl.program_id(0).to(tl.int64) * (2 * N) + output
        tl.store(sums, sum_weight, mask=output < N)
        tl.store(sums + N, sum_bias, mask=output < N)
        source = dz
        if BN < NP:
            tl.debug_barrier()  # dz again: other threads of the program have written what this one reads
    offsets, inside = row[:, None] * D + column[None, :], there[:, None] & (column < D)[None, :]
    EARLY: tl.constexpr = DP <= 64 and PRECISION != "fp16x3"  # what the end needs is in flight during the products
    tile_x, tile_residual = 0.0, 0.0
    if EARLY and NORM == PRE:
        tile_x = tl.load(inner + start * D + offsets, mask=inside, other=0.0)
    if EARLY and residual is not None:
        tile_residual = _of_queries(residual, start, row, column, tokens, D, QUERIES, FIELDS)
    total = tl.zeros((BM, DP), tl.float32)
    for first in tl.range(0, N, BN, num_stages=STAGES):
        unit = first + tl.arange(0, BN)
        if NORM == POST and BN == NP:
            tile_dy = grad
        else:
            tile_dy = tl.load(source + start * N + (row[:, None] * N + unit[None, :]),
                              mask=there[:, None] & (unit < N)[None, :], other=0.0)
        total = dot(tile_dy.to(weight.dtype.element_ty), _rows(weight, first, column, D, N, BN), total, PRECISION)
    if extra is not None:
        total += _of_queries(extra, start, row, column, tokens, D, QUERIES, FIELDS)
    if NORM == PRE:
        if not EARLY:
            tile_x = tl.load(inner + start * D + offsets, mask=inside, other=0.0)
        total, sum_weight, sum_bias = normalise_backward(tile_x.to(tl.float32), total, norm_weight, column, eps, D)
        sums = partial + tl.program_id(0).to(tl.int64) * (2 * D) + column
        tl.store(sums, sum_weight, mask=column < D)
        tl.store(sums + D, sum_bias, mask=column < D)
    if residual is not None:
        if not EARLY:
            tile_residual = _of_queries(residual, start, row, column, tokens, D, QUERIES, FIELDS)
        total += tile_residual
    tl.store(dx + start * D + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    dy,  # [tokens, N], contiguous
    x,  # [tokens, D], contiguous; QUERIES > 0: tokens are the queries among all of x
    weight,  # [N, D], not read: the product is computed in its dtype
    norm_weight, norm_bias,  # [D] each; None unless PRE
    partial,  # fp32 [programs a slice, N D + N]: dW, db
    tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, FIELDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums of one slice of BN outputs over a share of the tiles of tokens."""
    SLICES: tl.constexpr = (N + BN - 1) // BN
    part, first = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BN
    row, column, unit = tl.arange(0, BM), tl.arange(0, DP), first + tl.arange(0, BN)
    dw = tl.zeros((BN, DP), tl.float32)
    db = tl.zeros((BN,), tl.float32)
    for tile in tl.range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // SLICES, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BM
        there = row < tokens - start
        tile_dy = tl.load(dy + start * N + row[:, None] * N + unit[None, :], mask=there[:, None] & (unit < N)[None, :],
                          other=0.0)
        tile_x = tl.load(_pointers(x, start, row, column, D, QUERIES, FIELDS),
                         mask=there[:, None] & (column < D)[None, :], other=0.0)
        if NORM == PRE:
            tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
        db += tl.sum(tile_dy.to(tl.float32), axis=0)
        dw = dot(tl.trans(tile_dy.to(weight.dtype.element_ty)), tile_x.to(weight.dtype.element_ty), dw, PRECISION)
    partial += part.to(tl.int64) * (N * D + N)
    tl.store(partial + (unit[:, None] * D + column[None, :]), dw, mask=(unit < N)[:, None] & (column < D)[None, :])
    tl.store(partial + N * D + unit, db, mask=unit < N)

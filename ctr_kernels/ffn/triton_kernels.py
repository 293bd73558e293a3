"""The kernels of the feed-forward network in Triton; triton.py has the formulas, the traffic and the launches."""

import triton
import triton.language as tl

from ..triton_norm import NONE, POST, PRE, normalise, normalise_backward, row_statistics, vector
from ..triton_support import dot, operand, product, turned
from .triton_products import (
    activate,
    bias_of,
    columns_of,
    first_products,
    hidden_gradient,
    multipliers_of,
    units_of,
)


@triton.jit
def forward_kernel(
    x,  # [tokens, D], contiguous
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], gated of both halves; [D, HIDDEN]; contiguous
    b2,  # [D]
    norm_weight, norm_bias,  # [D] each; None without a norm
    seed,  # int64 [1]; None without DROPOUT
    y,  # [tokens, D], contiguous
    z,  # [tokens, D], contiguous: x + ffn(x) of POST
    tokens, eps, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, DS: tl.constexpr, STAGES: tl.constexpr,
):
    """One tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    offsets = row[:, None] * D + column[None, :]
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    tile_x, mean, scale = 0, 0, 0
    if DS == DP or NORM == PRE:
        tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
        if NORM == PRE:
            if DS == DP:
                tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
            else:
                mean, scale = row_statistics(tile_x.to(tl.float32), column, eps, D)
        tile_x = tile_x.to(w1.dtype.element_ty)
    total = tl.zeros((BM, DP), tl.float32)
    rows_x = 0
    if DS == DP:
        rows_x = operand(tile_x, PRECISION)
    for first in tl.range(0, HIDDEN, BH, num_stages=STAGES if DS == DP else 1, disable_licm=DS < DP):
        rows_a, rows_b = 0, 0
        if DS == DP:
            rows_a = operand(units_of(w1, first, column, 0, D, HIDDEN, BH), PRECISION)
            if ACTIVATION >= 3:
                rows_b = operand(units_of(w1, first, column, 1, D, HIDDEN, BH), PRECISION)
        a, b = first_products(rows_x, rows_a, rows_b, x, mean, scale, norm_weight, norm_bias, w1, b1, start, first,
                              tokens, D, DP, DS, HIDDEN, NORM, ACTIVATION >= 3, PRECISION, BM, BH, STAGES)
        hidden, _, _ = activate(a, b, ACTIVATION, w1.dtype.element_ty != tl.float32)
        if DROPOUT:
            hidden *= multipliers_of(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        tile_w2 = columns_of(w2, first, column, D, HIDDEN, BH)
        total = dot(hidden.to(w1.dtype.element_ty), tl.trans(tile_w2), total, PRECISION)
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
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], gated of both halves; [D, HIDDEN]; contiguous
    norm_weight, norm_bias,  # [D] each; None without a norm
    seed,  # int64 [1]; None without DROPOUT
    dx,  # [tokens, D], contiguous
    dz,  # [tokens, D], contiguous: gradient of z; None unless POST
    partial,  # fp32 [tiles, 2, D]: sums for the gradients of norm_weight and norm_bias; None without a norm
    tokens, eps, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, DS: tl.constexpr, STAGES: tl.constexpr,
):
    """dX of one tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    offsets = row[:, None] * D + column[None, :]
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    tile_x, tile_dy, mean, scale = 0, 0, 0, 0
    source = dy
    if DS == DP or NORM == PRE:
        tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
        if NORM == PRE:
            if DS == DP:
                tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
            else:
                mean, scale = row_statistics(tile_x.to(tl.float32), column, eps, D)
        tile_x = tile_x.to(w1.dtype.element_ty)
    if DS == DP or NORM == POST:
        tile_dy = tl.load(dy + start * D + offsets, mask=inside, other=0.0)
        if NORM == POST:
            tile_z = tl.load(z + start * D + offsets, mask=inside, other=0.0).to(tl.float32)
            tile_dy, sum_weight, sum_bias = normalise_backward(tile_z, tile_dy.to(tl.float32), norm_weight, column,
                                                               eps, D)
            tl.store(dz + start * D + offsets, tile_dy.to(dz.dtype.element_ty), mask=inside)
            source = dz
            if DS < DP:
                tl.debug_barrier()  # dz again: other threads of the program have written what this one reads
        tile_dy = tile_dy.to(w1.dtype.element_ty)
    total = tl.zeros((BM, DP), tl.float32)
    rows_x, rows_dy = 0, 0
    if DS == DP:
        rows_x = operand(tile_x, PRECISION)
        rows_dy = operand(tile_dy, PRECISION)
    for first in tl.range(0, HIDDEN, BH, num_stages=STAGES if DS == DP else 1, disable_licm=DS < DP):
        rows_a, rows_b = 0, 0
        if DS == DP:
            rows_a = operand(units_of(w1, first, column, 0, D, HIDDEN, BH), PRECISION)
            if ACTIVATION >= 3:
                rows_b = operand(units_of(w1, first, column, 1, D, HIDDEN, BH), PRECISION)
        a, b = first_products(rows_x, rows_a, rows_b, x, mean, scale, norm_weight, norm_bias, w1, b1, start, first,
                              tokens, D, DP, DS, HIDDEN, NORM, ACTIVATION >= 3, PRECISION, BM, BH, STAGES)
        _, slope_a, slope_b = activate(a, b, ACTIVATION, w1.dtype.element_ty != tl.float32)
        if DROPOUT:
            kept = multipliers_of(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
            slope_a *= kept
            slope_b *= kept
        grad = hidden_gradient(rows_dy, source, w2, start, first, tokens, D, DP, DS, HIDDEN, PRECISION, BM, BH, STAGES)
        if DS < DP:
            rows_a = operand(units_of(w1, first, column, 0, D, HIDDEN, BH), PRECISION)
        da = operand((grad * slope_a).to(w1.dtype.element_ty), PRECISION)
        total = product(da, rows_a, total, PRECISION)
        if ACTIVATION >= 3:
            if DS < DP:
                rows_b = operand(units_of(w1, first, column, 1, D, HIDDEN, BH), PRECISION)
            db = operand((grad * slope_b).to(w1.dtype.element_ty), PRECISION)
            total = product(db, rows_b, total, PRECISION)
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
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], gated of both halves; [D, HIDDEN]; contiguous
    norm_weight, norm_bias,  # [D] each; None without a norm
    seed,  # int64 [1]; None without DROPOUT
    partial,  # fp32 [programs a slice, ROWS D + D HIDDEN + ROWS + D]: dW1, dW2, db1, db2; ROWS of w1
    tokens, eps, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, DS: tl.constexpr, STAGES: tl.constexpr, LAYERS: tl.constexpr,
):
    """The sums of one slice of hidden units over a share of the tiles of tokens; slice 0 also sums db2.

    LAYERS, a sum of: 1 for dW1 and db1, gated of their first halves; 2 for dW2 and db2; 4 for the second halves.
    """
    SLICES: tl.constexpr = (HIDDEN + BH - 1) // BH
    GATED: tl.constexpr = ACTIVATION >= 3
    ROWS: tl.constexpr = 2 * HIDDEN if GATED else HIDDEN
    part, first = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BH
    row, column, unit = tl.arange(0, BM), tl.arange(0, DP), first + tl.arange(0, BH)
    offsets = row[:, None] * D + column[None, :]
    if DS == DP:
        rows_a = operand(units_of(w1, first, column, 0, D, HIDDEN, BH), PRECISION)
        if GATED:
            rows_b = operand(units_of(w1, first, column, 1, D, HIDDEN, BH), PRECISION)
        rows_2 = operand(tl.trans(columns_of(w2, first, column, D, HIDDEN, BH)), PRECISION)
    bias_a = bias_of(b1, first, 0, HIDDEN, BH)[:, None]
    if GATED:
        bias_b = bias_of(b1, first, 1, HIDDEN, BH)[:, None]
    dwa = tl.zeros((BH, DP), tl.float32)
    dwb = tl.zeros((BH, DP), tl.float32)
    dw2 = tl.zeros((BH, DP), tl.float32)  # transposed
    dba = tl.zeros((BH,), tl.float32)
    dbb = tl.zeros((BH,), tl.float32)
    db2 = tl.zeros((DP,), tl.float32)
    for tile in tl.range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // SLICES,
                         num_stages=STAGES if DS == DP else 1, disable_licm=DS < DP):
        start = tl.cast(tile, tl.int64) * BM
        inside = (row < tokens - start)[:, None] & (column < D)[None, :]
        tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
        tile_dy = tl.load(dy + start * D + offsets, mask=inside, other=0.0).to(w1.dtype.element_ty)
        if LAYERS & 2:  # noqa: SIM102 (known when it is compiled, the next one is not)
            if first == 0:
                db2 += tl.sum(tile_dy.to(tl.float32), axis=0)
        mean, scale = 0, 0
        if NORM == PRE:
            if DS < DP:
                mean, scale = row_statistics(tile_x.to(tl.float32), column, eps, D)
            tile_x = normalise(tile_x, norm_weight, norm_bias, column, eps, D)
        rows_x = operand(tile_x.to(w1.dtype.element_ty), PRECISION)
        rows_dy = operand(tile_dy, PRECISION)
        if DS == DP:  # transposed, so that hidden and da are left operands as they come out: [BH, BM]
            a = product(rows_a, turned(rows_x), None, PRECISION) + bias_a
            b = a
            if GATED:
                b = product(rows_b, turned(rows_x), None, PRECISION) + bias_b
        else:
            a, b = first_products(rows_x, 0, 0, x, mean, scale, norm_weight, norm_bias, w1, b1, start, first, tokens, D,
                                  DP, DS, HIDDEN, NORM, GATED, PRECISION, BM, BH, STAGES)
            a, b = tl.trans(a), tl.trans(b)
        hidden, slope_a, slope_b = activate(a, b, ACTIVATION, w1.dtype.element_ty != tl.float32)
        if DROPOUT:
            kept = tl.trans(multipliers_of(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH))
            hidden *= kept
            slope_a *= kept
            slope_b *= kept
        if LAYERS & 2:
            dw2 = product(operand(hidden.to(w1.dtype.element_ty), PRECISION), rows_dy, dw2, PRECISION)
        if LAYERS & 5:
            if DS == DP:
                grad = product(rows_2, turned(rows_dy), None, PRECISION)
            else:
                grad = tl.trans(hidden_gradient(rows_dy, dy, w2, start, first, tokens, D, DP, DS, HIDDEN, PRECISION, BM,
                                                BH, STAGES))
        if LAYERS & 1:
            da = grad * slope_a
            dba += tl.sum(da, axis=1)
            dwa = product(operand(da.to(w1.dtype.element_ty), PRECISION), rows_x, dwa, PRECISION)
        if LAYERS & 4:
            db = grad * slope_b
            dbb += tl.sum(db, axis=1)
            dwb = product(operand(db.to(w1.dtype.element_ty), PRECISION), rows_x, dwb, PRECISION)
    partial += part.to(tl.int64) * (ROWS * D + D * HIDDEN + ROWS + D)
    inside = (unit < HIDDEN)[:, None] & (column < D)[None, :]
    biases = partial + (ROWS * D + D * HIDDEN)
    if LAYERS & 1:
        tl.store(partial + (unit[:, None] * D + column[None, :]), dwa, mask=inside)
        tl.store(biases + unit, dba, mask=unit < HIDDEN)
    if LAYERS & 4:
        tl.store(partial + HIDDEN * D + (unit[:, None] * D + column[None, :]), dwb, mask=inside)
        tl.store(biases + HIDDEN + unit, dbb, mask=unit < HIDDEN)
    if LAYERS & 2:
        tl.store(partial + ROWS * D + (column[None, :] * HIDDEN + unit[:, None]), dw2, mask=inside)
        tl.store(biases + ROWS + column, db2, mask=(column < D) & (first == 0))

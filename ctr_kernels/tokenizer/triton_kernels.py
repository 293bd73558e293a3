"""The kernels of the tokens in Triton; triton.py has the formulas, the traffic and the launches.

Tokens of a sample come in slices of TOKENS, those of the fields first, then those in front of them (the head: CLS and
numeric tokens). A program works on one slice, so that it reads the vectors of its tokens once for many samples.
"""

import triton
import triton.language as tl

from ..triton_support import philox


@triton.jit
def _keep(seed, sample, field, limit, K: tl.constexpr):
    """Keep-mask bool [ROWS, TOKENS] of fields, philox.py's of B rows and K columns bit for bit.

    One call of Philox for each element, of whose four words it takes one: a tile has fewer elements than the program
    has threads, so that sharing a call among four would save nothing.
    """
    groups: tl.constexpr = (K + 31) // 32
    counter = sample[:, None] * (groups * 8) + (field // 32 * 8 + field % 8)[None, :]
    w0, w1, w2, w3 = philox(tl.load(seed), counter)
    word = (field % 32 // 8)[None, :]
    drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (drawn >> 1) >= limit


@triton.jit
def _vectors(source, index, index_mask, column, D: tl.constexpr):
    """Vectors [TOKENS, BLOCK_D] number `index` of source [..., D], in fp32; 0 where a mask is false."""
    return tl.load(source + (index[:, None] * D + column[None, :]), mask=index_mask[:, None] & (column < D)[None, :],
                   other=0.0).to(tl.float32)


@triton.jit
def _numbers(dense, sample, column, mask, WIDTH: tl.constexpr):
    """Columns of dense [B, WIDTH] in fp32; sample and column broadcast to the shape of mask."""
    return tl.load(dense + (sample * WIDTH + column), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _moments(mean, scale, column, mask):
    """Mean and scale of columns of history, in fp32; 0 where mask is false."""
    return (tl.load(mean + column, mask=mask, other=0.0).to(tl.float32),
            tl.load(scale + column, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def forward_kernel(
    weight,  # [num_rows, D], contiguous
    ids,  # int32 or int64 [B, K], contiguous
    dense,  # [B, N + S K], contiguous
    dense_weight,  # ONE: [D, N], else [N, D]; contiguous
    dense_bias,  # ONE: [D], else [N, D]; contiguous; None without one
    cls,  # [D]; None without one
    field_bias,  # [K, D], contiguous; None without one
    history_weight, history_bias, mean, scale,  # [S, K, D], [K, D], [S K], [S K], contiguous; None for S = 0
    seed,  # int64 [1]; None without dropout
    out,  # [B, T, D], contiguous
    batch, num_rows, limit, inverse_keep,
    K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ONE: tl.constexpr, CLS: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):
    """One slice of the tokens of ROWS samples; the row of an id outside the table is NaN."""
    HEAD: tl.constexpr = CLS + (1 if ONE else N)
    FIELD_SLICES: tl.constexpr = (K + TOKENS - 1) // TOKENS
    SLICES: tl.constexpr = FIELD_SLICES + (HEAD + TOKENS - 1) // TOKENS
    WIDTH: tl.constexpr = N + S * K
    part = tl.program_id(0) % SLICES
    sample = (tl.program_id(0) // SLICES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    row_mask, column_mask = sample < batch, column < D
    target = out + sample[:, None, None] * ((HEAD + K) * D) + column[None, None, :]
    if part < FIELD_SLICES:
        field = part * TOKENS + tl.arange(0, TOKENS)
        field_mask = field < K
        tile_mask = row_mask[:, None] & field_mask[None, :]
        row = tl.load(ids + sample[:, None] * K + field[None, :], mask=tile_mask, other=-1).to(tl.int64)
        id_mask = (row >= 0) & (row < num_rows)  # false where no field is present
        if seed is not None:
            read_mask = id_mask & _keep(seed, sample, field, limit, K)
        else:
            read_mask = id_mask
        tile = tl.load(weight + row[:, :, None] * D + column[None, None, :],
                       mask=read_mask[:, :, None] & column_mask[None, None, :], other=0.0).to(tl.float32)
        if seed is not None:
            tile *= inverse_keep
        if S:
            tile += _vectors(history_bias, field, field_mask, column, D)[None, :, :]
            for s in tl.static_range(S):
                centre, factor = _moments(mean, scale, s * K + field, field_mask)
                past = _numbers(dense, sample[:, None], (N + s * K + field)[None, :], tile_mask, WIDTH)
                past = (past - centre[None, :]) * factor[None, :]
                tile += past[:, :, None] * _vectors(history_weight, s * K + field, field_mask, column, D)[None, :, :]
        if field_bias is not None:
            tile += _vectors(field_bias, field, field_mask, column, D)[None, :, :]
        tile = tl.where(id_mask[:, :, None], tile, float("nan"))
        tl.store(target + (HEAD + field)[None, :, None] * D, tile.to(out.dtype.element_ty),
                 mask=tile_mask[:, :, None] & column_mask[None, None, :])
    else:
        token = (part - FIELD_SLICES) * TOKENS + tl.arange(0, TOKENS)
        feature = token - CLS
        feature_mask = (feature >= 0) & (token < HEAD)
        tile = tl.zeros((ROWS, TOKENS, BLOCK_D), tl.float32)
        if dense_bias is not None:
            tile += _vectors(dense_bias, feature, feature_mask, column, D)[None, :, :]
        if cls is not None:
            tile += _vectors(cls, token, token == 0, column, D)[None, :, :]
        if ONE:
            number = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for j in range(N):
                factors = tl.load(dense_weight + column * N + j, mask=column_mask, other=0.0).to(tl.float32)
                number += _numbers(dense, sample, j, row_mask, WIDTH)[:, None] * factors[None, :]
            tile += tl.where(feature_mask[None, :, None], number[:, None, :], 0.0)
        else:
            x = _numbers(dense, sample[:, None], feature[None, :], row_mask[:, None] & feature_mask[None, :], WIDTH)
            tile += x[:, :, None] * _vectors(dense_weight, feature, feature_mask, column, D)[None, :, :]
        tl.store(target + token[None, :, None] * D, tile.to(out.dtype.element_ty),
                 mask=row_mask[:, None, None] & (token < HEAD)[None, :, None] & column_mask[None, None, :])


@triton.jit
def _field_sums(
    grad, dense, mean, scale, seed, rows, partial, batch, limit, inverse_keep, first, step, part,
    K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):
    """Slice `part` of the fields: row gradients, and the sums of the gradients and of their products with history."""
    field, column = part * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    field_mask, column_mask = field < K, column < D
    offsets = field[None, :, None] * D + column[None, None, :]
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    products, moments = (), ()  # of each statistic a sum; mean and scale
    for s in tl.static_range(S):
        products = products + (tl.zeros((TOKENS, BLOCK_D), tl.float32),)
        moments = moments + _moments(mean, scale, s * K + field, field_mask)
    for group in range(first, tl.cdiv(batch, ROWS), step):
        sample = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        tile_mask = (sample < batch)[:, None] & field_mask[None, :]
        mask = tile_mask[:, :, None] & column_mask[None, None, :]
        tile = tl.load(grad + (sample * ((HEAD + K) * D) + HEAD * D)[:, None, None] + offsets, mask=mask, other=0.0)
        row = tile
        if seed is not None:
            multiplier = tl.where(_keep(seed, sample, field, limit, K), inverse_keep, 0.0)
            row = (tile.to(tl.float32) * multiplier[:, :, None]).to(tile.dtype)
        tl.store(rows + (sample * (K * D))[:, None, None] + offsets, row, mask=mask)
        tile = tile.to(tl.float32)
        if BIASED:
            total += tl.sum(tile, axis=0)
        sums = ()
        for s in tl.static_range(S):
            past = _numbers(dense, sample[:, None], (N + s * K + field)[None, :], tile_mask, N + S * K)
            past = (past - moments[2 * s][None, :]) * moments[2 * s + 1][None, :]
            sums = sums + (products[s] + tl.sum(past[:, :, None] * tile, axis=0),)
        products = sums
    mask = field_mask[:, None] & column_mask[None, :]
    if BIASED:
        tl.store(partial + ((HEAD + field)[:, None] * D + column[None, :]), total, mask=mask)
    for s in tl.static_range(S):
        start = HEAD + N + (K if BIASED else 0) + s * K
        tl.store(partial + ((start + field)[:, None] * D + column[None, :]), products[s], mask=mask)


@triton.jit
def _head_sums(
    grad, dense, partial, batch, first, step, part, start,
    K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ONE: tl.constexpr, HEAD: tl.constexpr,
    CLS: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):
    """Slice `part` of CLS and the features: sums of the gradients, and of their products with the numbers.

    With ONE token for all numbers, its gradient is that of every feature: the cache serves all but the first.
    """
    index, column = part * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    feature, index_mask, column_mask = index - CLS, index < CLS + N, column < D
    feature_mask = index_mask & (feature >= 0)
    token = tl.minimum(index, HEAD - 1)
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    products = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for group in range(first, tl.cdiv(batch, ROWS), step):
        sample = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_mask = sample < batch
        mask = row_mask[:, None, None] & index_mask[None, :, None] & column_mask[None, None, :]
        tile = tl.load(grad + (sample * ((HEAD + K) * D))[:, None, None]
                       + (token[None, :, None] * D + column[None, None, :]), mask=mask, other=0.0).to(tl.float32)
        x = _numbers(dense, sample[:, None], feature[None, :], row_mask[:, None] & feature_mask[None, :], WIDTH)
        total += tl.sum(tile, axis=0)
        products += tl.sum(tile * x[:, :, None], axis=0)
    tl.store(partial + (index[:, None] * D + column[None, :]), total,
             mask=(index < HEAD)[:, None] & column_mask[None, :])
    if ONE:
        position = column[None, :] * N + feature[:, None]
    else:
        position = feature[:, None] * D + column[None, :]
    tl.store(partial + (start + position), products, mask=feature_mask[:, None] & column_mask[None, :])


@triton.jit
def backward_kernel(
    grad,  # [B, T, D], contiguous
    dense,  # [B, N + S K], contiguous
    mean, scale,  # [S K] each, contiguous; None for S = 0
    seed,  # int64 [1]; None without dropout
    rows,  # [B K, D], contiguous: gradients of the table's rows
    partial,  # fp32 [groups of programs, SUMS]: sums over samples of the gradients of the head [HEAD, D] and, if
    # BIASED, of the fields [K, D]; of products with the numbers, [D, N] if ONE, else [N, D], and history [S, K, D]
    batch, limit, inverse_keep,
    K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ONE: tl.constexpr, CLS: tl.constexpr,
    BIASED: tl.constexpr, SUMS: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):
    """A grid-stride loop over groups of ROWS samples, a slice of their tokens: row gradients, and sums over samples."""
    HEAD: tl.constexpr = CLS + (1 if ONE else N)
    FIELD_SLICES: tl.constexpr = (K + TOKENS - 1) // TOKENS
    SLICES: tl.constexpr = FIELD_SLICES + (CLS + N + TOKENS - 1) // TOKENS
    part, first, step = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES, tl.num_programs(0) // SLICES
    partial += first.to(tl.int64) * SUMS
    start: tl.constexpr = (HEAD + (K if BIASED else 0)) * D  # of the products with the numbers
    if part < FIELD_SLICES:
        _field_sums(grad, dense, mean, scale, seed, rows, partial, batch, limit, inverse_keep, first, step, part,
                    K, N, S, D, HEAD, BIASED, BLOCK_D, TOKENS, ROWS)
    else:
        _head_sums(grad, dense, partial, batch, first, step, part - FIELD_SLICES, start, K, N, D, N + S * K, ONE, HEAD,
                   CLS, BLOCK_D, TOKENS, ROWS)

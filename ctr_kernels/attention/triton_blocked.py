"""The kernels of attention over many fields: some QUERIES at a time, and SLICE columns of a head.

The map of 128 x 128 does not fit in registers beside what is made of it; that of 32 x 128 does.
"""

import triton
import triton.language as tl

from ..triton_support import dropout_keep
from .triton_kernels import inside_of, offsets_of, pair_dot, tile_of, weights_of


@triton.jit
def _queries_of(x, pair, column, first, stride_b, stride_t, pairs, Q: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
                QUERIES: tl.constexpr):
    """[1, QUERIES, columns] of a [B, Q, H DH] tensor from query `first`; zero beyond the edges."""
    inside = inside_of(pair, column, pairs, QUERIES, DH, QUERIES) & _known(first, Q, QUERIES)
    offsets = tl.cast(first, tl.int64) * stride_t + offsets_of(pair, column, stride_b, stride_t, H, DH, QUERIES)
    return tl.load(x + offsets, mask=inside, other=0.0)


@triton.jit
def _known(first, Q: tl.constexpr, QUERIES: tl.constexpr):
    """bool [1, QUERIES, 1]: true where there is a query."""
    return (first + tl.arange(0, QUERIES) < Q)[None, :, None]


@triton.jit
def _keep(seed, pair, first, limit, Q: tl.constexpr, F: tl.constexpr, QUERIES: tl.constexpr, BLOCK_F: tl.constexpr):
    """Keep-mask of dropout, bool [1, QUERIES, BLOCK_F]; the row of the map is pair * Q + query."""
    rows = tl.reshape(pair[:, None] * Q + first + tl.arange(0, QUERIES)[None, :], (QUERIES,))
    keep = dropout_keep(tl.load(seed), rows, 0, (F + 31) // 32, limit, BLOCK_F // 32)
    return tl.reshape(keep, (1, QUERIES, BLOCK_F))


@triton.jit
def blocked_forward_kernel(
    q,  # [B, Q, H DH]
    k, v,  # [B, F, H DH] each; strides below, last one 1
    out,  # [B, Q, H DH], contiguous
    seed,  # int64 [1]; None without DROPOUT
    q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    pairs,  # B H
    factor, limit, inverse_keep,
    Q: tl.constexpr, F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, QUERIES: tl.constexpr,
):
    """A program has QUERIES queries of a pair: q read and o written once, k and v once for each program of a pair."""
    BLOCKS: tl.constexpr = (Q + QUERIES - 1) // QUERIES
    pair = (tl.program_id(0) // BLOCKS).to(tl.int64) + tl.arange(0, 1)
    query = tl.program_id(0) % BLOCKS * QUERIES
    logits = tl.zeros((1, QUERIES, BLOCK_F), tl.float32)
    for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
        tile_q = _queries_of(q, pair, column, query, q_stride_b, q_stride_t, pairs, Q, H, DH, QUERIES)
        tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F)
        logits = pair_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), logits, PRECISION)
    weights, normaliser = weights_of(logits, factor, F, NEGATE)
    if DROPOUT:
        weights = tl.where(_keep(seed, pair, query, limit, Q, F, QUERIES, BLOCK_F), weights, 0.0)
        normaliser *= inverse_keep
    weights = weights.to(v.dtype.element_ty)
    for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
        tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F)
        tile_o = pair_dot(weights, tile_v, None, PRECISION) * normaliser
        offsets = tl.cast(query, tl.int64) * (H * DH) + offsets_of(pair, column, Q * H * DH, H * DH, H, DH, QUERIES)
        tl.store(out + offsets, tile_o.to(out.dtype.element_ty),
                 mask=inside_of(pair, column, pairs, QUERIES, DH, QUERIES) & _known(query, Q, QUERIES))


@triton.jit
def blocked_backward_kernel(
    grad_out, q,  # [B, Q, H DH] each
    k, v,  # [B, F, H DH] each; strides below, last one 1
    dq,  # [B, Q, H DH], Q_GRAD elements between tokens
    dk, dv,  # [B, F, H DH] each, F_GRAD elements between tokens
    seed,  # int64 [1]; None without DROPOUT
    o_stride_b, o_stride_t, q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    pairs,  # B H
    factor, scale, limit, inverse_keep,
    Q: tl.constexpr, F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, Q_GRAD: tl.constexpr, F_GRAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, QUERIES: tl.constexpr,
):
    """A program has SLICE columns of the gradients of a pair, and sums dk and dv over blocks of queries in registers.

    S and dP take all columns: each program of a pair computes them again, and reads do, q, k and v for each block.
    """
    SLICES: tl.constexpr = (DH + SLICE - 1) // SLICE
    pair = (tl.program_id(0) // SLICES).to(tl.int64) + tl.arange(0, 1)
    own = tl.program_id(0) % SLICES * SLICE + tl.arange(0, SLICE)
    own_inside = inside_of(pair, own, pairs, F, DH, BLOCK_F)
    grad_k = tl.zeros((1, BLOCK_F, SLICE), tl.float32)
    grad_v = tl.zeros((1, BLOCK_F, SLICE), tl.float32)
    for query in tl.range(0, Q, QUERIES, num_stages=1, disable_licm=True):
        logits = tl.zeros((1, QUERIES, BLOCK_F), tl.float32)
        grad_weights = tl.zeros((1, QUERIES, BLOCK_F), tl.float32)
        for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
            column = first + tl.arange(0, SLICE)
            inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
            tile_q = _queries_of(q, pair, column, query, q_stride_b, q_stride_t, pairs, Q, H, DH, QUERIES)
            tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F)
            logits = pair_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), logits, PRECISION)
            tile_o = _queries_of(grad_out, pair, column, query, o_stride_b, o_stride_t, pairs, Q, H, DH, QUERIES)
            tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F)
            grad_weights = pair_dot(tile_o, tl.permute(tile_v, (0, 2, 1)), grad_weights, PRECISION)
        weights, normaliser = weights_of(logits, factor, F, NEGATE)
        weights *= normaliser
        dropped = weights
        if DROPOUT:
            keep = _keep(seed, pair, query, limit, Q, F, QUERIES, BLOCK_F)
            dropped = tl.where(keep, weights * inverse_keep, 0.0)
            grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
        tile_o = _queries_of(grad_out, pair, own, query, o_stride_b, o_stride_t, pairs, Q, H, DH, QUERIES)
        grad_v = pair_dot(tl.permute(dropped.to(tile_o.dtype), (0, 2, 1)), tile_o, grad_v, PRECISION)
        grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
        grad_logits = (grad_logits * scale).to(q.dtype.element_ty)
        tile_k = tile_of(k, pair, own, k_stride_b, k_stride_t, own_inside, H, DH, BLOCK_F)
        grad_q = pair_dot(grad_logits, tile_k, None, PRECISION)
        offsets = tl.cast(query, tl.int64) * Q_GRAD + offsets_of(pair, own, Q * Q_GRAD, Q_GRAD, H, DH, QUERIES)
        tl.store(dq + offsets, grad_q.to(dq.dtype.element_ty),
                 mask=inside_of(pair, own, pairs, QUERIES, DH, QUERIES) & _known(query, Q, QUERIES))
        tile_q = _queries_of(q, pair, own, query, q_stride_b, q_stride_t, pairs, Q, H, DH, QUERIES)
        grad_k = pair_dot(tl.permute(grad_logits, (0, 2, 1)), tile_q, grad_k, PRECISION)
    offsets = offsets_of(pair, own, F * F_GRAD, F_GRAD, H, DH, BLOCK_F)
    tl.store(dk + offsets, grad_k.to(dk.dtype.element_ty), mask=own_inside)
    tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), mask=own_inside)

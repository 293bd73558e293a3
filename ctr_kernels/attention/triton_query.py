"""The kernels of attention of one query, as CLS in a model's last layer has it: products and sums, no dots.

A dot would pad the query to 16 rows. The work, 2 F d multiplications a pair forward and 5 F d backward, is far below
the time that k and v take from memory, and fp32 stays fp32.
"""

import triton
import triton.language as tl

from .triton_kernels import inside_of, keep_of, offsets_of, tile_of, weights_of


@triton.jit
def _vector(x, pair, column, stride_b, pairs, H: tl.constexpr, DH: tl.constexpr):
    """fp32 [PAIRS, 1, BLOCK_D]: the one token of a [B, 1, H DH] tensor; zero beyond the edges."""
    return tile_of(x, pair, column, stride_b, 0, inside_of(pair, column, pairs, 1, DH, 1), H, DH, 1).to(tl.float32)


@triton.jit
def query_forward_kernel(
    q,  # [B, 1, H DH]
    k, v,  # [B, F, H DH] each; strides below, last one 1
    out,  # [B, 1, H DH], contiguous
    seed,  # int64 [1]; None without DROPOUT
    q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    pairs,  # B H
    factor, limit, inverse_keep,
    Q: tl.constexpr, F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One pass: q, k, v read once, o written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, BLOCK_D)
    inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
    tile_q = _vector(q, pair, column, q_stride_b, pairs, H, DH)
    tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F).to(tl.float32)
    tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F).to(tl.float32)
    logits = tl.sum(tile_q * tile_k, 2)[:, None, :]  # [PAIRS, 1, BLOCK_F]
    weights, normaliser = weights_of(logits, factor, F, NEGATE)
    if DROPOUT:
        weights = tl.where(keep_of(seed, pair, limit, 1, F, 1, BLOCK_F), weights, 0.0)
        normaliser *= inverse_keep
    tile_o = tl.sum(tl.permute(weights, (0, 2, 1)) * tile_v, 1, keep_dims=True) * normaliser
    offsets = offsets_of(pair, column, H * DH, 0, H, DH, 1)
    tl.store(out + offsets, tile_o.to(out.dtype.element_ty), mask=inside_of(pair, column, pairs, 1, DH, 1))


@triton.jit
def query_backward_kernel(
    grad_out, q,  # [B, 1, H DH] each
    k, v,  # [B, F, H DH] each; strides below, last one 1
    dq,  # [B, 1, H DH], Q_GRAD elements between samples
    dk, dv,  # [B, F, H DH] each, F_GRAD elements between tokens
    seed,  # int64 [1]; None without DROPOUT
    o_stride_b, o_stride_t, q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    pairs,  # B H
    factor, scale, limit, inverse_keep,
    Q: tl.constexpr, F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, Q_GRAD: tl.constexpr, F_GRAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One pass: do, q, k, v read once, dq, dk, dv written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, BLOCK_D)
    inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
    offsets = offsets_of(pair, column, F * F_GRAD, F_GRAD, H, DH, BLOCK_F)
    tile_q = _vector(q, pair, column, q_stride_b, pairs, H, DH)
    tile_o = _vector(grad_out, pair, column, o_stride_b, pairs, H, DH)
    tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F).to(tl.float32)
    weights, normaliser = weights_of(tl.sum(tile_q * tile_k, 2)[:, None, :], factor, F, NEGATE)
    weights *= normaliser  # [PAIRS, 1, BLOCK_F]
    tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F).to(tl.float32)
    grad_weights = tl.sum(tile_o * tile_v, 2)[:, None, :]
    dropped = weights
    if DROPOUT:
        keep = keep_of(seed, pair, limit, 1, F, 1, BLOCK_F)
        dropped = tl.where(keep, weights * inverse_keep, 0.0)
        grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
    grad_v = tl.permute(dropped, (0, 2, 1)) * tile_o
    tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), mask=inside)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    grad_logits = tl.permute(grad_logits * scale, (0, 2, 1))  # [PAIRS, BLOCK_F, 1]
    tl.store(dk + offsets, (grad_logits * tile_q).to(dk.dtype.element_ty), mask=inside)
    grad_q = tl.sum(grad_logits * tile_k, 1, keep_dims=True)
    q_offsets = offsets_of(pair, column, Q_GRAD, 0, H, DH, 1)
    tl.store(dq + q_offsets, grad_q.to(dq.dtype.element_ty), mask=inside_of(pair, column, pairs, 1, DH, 1))

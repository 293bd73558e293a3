"""The kernels of attention over fields that take SLICE columns of a head at a time: triton_kernels.py in less space.

S and P stay in registers as there. The loops keep their invariants inside: a map's operand, in two parts at "fp16x3",
would fill the registers.
"""

import triton
import triton.language as tl

from .triton_kernels import inside_of, keep_of, offsets_of, pair_dot, tile_of, weights_of


@triton.jit
def _logits(q, k, pair, q_stride_b, q_stride_t, k_stride_b, k_stride_t, pairs, Q: tl.constexpr, F: tl.constexpr,
            H: tl.constexpr, DH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, SLICE: tl.constexpr,
            PRECISION: tl.constexpr):
    """q k^T [PAIRS, BLOCK_Q, BLOCK_F]."""
    logits = tl.zeros((pair.shape[0], BLOCK_Q, BLOCK_F), tl.float32)
    for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        q_inside = inside_of(pair, column, pairs, Q, DH, BLOCK_Q)
        inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
        tile_q = tile_of(q, pair, column, q_stride_b, q_stride_t, q_inside, H, DH, BLOCK_Q)
        tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F)
        logits = pair_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), logits, PRECISION)
    return logits


@triton.jit
def sliced_forward_kernel(
    q,  # [B, Q, H DH]
    k, v,  # [B, F, H DH] each; strides below, last one 1
    out,  # [B, Q, H DH], contiguous
    seed,  # int64 [1]; None without DROPOUT
    q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    pairs,  # B H
    factor, limit, inverse_keep,
    Q: tl.constexpr, F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
):
    """q, k, v read once, o written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    weights, normaliser = weights_of(
        _logits(q, k, pair, q_stride_b, q_stride_t, k_stride_b, k_stride_t, pairs, Q, F, H, DH, BLOCK_Q, BLOCK_F, SLICE,
                PRECISION), factor, F, NEGATE)
    if DROPOUT:
        weights = tl.where(keep_of(seed, pair, limit, Q, F, BLOCK_Q, BLOCK_F), weights, 0.0)
        normaliser *= inverse_keep
    weights = weights.to(v.dtype.element_ty)
    for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
        tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F)
        tile_o = pair_dot(weights, tile_v, None, PRECISION) * normaliser
        offsets = offsets_of(pair, column, Q * H * DH, H * DH, H, DH, BLOCK_Q)
        tl.store(out + offsets, tile_o.to(out.dtype.element_ty),
                 mask=inside_of(pair, column, pairs, Q, DH, BLOCK_Q))


@triton.jit
def sliced_backward_kernel(
    grad_out, q,  # [B, Q, H DH] each
    k, v,  # [B, F, H DH] each; strides below, last one 1
    dq,  # [B, Q, H DH], Q_GRAD elements between tokens
    dk, dv,  # [B, F, H DH] each, F_GRAD elements between tokens
    seed,  # int64 [1]; None without DROPOUT
    o_stride_b, o_stride_t, q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
    pairs,  # B H
    factor, scale, limit, inverse_keep,
    Q: tl.constexpr, F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, Q_GRAD: tl.constexpr, F_GRAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
):
    """do and v read once, q and k once more from the cache; dq, dk, dv written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    weights, normaliser = weights_of(
        _logits(q, k, pair, q_stride_b, q_stride_t, k_stride_b, k_stride_t, pairs, Q, F, H, DH, BLOCK_Q, BLOCK_F, SLICE,
                PRECISION), factor, F, NEGATE)
    weights *= normaliser
    dropped = weights
    if DROPOUT:
        keep = keep_of(seed, pair, limit, Q, F, BLOCK_Q, BLOCK_F)
        dropped = tl.where(keep, weights * inverse_keep, 0.0)
    dropped = dropped.to(grad_out.dtype.element_ty)

    grad_weights = tl.zeros((PAIRS, BLOCK_Q, BLOCK_F), tl.float32)
    for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        q_inside = inside_of(pair, column, pairs, Q, DH, BLOCK_Q)
        inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
        tile_o = tile_of(grad_out, pair, column, o_stride_b, o_stride_t, q_inside, H, DH, BLOCK_Q)
        tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F)
        grad_weights = pair_dot(tile_o, tl.permute(tile_v, (0, 2, 1)), grad_weights, PRECISION)
        grad_v = pair_dot(tl.permute(dropped, (0, 2, 1)), tile_o, None, PRECISION)
        offsets = offsets_of(pair, column, F * F_GRAD, F_GRAD, H, DH, BLOCK_F)
        tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), mask=inside)
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    grad_logits = (grad_logits * scale).to(q.dtype.element_ty)
    for first in tl.range(0, DH, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        q_inside = inside_of(pair, column, pairs, Q, DH, BLOCK_Q)
        inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
        tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F)
        grad_q = pair_dot(grad_logits, tile_k, None, PRECISION)
        offsets = offsets_of(pair, column, Q * Q_GRAD, Q_GRAD, H, DH, BLOCK_Q)
        tl.store(dq + offsets, grad_q.to(dq.dtype.element_ty), mask=q_inside)
        tile_q = tile_of(q, pair, column, q_stride_b, q_stride_t, q_inside, H, DH, BLOCK_Q)
        grad_k = pair_dot(tl.permute(grad_logits, (0, 2, 1)), tile_q, None, PRECISION)
        offsets = offsets_of(pair, column, F * F_GRAD, F_GRAD, H, DH, BLOCK_F)
        tl.store(dk + offsets, grad_k.to(dk.dtype.element_ty), mask=inside)

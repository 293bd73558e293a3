"""The kernels of attention over fields in Triton; triton.py has the formulas, the traffic and the launches."""

import triton
import triton.language as tl

from ..triton_support import dot, dropout_keep, exp2_flushed


@triton.jit
def offsets_of(pair, column, stride_b, stride_t, H: tl.constexpr, DH: tl.constexpr, BLOCK: tl.constexpr):
    """int64 [PAIRS, BLOCK, columns]: where element (token, column) of each pair lies in a [B, tokens, H DH] tensor."""
    start = (pair // H) * stride_b + (pair % H) * DH  # [PAIRS]
    token = tl.arange(0, BLOCK).to(tl.int64) * stride_t
    return start[:, None, None] + token[None, :, None] + column[None, None, :]


@triton.jit
def inside_of(pair, column, pairs, TOKENS: tl.constexpr, DH: tl.constexpr, BLOCK: tl.constexpr):
    """bool [PAIRS, BLOCK, columns]: true where there is an element."""
    inside = (pair < pairs)[:, None, None] & (tl.arange(0, BLOCK) < TOKENS)[None, :, None]
    return inside & (column < DH)[None, None, :]


@triton.jit
def tile_of(x, pair, column, stride_b, stride_t, inside, H: tl.constexpr, DH: tl.constexpr, BLOCK: tl.constexpr):
    """[PAIRS, BLOCK, columns] of a [B, tokens, H DH] tensor; zero where `inside` is false."""
    return tl.load(x + offsets_of(pair, column, stride_b, stride_t, H, DH, BLOCK), mask=inside, other=0.0)


@triton.jit
def pair_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for each pair; acc may be None. Where there is one pair a 2-D dot, which several warps share; else 3-D,
    one warp a pair."""
    if a.shape[0] == 1:
        flat_a, flat_b = tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2]))
        flat_acc = None if acc is None else tl.reshape(acc, (a.shape[1], b.shape[2]))
        return tl.reshape(dot(flat_a, flat_b, flat_acc, PRECISION), (1, a.shape[1], b.shape[2]))
    return dot(a, b, acc, PRECISION)


@triton.jit
def weights_of(logits, factor, F: tl.constexpr, NEGATE: tl.constexpr):
    """exp(S - max S) [PAIRS, BLOCK_Q, BLOCK_F], 0 for padded keys, and the inverse row sums [PAIRS, BLOCK_Q, 1].

    logits: q k^T. factor: |scale| log2(e), at least the smallest normal number. The maximum is subtracted before the
    factor, so that its weight is exactly 1: of logits of thousands, a rounding after the factor would
    reach the gradients.
    """
    if NEGATE:
        logits = -logits
    logits = tl.where((tl.arange(0, logits.shape[2]) < F)[None, None, :], logits, float("-inf"))
    weights = exp2_flushed((logits - tl.max(logits, 2, keep_dims=True)) * factor)
    return weights, 1.0 / tl.sum(weights, 2, keep_dims=True)


@triton.jit
def keep_of(seed, pair, limit, Q: tl.constexpr, F: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_F: tl.constexpr):
    """Keep-mask of dropout, bool [PAIRS, BLOCK_Q, BLOCK_F]; the row of the map is pair * Q + query."""
    PAIRS: tl.constexpr = pair.shape[0]
    GROUPS: tl.constexpr = (BLOCK_F + 31) // 32
    rows = tl.reshape(pair[:, None] * Q + tl.arange(0, BLOCK_Q)[None, :], (PAIRS * BLOCK_Q,))
    keep = dropout_keep(tl.load(seed), rows, 0, (F + 31) // 32, limit, GROUPS)
    return tl.reshape(keep, (PAIRS, BLOCK_Q, GROUPS * 32))


@triton.jit
def forward_kernel(
    q,  # [B, Q, H DH]
    k, v,  # [B, F, H DH] each; strides below, last one 1
    out,  # [B, Q, H DH], contiguous
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
    q_inside = inside_of(pair, column, pairs, Q, DH, BLOCK_Q)
    inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
    tile_q = tile_of(q, pair, column, q_stride_b, q_stride_t, q_inside, H, DH, BLOCK_Q)
    tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F)
    tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F)
    weights, normaliser = weights_of(pair_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), None, PRECISION), factor, F,
                                     NEGATE)
    if DROPOUT:
        weights = tl.where(keep_of(seed, pair, limit, Q, F, BLOCK_Q, BLOCK_F), weights, 0.0)
        normaliser *= inverse_keep
    tile_o = pair_dot(weights.to(tile_v.dtype), tile_v, None, PRECISION) * normaliser
    offsets = offsets_of(pair, column, Q * H * DH, H * DH, H, DH, BLOCK_Q)
    tl.store(out + offsets, tile_o.to(out.dtype.element_ty), mask=q_inside)


@triton.jit
def backward_kernel(
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
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One pass: do, q, k, v read once, dq, dk, dv written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, BLOCK_D)
    q_inside = inside_of(pair, column, pairs, Q, DH, BLOCK_Q)
    inside = inside_of(pair, column, pairs, F, DH, BLOCK_F)
    tile_q = tile_of(q, pair, column, q_stride_b, q_stride_t, q_inside, H, DH, BLOCK_Q)
    tile_k = tile_of(k, pair, column, k_stride_b, k_stride_t, inside, H, DH, BLOCK_F)
    q_offsets = offsets_of(pair, column, Q * Q_GRAD, Q_GRAD, H, DH, BLOCK_Q)
    offsets = offsets_of(pair, column, F * F_GRAD, F_GRAD, H, DH, BLOCK_F)

    weights, normaliser = weights_of(pair_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), None, PRECISION), factor, F,
                                     NEGATE)
    weights *= normaliser
    tile_o = tile_of(grad_out, pair, column, o_stride_b, o_stride_t, q_inside, H, DH, BLOCK_Q)
    dropped = weights
    if DROPOUT:
        keep = keep_of(seed, pair, limit, Q, F, BLOCK_Q, BLOCK_F)
        dropped = tl.where(keep, weights * inverse_keep, 0.0)
    grad_v = pair_dot(tl.permute(dropped.to(tile_o.dtype), (0, 2, 1)), tile_o, None, PRECISION)
    tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), mask=inside)

    tile_v = tile_of(v, pair, column, v_stride_b, v_stride_t, inside, H, DH, BLOCK_F)
    grad_weights = pair_dot(tile_o, tl.permute(tile_v, (0, 2, 1)), None, PRECISION)
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    grad_logits = (grad_logits * scale).to(tile_q.dtype)
    grad_q = pair_dot(grad_logits, tile_k, None, PRECISION)
    tl.store(dq + q_offsets, grad_q.to(dq.dtype.element_ty), mask=q_inside)
    grad_k = pair_dot(tl.permute(grad_logits, (0, 2, 1)), tile_q, None, PRECISION)
    tl.store(dk + offsets, grad_k.to(dk.dtype.element_ty), mask=inside)

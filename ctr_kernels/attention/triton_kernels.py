"""The kernels of attention over fields in Triton; triton.py has the formulas, the traffic and the launches."""

import triton
import triton.language as tl

from ..triton_support import dot, dropout_keep, exp2_flushed


@triton.jit
def _offsets(pair, column, stride_b, stride_f, H: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr):
    """int64 [PAIRS, BLOCK_F, columns]: where element (field, column) of each pair lies in a [B, F, H DH] tensor."""
    start = (pair // H) * stride_b + (pair % H) * DH  # [PAIRS]
    field = tl.arange(0, BLOCK_F).to(tl.int64) * stride_f
    return start[:, None, None] + field[None, :, None] + column[None, None, :]


@triton.jit
def _inside(pair, column, pairs, F: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr):
    """bool [PAIRS, BLOCK_F, columns]: true where there is an element."""
    inside = (pair < pairs)[:, None, None] & (tl.arange(0, BLOCK_F) < F)[None, :, None]
    return inside & (column < DH)[None, None, :]


@triton.jit
def _tile(x, pair, column, stride_b, stride_f, inside, H: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr):
    """[PAIRS, BLOCK_F, columns] of a [B, F, H DH] tensor; zero where `inside` is false."""
    return tl.load(x + _offsets(pair, column, stride_b, stride_f, H, DH, BLOCK_F), mask=inside, other=0.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for each pair; acc may be None. Where there is one pair a 2-D dot, which several warps share; else 3-D,
    one warp a pair."""
    if a.shape[0] == 1:
        flat_a, flat_b = tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2]))
        flat_acc = None if acc is None else tl.reshape(acc, (a.shape[1], b.shape[2]))
        return tl.reshape(dot(flat_a, flat_b, flat_acc, PRECISION), (1, a.shape[1], b.shape[2]))
    return dot(a, b, acc, PRECISION)


@triton.jit
def _weights(logits, factor, F: tl.constexpr, NEGATE: tl.constexpr):
    """exp(S - max S) [PAIRS, BLOCK_F, BLOCK_F], 0 for padded keys, and the inverse row sums [PAIRS, BLOCK_F, 1].

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
def _keep(seed, pair, limit, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Keep-mask of dropout, bool [PAIRS, BLOCK_F, BLOCK_F]; the row of the map is pair * F + query."""
    PAIRS: tl.constexpr = pair.shape[0]
    GROUPS: tl.constexpr = (BLOCK_F + 31) // 32
    rows = tl.reshape(pair[:, None] * F + tl.arange(0, BLOCK_F)[None, :], (PAIRS * BLOCK_F,))
    keep = dropout_keep(tl.load(seed), rows, 0, (F + 31) // 32, limit, GROUPS)
    return tl.reshape(keep, (PAIRS, BLOCK_F, GROUPS * 32))


@triton.jit
def forward_kernel(
    q, k, v,  # [B, F, H DH] each; strides below, last one 1
    out,  # [B, F, H DH], contiguous
    seed,  # int64 [1]; None without DROPOUT
    q_stride_b, q_stride_f, k_stride_b, k_stride_f, v_stride_b, v_stride_f,
    pairs,  # B H
    factor, limit, inverse_keep,
    F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One pass: q, k, v read once, o written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, BLOCK_D)
    inside = _inside(pair, column, pairs, F, DH, BLOCK_F)
    tile_q = _tile(q, pair, column, q_stride_b, q_stride_f, inside, H, DH, BLOCK_F)
    tile_k = _tile(k, pair, column, k_stride_b, k_stride_f, inside, H, DH, BLOCK_F)
    tile_v = _tile(v, pair, column, v_stride_b, v_stride_f, inside, H, DH, BLOCK_F)
    weights, normaliser = _weights(_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), None, PRECISION), factor, F, NEGATE)
    if DROPOUT:
        weights = tl.where(_keep(seed, pair, limit, F, BLOCK_F), weights, 0.0)
        normaliser *= inverse_keep
    tile_o = _dot(weights.to(tile_v.dtype), tile_v, None, PRECISION) * normaliser
    offsets = _offsets(pair, column, F * H * DH, H * DH, H, DH, BLOCK_F)
    tl.store(out + offsets, tile_o.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_out, q, k, v,  # [B, F, H DH] each; strides below, last one 1
    grads,  # [B, F, 3 H DH], contiguous: dq | dk | dv
    seed,  # int64 [1]; None without DROPOUT
    o_stride_b, o_stride_f, q_stride_b, q_stride_f, k_stride_b, k_stride_f, v_stride_b, v_stride_f,
    pairs,  # B H
    factor, scale, limit, inverse_keep,
    F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One pass: do, q, k, v read once, dq, dk, dv written once."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, BLOCK_D)
    inside = _inside(pair, column, pairs, F, DH, BLOCK_F)
    tile_q = _tile(q, pair, column, q_stride_b, q_stride_f, inside, H, DH, BLOCK_F)
    tile_k = _tile(k, pair, column, k_stride_b, k_stride_f, inside, H, DH, BLOCK_F)
    offsets = _offsets(pair, column, F * 3 * H * DH, 3 * H * DH, H, DH, BLOCK_F)

    weights, normaliser = _weights(_dot(tile_q, tl.permute(tile_k, (0, 2, 1)), None, PRECISION), factor, F, NEGATE)
    weights *= normaliser
    tile_o = _tile(grad_out, pair, column, o_stride_b, o_stride_f, inside, H, DH, BLOCK_F)
    dropped = weights
    if DROPOUT:
        keep = _keep(seed, pair, limit, F, BLOCK_F)
        dropped = tl.where(keep, weights * inverse_keep, 0.0)
    grad_v = _dot(tl.permute(dropped.to(tile_o.dtype), (0, 2, 1)), tile_o, None, PRECISION)
    tl.store(grads + offsets + 2 * H * DH, grad_v.to(grads.dtype.element_ty), mask=inside)

    tile_v = _tile(v, pair, column, v_stride_b, v_stride_f, inside, H, DH, BLOCK_F)
    grad_weights = _dot(tile_o, tl.permute(tile_v, (0, 2, 1)), None, PRECISION)
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    grad_logits = (grad_logits * scale).to(tile_q.dtype)
    grad_q = _dot(grad_logits, tile_k, None, PRECISION)
    tl.store(grads + offsets, grad_q.to(grads.dtype.element_ty), mask=inside)
    grad_k = _dot(tl.permute(grad_logits, (0, 2, 1)), tile_q, None, PRECISION)
    tl.store(grads + offsets + H * DH, grad_k.to(grads.dtype.element_ty), mask=inside)


@triton.jit
def sliced_backward_kernel(
    grad_out, q, k, v,  # [B, F, H DH] each; strides below, last one 1
    grads,  # [B, F, 3 H DH], contiguous: dq | dk | dv
    seed,  # int64 [1]; None without DROPOUT
    o_stride_b, o_stride_f, q_stride_b, q_stride_f, k_stride_b, k_stride_f, v_stride_b, v_stride_f,
    pairs,  # B H
    factor, scale, limit, inverse_keep,
    F: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NEGATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
):
    """`backward_kernel` with SLICE columns at a time: S and P stay in registers; q and k come from the cache again.

    The loops keep their invariants inside: a map's operand, in two parts at "tf32x3", would fill the registers.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    logits = tl.zeros((PAIRS, BLOCK_F, BLOCK_F), tl.float32)
    for first in tl.range(0, BLOCK_D, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        inside = _inside(pair, column, pairs, F, DH, BLOCK_F)
        tile_q = _tile(q, pair, column, q_stride_b, q_stride_f, inside, H, DH, BLOCK_F)
        tile_k = _tile(k, pair, column, k_stride_b, k_stride_f, inside, H, DH, BLOCK_F)
        logits = _dot(tile_q, tl.permute(tile_k, (0, 2, 1)), logits, PRECISION)
    weights, normaliser = _weights(logits, factor, F, NEGATE)
    weights *= normaliser
    dropped = weights
    if DROPOUT:
        keep = _keep(seed, pair, limit, F, BLOCK_F)
        dropped = tl.where(keep, weights * inverse_keep, 0.0)
    dropped = dropped.to(grad_out.dtype.element_ty)

    grad_weights = tl.zeros((PAIRS, BLOCK_F, BLOCK_F), tl.float32)
    for first in tl.range(0, BLOCK_D, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        inside = _inside(pair, column, pairs, F, DH, BLOCK_F)
        offsets = _offsets(pair, column, F * 3 * H * DH, 3 * H * DH, H, DH, BLOCK_F)
        tile_o = _tile(grad_out, pair, column, o_stride_b, o_stride_f, inside, H, DH, BLOCK_F)
        tile_v = _tile(v, pair, column, v_stride_b, v_stride_f, inside, H, DH, BLOCK_F)
        grad_weights = _dot(tile_o, tl.permute(tile_v, (0, 2, 1)), grad_weights, PRECISION)
        grad_v = _dot(tl.permute(dropped, (0, 2, 1)), tile_o, None, PRECISION)
        tl.store(grads + offsets + 2 * H * DH, grad_v.to(grads.dtype.element_ty), mask=inside)
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    grad_logits = (grad_logits * scale).to(q.dtype.element_ty)
    for first in tl.range(0, BLOCK_D, SLICE, num_stages=1, disable_licm=True):
        column = first + tl.arange(0, SLICE)
        inside = _inside(pair, column, pairs, F, DH, BLOCK_F)
        offsets = _offsets(pair, column, F * 3 * H * DH, 3 * H * DH, H, DH, BLOCK_F)
        tile_k = _tile(k, pair, column, k_stride_b, k_stride_f, inside, H, DH, BLOCK_F)
        grad_q = _dot(grad_logits, tile_k, None, PRECISION)
        tl.store(grads + offsets, grad_q.to(grads.dtype.element_ty), mask=inside)
        tile_q = _tile(q, pair, column, q_stride_b, q_stride_f, inside, H, DH, BLOCK_F)
        grad_k = _dot(tl.permute(grad_logits, (0, 2, 1)), tile_q, None, PRECISION)
        tl.store(grads + offsets + H * DH, grad_k.to(grads.dtype.element_ty), mask=inside)

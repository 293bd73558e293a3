"""Attention over the fields of a row in Triton: the whole F x F map of a head stays in registers, both ways.

A program takes PAIRS of (sample, head), one warp each at F <= 32: fields padded to BLOCK_F = 16, 32 or 64, head
columns to BLOCK_D >= 16, all dots 3-D with the pair as batch. With S = scale q k^T, P = softmax(S), M the dropout
multipliers (0 or 1 / (1 - p)):

    o = (P M) v
    dv = (P M)^T do,  dP = (do v^T) M,  dS = P (dP - rowsum(P dP)),  dq = scale dS k,  dk = scale dS^T q

The backward recomputes S and P, and writes dq | dk | dv into one [B, F, 3 D] tensor. Nothing but q, k, v is kept.

Traffic next to the floor, B=4096, F=27, D=64, H=4, fp32 (elements of e bytes; n = B F D = 7.1 M elements):
    forward    4 n e = 113 MB, the floor (q, k, v read, o written); 4 B H F^2 d = 0.76 GFLOP, 1.07 padded to 32
    backward   7 n e = 198 MB, the floor (do, q, k, v read, dq, dk, dv written); 10 B H F^2 d = 1.9 GFLOP, 2.7 padded

Occupancy at F <= 32 and d = 16 (RESIDENT): forward 16 warps a multiprocessor in fp32 and 24 in half precision,
backward 8 and 16; elsewhere 8 at least. All loads and stores are 16 bytes a thread. Nothing spills but the backward
for F > 32 on sm_80 at d >= 32 in fp32 and at d = 64 in half precision, in every configuration tried.

At "highest" precision fp32 dots are three TF32 MMAs each: 96 `mma.m16n8k8` a pair forward and 240 backward, against
1,024 and 2,560 FMA instructions a lane with "ieee", which also reads every operand from shared memory many times.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from ..library import LIBRARY, last_dim_contiguous, no_double_backward
from ..philox import threshold
from ..triton_autotune import launch_choice
from ..triton_support import (
    CAPABILITIES,
    Spec,
    architecture,
    capability,
    dot,
    dropout_keep,
    exp2_flushed,
    input_precision,
    register,
)
from .native import _fake, _fake_backward, _fake_packed, _fake_packed_backward, _save, _save_packed

LOG2_E = 1.4426950408889634
SMALLEST_NORMAL = 2.0**-126

# Launch configurations, (pairs a program, warps): the default by BLOCK_F; and, where that would spill, by direction,
# arithmetic ("half": fp16 and bf16), BLOCK_F, BLOCK_D and architecture (ANY: where it has no row of its own).
ANY = 0
DEFAULT = {32: (4, 4), 64: (1, 4)}
LAUNCH: dict[tuple[str, str, int, int, int], tuple[int, int]] = {
    ("backward", "fp32", 32, 32, ANY): (1, 2),
    ("forward", "fp32", 32, 64, ANY): (1, 4),
    ("backward", "fp32", 32, 64, ANY): (1, 4),
    ("backward", "fp32", 64, 64, ANY): (1, 8),
    ("forward", "fp32", 64, 64, 80): (1, 8),
    ("backward", "fp32", 64, 64, 80): (1, 4),
    ("backward", "half", 64, 64, 80): (1, 8),
}
# Warps that a multiprocessor holds at once, by direction and arithmetic, at the tuned F <= 32 and d = 16.
RESIDENT = {("forward", "fp32"): 16, ("forward", "half"): 24, ("backward", "fp32"): 8, ("backward", "half"): 16}


@triton.jit
def _offsets(pair, stride_b, stride_f, H: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr,
             BLOCK_D: tl.constexpr):
    """int64 [PAIRS, BLOCK_F, BLOCK_D]: where element (field, column) of each pair lies in a [B, F, H DH] tensor."""
    start = (pair // H) * stride_b + (pair % H) * DH  # [PAIRS]
    field = tl.arange(0, BLOCK_F).to(tl.int64) * stride_f
    return start[:, None, None] + field[None, :, None] + tl.arange(0, BLOCK_D)[None, None, :]


@triton.jit
def _inside(pair, pairs, F: tl.constexpr, DH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):
    """bool [PAIRS, BLOCK_F, BLOCK_D]: true where there is an element."""
    inside = (pair < pairs)[:, None, None] & (tl.arange(0, BLOCK_F) < F)[None, :, None]
    return inside & (tl.arange(0, BLOCK_D) < DH)[None, None, :]


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b for each pair: a 2-D dot, which several warps share, where there is one pair; else 3-D, one warp a pair."""
    if a.shape[0] == 1:
        flat_a, flat_b = tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2]))
        return tl.reshape(dot(flat_a, flat_b, None, PRECISION), (1, a.shape[1], b.shape[2]))
    return dot(a, b, None, PRECISION)


@triton.jit
def _weights(q, k, factor, F: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr):
    """exp(S - max S) [PAIRS, BLOCK_F, BLOCK_F], 0 for padded keys, and the inverse row sums [PAIRS, BLOCK_F, 1].

    factor = |scale| log2(e), at least the smallest normal number. The maximum is subtracted before the factor, so
    that its weight is exactly 1: of logits of thousands, a rounding after the factor would reach the gradients.
    """
    logits = _dot(q, tl.permute(k, (0, 2, 1)), PRECISION)
    if NEGATE:
        logits = -logits
    logits = tl.where((tl.arange(0, q.shape[1]) < F)[None, None, :], logits, float("-inf"))
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
def _forward_kernel(
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
    inside = _inside(pair, pairs, F, DH, BLOCK_F, BLOCK_D)
    tile_q = tl.load(q + _offsets(pair, q_stride_b, q_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    tile_k = tl.load(k + _offsets(pair, k_stride_b, k_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    tile_v = tl.load(v + _offsets(pair, v_stride_b, v_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    weights, normaliser = _weights(tile_q, tile_k, factor, F, NEGATE, PRECISION)
    if DROPOUT:
        weights = tl.where(_keep(seed, pair, limit, F, BLOCK_F), weights, 0.0)
        normaliser *= inverse_keep
    tile_o = _dot(weights.to(tile_v.dtype), tile_v, PRECISION) * normaliser
    offsets = _offsets(pair, F * H * DH, H * DH, H, DH, BLOCK_F, BLOCK_D)
    tl.store(out + offsets, tile_o.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
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
    inside = _inside(pair, pairs, F, DH, BLOCK_F, BLOCK_D)
    tile_q = tl.load(q + _offsets(pair, q_stride_b, q_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    tile_k = tl.load(k + _offsets(pair, k_stride_b, k_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    offsets = _offsets(pair, F * 3 * H * DH, 3 * H * DH, H, DH, BLOCK_F, BLOCK_D)

    weights, normaliser = _weights(tile_q, tile_k, factor, F, NEGATE, PRECISION)
    weights *= normaliser
    tile_o = tl.load(grad_out + _offsets(pair, o_stride_b, o_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    dropped = weights
    if DROPOUT:
        keep = _keep(seed, pair, limit, F, BLOCK_F)
        dropped = tl.where(keep, weights * inverse_keep, 0.0)
    grad_v = _dot(tl.permute(dropped.to(tile_o.dtype), (0, 2, 1)), tile_o, PRECISION)
    tl.store(grads + offsets + 2 * H * DH, grad_v.to(grads.dtype.element_ty), mask=inside)

    tile_v = tl.load(v + _offsets(pair, v_stride_b, v_stride_f, H, DH, BLOCK_F, BLOCK_D), mask=inside, other=0.0)
    grad_weights = _dot(tile_o, tl.permute(tile_v, (0, 2, 1)), PRECISION)
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * inverse_keep, 0.0)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    grad_logits = (grad_logits * scale).to(tile_q.dtype)
    grad_q = _dot(grad_logits, tile_k, PRECISION)
    tl.store(grads + offsets, grad_q.to(grads.dtype.element_ty), mask=inside)
    grad_k = _dot(tl.permute(grad_logits, (0, 2, 1)), tile_q, PRECISION)
    tl.store(grads + offsets + H * DH, grad_k.to(grads.dtype.element_ty), mask=inside)


def _block_f(fields: int) -> int:
    return 32 if fields <= 32 else 64


CANDIDATES = list(itertools.product((1, 2, 4, 8), (1, 2, 4, 8)))  # of a search


def _table_key(direction: str, fields: int, head_dim: int, dtype: torch.dtype,
               cc: int) -> tuple[str, str, int, int, int]:
    """The row of LAUNCH on sm_<cc>."""
    arithmetic = "fp32" if dtype == torch.float32 else "half"
    return direction, arithmetic, _block_f(fields), max(16, head_dim), architecture(cc)


def _launch(key: tuple[str, str, int, int, int]) -> tuple[int, int]:
    """(pairs a program, warps) of the table."""
    return LAUNCH.get(key, LAUNCH.get((*key[:-1], ANY), DEFAULT[key[2]]))


def _constants(fields: int, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float,
               dropout_p: float) -> dict[str, Any]:
    """What both kernels take alike, next to their tensors, strides and launch configuration."""
    return {
        "factor": max(abs(scale) * LOG2_E, SMALLEST_NORMAL), "limit": threshold(dropout_p),
        "inverse_keep": 1.0 / (1.0 - dropout_p), "F": fields, "H": num_heads, "DH": head_dim,
        "BLOCK_F": _block_f(fields), "BLOCK_D": max(16, head_dim), "NEGATE": scale < 0,
        "DROPOUT": dropout_p > 0.0, "PRECISION": input_precision(dtype),
    }


def _run(kernel: Any, direction: str, tensors: tuple[torch.Tensor | None, ...], strided: tuple[torch.Tensor, ...],
         num_heads: int, scale: float, dropout_p: float) -> None:
    """Launch a kernel on `tensors` with the strides of `strided`, the first of which is [B, F, D]."""
    batch, fields, dim = strided[0].shape
    if not batch:
        return
    dtype, head_dim, pairs = strided[0].dtype, dim // num_heads, batch * num_heads
    strides = [stride for x in strided for stride in x.stride()[:2]]
    constants = _constants(fields, num_heads, head_dim, dtype, scale, dropout_p)
    if direction == "backward":
        constants["scale"] = scale

    def run(choice: tuple[int, int]) -> None:
        with torch.cuda.device_of(strided[0]):
            kernel[(triton.cdiv(pairs, choice[0]),)](*tensors, *strides, pairs, PAIRS=choice[0], num_warps=choice[1],
                                                     **constants)

    key = _table_key(direction, fields, head_dim, dtype, capability(strided[0].device))
    run(launch_choice(key, _launch(key), CANDIDATES, run))


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float, dropout_p: float,
             seed: torch.Tensor | None) -> torch.Tensor:
    """[B, F, D] x 3, last dimension contiguous -> [B, F, D]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _run(_forward_kernel, "forward", (q, k, v, out, seed), (q, k, v), num_heads, scale, dropout_p)
    return out


def _backward(grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int,
              scale: float, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """dq | dk | dv in one [B, F, 3 D]."""
    batch, fields, dim = q.shape
    grads = torch.empty(batch, fields, 3 * dim, dtype=q.dtype, device=q.device)
    _run(_backward_kernel, "backward", (grad_out, q, k, v, grads, seed), (grad_out, q, k, v), num_heads, scale,
         dropout_p)
    return grads


def _forward_packed(qkv: torch.Tensor, num_heads: int, scale: float, dropout_p: float,
                    seed: torch.Tensor | None) -> torch.Tensor:
    return _forward(*qkv.chunk(3, dim=-1), num_heads, scale, dropout_p, seed)


def _backward_packed(grad_out: torch.Tensor, qkv: torch.Tensor, num_heads: int, scale: float, dropout_p: float,
                     seed: torch.Tensor | None) -> torch.Tensor:
    return _backward(grad_out, *qkv.chunk(3, dim=-1), num_heads, scale, dropout_p, seed)


def _grads(ctx: Any, grad_out: torch.Tensor) -> tuple:
    q, k, v, seed = ctx.saved_tensors
    grads = torch.ops.ctr.field_attention_triton_backward(last_dim_contiguous(grad_out), q, k, v, *ctx.settings, seed)
    return *grads.chunk(3, dim=-1), None, None, None, None


def _grad_packed(ctx: Any, grad_out: torch.Tensor) -> tuple:
    qkv, seed = ctx.saved_tensors
    grad_out = last_dim_contiguous(grad_out)
    grad = torch.ops.ctr.field_attention_packed_triton_backward(grad_out, qkv, *ctx.settings, seed)
    return grad, None, None, None, None


SETTINGS = "int num_heads, float scale, float dropout_p, Tensor? seed) -> Tensor"
register("field_attention_triton", f"(Tensor q, Tensor k, Tensor v, {SETTINGS}", _forward, _fake)
register("field_attention_triton_backward", f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, {SETTINGS}", _backward,
         _fake_backward)
register("field_attention_packed_triton", f"(Tensor qkv, {SETTINGS}", _forward_packed, _fake_packed)
register("field_attention_packed_triton_backward", f"(Tensor grad_out, Tensor qkv, {SETTINGS}", _backward_packed,
         _fake_packed_backward)
torch.library.register_autograd("ctr::field_attention_triton", _grads, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("ctr::field_attention_packed_triton", _grad_packed, setup_context=_save_packed,
                                lib=LIBRARY)
no_double_backward("ctr::field_attention_triton_backward")
no_double_backward("ctr::field_attention_packed_triton_backward")


def field_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """[B, F, D] x 3, fp32, bf16 or fp16, any strides of B and F -> [B, F, D]; backward keeps q, k, v alone."""
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    return torch.ops.ctr.field_attention_triton(q, k, v, num_heads, scale, dropout_p, seed)


def field_attention_packed_triton(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """q | k | v in one projection [B, F, 3 D] -> [B, F, D]; its gradient is written in one piece."""
    return torch.ops.ctr.field_attention_packed_triton(last_dim_contiguous(qkv), num_heads, scale, dropout_p, seed)


def aot_specs() -> list[Spec]:
    """Both kernels in every shape class, with dropout and the strides of one projection; H=4, F=27 or 64."""
    specs = []
    kernels = (("forward", _forward_kernel), ("backward", _backward_kernel))
    for block_f, width, dtype, (direction, kernel), cc in itertools.product(
            (32, 64), (16, 32, 64), (torch.float32, torch.bfloat16), kernels, CAPABILITIES):
        fields, kind = (27, 64)[block_f == 64], ("bf16", "fp32")[dtype == torch.float32]
        pairs, warps = _launch(_table_key(direction, fields, width, dtype, cc))
        constexprs = _constants(fields, 4, width, dtype, 1.0, 0.1) | {"PAIRS": pairs}
        kinds = {"seed": "*i64", "pairs": "i32", "limit": "i32"}
        kinds |= dict.fromkeys(("factor", "scale", "inverse_keep"), "fp32")
        for name in ("factor", "limit", "inverse_keep"):
            del constexprs[name]
        signature = {name: kinds.get(name, "i32:16" if "stride" in name else f"*{kind}")
                     for name in kernel.arg_names if name not in constexprs}
        resident = RESIDENT[direction, "fp32" if kind == "fp32" else "half"] if (block_f, width) == (32, 16) else 8
        specs.append(Spec(kernel, signature, constexprs, warps, f"{direction} {kind} F {fields} d {width}", (cc,),
                          tensor_cores=True, resident_warps=resident, tuned=block_f == 32 or width == 16))
    return specs

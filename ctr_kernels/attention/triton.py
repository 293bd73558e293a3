"""Attention over the fields of a row in Triton: the whole Q x F map of a head stays in registers, both ways.

A program takes PAIRS of (sample, head), one warp each at F <= 32: queries and fields padded to BLOCK = 32, 64 or 128,
head columns to BLOCK_D = 16, 32, 64 or 128, all dots 3-D with the pair as batch, 2-D where there is one pair. With
S = scale q k^T, P = softmax(S), M the dropout multipliers (0 or 1 / (1 - p)):

    o = (P M) v
    dv = (P M)^T do,  dP = (do v^T) M,  dS = P (dP - rowsum(P dP)),  dq = scale dS k,  dk = scale dS^T q

The backward recomputes S and P, and writes dq, dk, dv once, apart or as thirds of one [B, F, 3 D] tensor. Nothing but
q, k, v is kept. One query has kernels of its own (triton_query.py): products and sums in place of dots.

Traffic next to the floor, B=4096, F=27, D=64, H=4, fp32 (elements of e bytes; n = B F D = 7.1 M elements):
    forward    4 n e = 113 MB, the floor (q, k, v read, o written); 4 B H F^2 d = 0.76 GFLOP, 1.07 padded to 32
    backward   7 n e = 198 MB, the floor (do, q, k, v read, dq, dk, dv written); 10 B H F^2 d = 1.9 GFLOP, 2.7 padded
and of one query, m = B D elements:
    forward    2 (n + m) e = 59 MB, the floor (k, v, q read, o written); 4 B H F d = 0.03 GFLOP
    backward   (4 n + 3 m) e = 116 MB, the floor (do, q, k, v read, dq, dk, dv written)

Where all columns of a head at once would spill, or exceed the shared memory, kernels take a slice of them at a time
(triton_sliced.py): the forward at no other traffic, the backward with q and k once more from the cache.

Occupancy at F <= 32 and d = 16 (RESIDENT): forward 16 warps a multiprocessor in fp32 and 24 in half precision,
backward 8 and 16; elsewhere 8 at least. All loads and stores are 16 bytes a thread where d is a multiple of 16 bytes.

At "highest" precision fp32 dots are three of fp16: 48 `mma.m16n8k16` a pair forward and 120 backward, against 1,024
and 2,560 FMA instructions a lane with "ieee", which also reads every operand from shared memory many times.
Measured on an H200 (docs/kernels/gpu.md): 62% of a copy's bandwidth forward in bf16, 66% in fp32.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from ..library import last_dim_contiguous
from ..philox import threshold
from ..triton_launch import (
    ANY,
    Key,
    architecture,
    arithmetic_of,
    capability,
    input_precision,
    is_measured,
    launch_choice,
    row_of,
    table_choice,
)
from ..triton_support import CAPABILITIES, Spec
from .triton_blocked import blocked_backward_kernel, blocked_forward_kernel
from .triton_kernels import backward_kernel, forward_kernel
from .triton_query import query_backward_kernel, query_forward_kernel
from .triton_sliced import sliced_backward_kernel, sliced_forward_kernel

Tensor = torch.Tensor
LOG2_E = 1.4426950408889634
SMALLEST_NORMAL = 2.0**-126


class Launch(NamedTuple):
    """A launch configuration: pairs a program, warps, and columns of a head and queries at a time, 0 for all."""

    pairs: int
    warps: int
    columns: int = 0
    queries: int = 0


# By the larger of BLOCK_Q and BLOCK_F; and, where that would spill, by direction, arithmetic ("fp32": both of it),
# that block, BLOCK_D and architecture.
DEFAULT = {32: Launch(4, 4), 64: Launch(1, 4), 128: Launch(1, 8)}
LAUNCH: dict[tuple, Launch] = {
    ("backward", "fp32", 32, 32, ANY): Launch(1, 2),
    ("forward", "fp32", 32, 64, ANY): Launch(1, 4),
    ("backward", "fp32", 32, 64, ANY): Launch(1, 4),
    ("backward", "fp32", 64, 32, 80): Launch(1, 8, 16),
    ("backward", "fp32", 64, 64, ANY): Launch(1, 8),
    ("forward", "fp32", 64, 64, 80): Launch(1, 8),
    ("backward", "fp32", 64, 64, 80): Launch(1, 8, 16),
    ("backward", "half", 64, 64, 80): Launch(1, 8, 32),
    ("forward", "fp32", 32, 128, ANY): Launch(1, 4),
    ("forward", "fp32", 32, 128, 100): Launch(1, 4, 64),
    ("backward", "fp32", 32, 128, ANY): Launch(1, 4, 32),
    ("backward", "half", 32, 128, ANY): Launch(1, 4),
    ("forward", "fp32", 64, 128, ANY): Launch(1, 8, 32),
    ("forward", "fp32", 64, 128, 90): Launch(1, 4),
    ("backward", "fp32", 64, 128, ANY): Launch(1, 8, 32),
    ("backward", "fp32", 64, 128, 80): Launch(1, 8, 16),
    ("backward", "half", 64, 128, 80): Launch(1, 8, 32),
    **{("forward", "fp32", 128, width, 80): Launch(1, 4, 16, 32) for width in (32, 64, 128)},
    ("forward", "fp32", 128, 128, ANY): Launch(1, 4, 16, 32),
    ("forward", "half", 128, 128, 80): Launch(1, 8, 32, 64),
    **{("backward", "fp32", 128, width, 80): Launch(1, 8, 16, 32) for width in (16, 32, 64, 128)},
    **{("backward", "fp32", 128, width, ANY): Launch(1, 8, 32, 16) for width in (32, 64, 128)},
    **{("backward", "half", 128, width, 80): Launch(1, 8, 16, 32) for width in (16, 32)},
    **{("backward", "half", 128, width, 80): Launch(1, 8, 32, 32) for width in (64, 128)},
}
# Warps that a multiprocessor holds at once, by direction and arithmetic, at the tuned F <= 32 and d = 16.
RESIDENT = {("forward", "fp32"): 16, ("forward", "half"): 24, ("backward", "fp32"): 8, ("backward", "half"): 16}
QUERY_ELEMENTS = 1024  # of k that a warp has at once where there is one query


def _block(tokens: int) -> int:
    """Queries or fields as a tile has them."""
    return max(32, triton.next_power_of_2(tokens))


def launch_key(direction: str, queries: int, fields: int, head_dim: int, dtype: torch.dtype, cc: int) -> Key:
    """shape: BLOCK_Q, 1 for one query of several fields, BLOCK_F and BLOCK_D."""
    shape = (1 if queries == 1 < fields else _block(queries), _block(fields), max(16, triton.next_power_of_2(head_dim)))
    return Key("attention", direction, shape, arithmetic_of(dtype), architecture(cc))


def default(key: Key) -> Launch:
    """What the tables have."""
    block_q, block_f, block_d = key.shape
    if block_q == 1:
        return Launch(1, max(1, block_f * block_d // QUERY_ELEMENTS))
    block, width = max(block_q, block_f), "half" if key.arithmetic == "half" else "fp32"
    return row_of(LAUNCH, key.kernel, width, block, block_d, key.architecture) or DEFAULT[block]


def candidates(key: Key) -> Iterator[Launch]:
    """What a search tries: more than two pairs a warp spill, and take long to compile."""
    block_q, block_f, block_d = key.shape
    if block_q == 1:
        yield from (Launch(pairs, warps) for pairs, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8))
                    if pairs * block_f * block_d <= 4 * QUERY_ELEMENTS * warps)
        return
    yield from (Launch(pairs, warps) for pairs, warps in itertools.product((1, 2, 4, 8), repeat=2)
                if pairs <= 2 * warps)
    yield from (Launch(1, warps, columns) for warps in (4, 8) for columns in (16, 32, 64) if columns < block_d)
    if block_q == 128:
        yield from (Launch(1, warps, columns, queries) for warps in (4, 8) for columns in (16, 32, 64)
                    for queries in (32, 64) if columns <= block_d)


KERNELS = {("forward", "query"): query_forward_kernel, ("backward", "query"): query_backward_kernel,
           ("forward", "whole"): forward_kernel, ("backward", "whole"): backward_kernel,
           ("forward", "sliced"): sliced_forward_kernel, ("backward", "sliced"): sliced_backward_kernel,
           ("forward", "blocked"): blocked_forward_kernel, ("backward", "blocked"): blocked_backward_kernel}


def _kernel(key: Key, launch: Launch) -> tuple[Any, dict[str, int]]:
    """The kernel, and its constants of the launch configuration."""
    constants = {"PAIRS": launch.pairs}
    if launch.queries:
        return KERNELS[key.kernel, "blocked"], {**constants, "SLICE": launch.columns, "QUERIES": launch.queries}
    if launch.columns:
        return KERNELS[key.kernel, "sliced"], {**constants, "SLICE": launch.columns}
    return KERNELS[key.kernel, "query" if key.shape[0] == 1 else "whole"], constants


def _constants(key: Key, queries: int, fields: int, num_heads: int, head_dim: int, scale: float,
               dropout_p: float, precision: str) -> dict[str, Any]:
    """What all kernels take alike, next to their tensors, strides and launch configuration."""
    return {
        "factor": max(abs(scale) * LOG2_E, SMALLEST_NORMAL), "limit": threshold(dropout_p),
        "inverse_keep": 1.0 / (1.0 - dropout_p), "Q": queries, "F": fields, "H": num_heads, "DH": head_dim,
        **dict(zip(("BLOCK_Q", "BLOCK_F", "BLOCK_D"), key.shape, strict=True)), "NEGATE": scale < 0,
        "DROPOUT": dropout_p > 0.0, "PRECISION": precision,
    }


def _run(direction: str, strided: tuple[Tensor, ...], written: tuple[Tensor, ...], num_heads: int, scale: float,
         dropout_p: float, seed: Tensor | None) -> None:
    """Launch the kernel that reads the tensors of `strided`, of which the last two are [B, F, E], the others [B, Q, E],
    and writes those of `written`."""
    (batch, queries, dim), fields, device = strided[0].shape, strided[-1].shape[1], strided[0].device
    if not batch:
        return
    dtype, head_dim, pairs = strided[0].dtype, dim // num_heads, batch * num_heads
    strides = [stride for x in strided for stride in x.stride()[:2]]
    key = launch_key(direction, queries, fields, head_dim, dtype, capability(device))
    constants = _constants(key, queries, fields, num_heads, head_dim, scale, dropout_p, input_precision(dtype))
    if direction == "backward":
        constants |= {"scale": scale, "Q_GRAD": written[0].stride(1), "F_GRAD": written[1].stride(1)}

    def run(launch: Launch) -> None:
        kernel, own = _kernel(key, launch)
        with torch.cuda.device_of(strided[0]):
            kernel[(_programs(direction, launch, pairs, queries, head_dim),)](*strided, *written, seed, *strides, pairs,
                                                        num_warps=launch.warps, **own, **constants)

    run(launch_choice(key, default, candidates, run))


def _programs(direction: str, launch: Launch, pairs: int, queries: int, head_dim: int) -> int:
    """Blocks of queries have a program each forward, slices of columns backward."""
    if not launch.queries:
        return triton.cdiv(pairs, launch.pairs)
    return pairs * (triton.cdiv(queries, launch.queries) if direction == "forward"
                    else triton.cdiv(head_dim, launch.columns))


def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, dropout_p: float,
            seed: Tensor | None) -> Tensor:
    """q [B, Q, E], k, v [B, F, E], any strides but the last -> [B, Q, E]."""
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _run("forward", (q, k, v), (out,), num_heads, scale, dropout_p, seed)
    return out


def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, dropout_p: float,
             seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, Q, E], dk, dv [B, F, E], contiguous each."""
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backward_into(grads, grad_out, q, k, v, num_heads, scale, dropout_p, seed)
    return grads


def backward_into(grads: tuple[Tensor, ...], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int,
                  scale: float, dropout_p: float, seed: Tensor | None) -> None:
    """Write dq, dk, dv to `grads`: without a gap between samples, dk and dv of the same strides."""
    strided = tuple(last_dim_contiguous(x) for x in (grad_out, q, k, v))
    _run("backward", strided, grads, num_heads, scale, dropout_p, seed)


def packed_forward(qkv: Tensor, num_heads: int, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """q | k | v [B, F, 3 E] -> [B, F, E]."""
    return forward(*last_dim_contiguous(qkv).chunk(3, dim=-1), num_heads, scale, dropout_p, seed)


def packed_backward(grad_out: Tensor, qkv: Tensor, num_heads: int, scale: float, dropout_p: float,
                    seed: Tensor | None) -> Tensor:
    """dq | dk | dv [B, F, 3 E]."""
    grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    backward_into(grads.chunk(3, dim=-1), grad_out, *last_dim_contiguous(qkv).chunk(3, dim=-1), num_heads, scale,
                  dropout_p, seed)
    return grads


# (Q, F, d) to compile without a GPU, and whether the models have it: today's, and others of the field.
AOT = [(27, 27, 16, True), (27, 27, 32, True), (27, 27, 64, True), (64, 64, 16, True), (64, 64, 32, False),
       (64, 64, 64, False), (40, 40, 24, False), (24, 24, 20, False), (100, 100, 16, False), (64, 64, 40, False),
       (128, 128, 64, False), (40, 40, 128, False), (1, 40, 16, True), (1, 128, 128, False)]


def aot_specs() -> list[Spec]:
    """The kernels at the shapes of AOT, with dropout and the strides of one projection, in heads by four."""
    return [_spec(direction, *shape, dtype, cc)
            for shape, dtype, direction, cc in itertools.product(
                AOT, (torch.float32, torch.bfloat16), ("forward", "backward"), CAPABILITIES)]


def _spec(direction: str, queries: int, fields: int, head_dim: int, tuned: bool, dtype: torch.dtype, cc: int) -> Spec:
    """One kernel, as `_run` launches it; fp32 at "highest" precision, which takes the most registers."""
    kind, precision = ("fp32", "fp16x3") if dtype == torch.float32 else ("bf16", "tf32")
    key = launch_key(direction, queries, fields, head_dim, dtype, cc)._replace(
        arithmetic="half" if kind == "bf16" else precision)
    launch = table_choice(key, default)
    kernel, own = _kernel(key, launch)
    constexprs = _constants(key, queries, fields, 4, head_dim, 1.0, 0.1, precision) | own
    if direction == "backward":
        constexprs |= {"Q_GRAD": 3 * 4 * head_dim, "F_GRAD": 3 * 4 * head_dim}
    kinds = {"seed": "*i64", "pairs": "i32", "limit": "i32"}
    kinds |= dict.fromkeys(("factor", "scale", "inverse_keep"), "fp32")
    for name in ("factor", "limit", "inverse_keep"):
        del constexprs[name]
    signature = {name: kinds.get(name, "i32:16" if "stride" in name else f"*{kind}")
                 for name in kernel.arg_names if name not in constexprs}
    resident = RESIDENT[direction, "fp32" if kind == "fp32" else "half"] if (queries, head_dim) == (27, 16) else 8
    name = f"{direction} {kind} F {fields} d {head_dim}" + (" one query" if queries == 1 else "")
    return Spec(kernel, signature, constexprs, launch.warps, name, (cc,), tensor_cores=queries > 1,
                resident_warps=resident, tuned=tuned, measured=is_measured(key),
                spills=0 if tuned else 448 if key.shape[1:] == (128, 16) else 64)

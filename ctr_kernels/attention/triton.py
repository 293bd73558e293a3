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

Where the backward of F > 32 would spill, on sm_80 at d >= 32 in fp32 and at d = 64 in half precision, it takes a slice
of the head's columns at a time, and q and k once more from the cache.

Occupancy at F <= 32 and d = 16 (RESIDENT): forward 16 warps a multiprocessor in fp32 and 24 in half precision,
backward 8 and 16; elsewhere 8 at least. All loads and stores are 16 bytes a thread, and nothing spills.

At "highest" precision fp32 dots are three TF32 MMAs each: 96 `mma.m16n8k8` a pair forward and 240 backward, against
1,024 and 2,560 FMA instructions a lane with "ieee", which also reads every operand from shared memory many times.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from ..library import LIBRARY, last_dim_contiguous, no_double_backward
from ..philox import threshold
from ..triton_autotune import launch_choice, table_choice
from ..triton_support import CAPABILITIES, Spec, architecture, capability, input_precision, register
from .native import _fake, _fake_backward, _fake_packed, _fake_packed_backward, _save, _save_packed
from .triton_kernels import backward_kernel, forward_kernel, sliced_backward_kernel

LOG2_E = 1.4426950408889634
SMALLEST_NORMAL = 2.0**-126


class Launch(NamedTuple):
    """A launch configuration: pairs a program, warps, and columns of a head at a time, 0 for all (backward only)."""

    pairs: int
    warps: int
    columns: int = 0


# The default by BLOCK_F; and, where that would spill, by direction, arithmetic ("half": fp16 and bf16), BLOCK_F,
# BLOCK_D and architecture (ANY: where it has no row of its own).
ANY = 0
DEFAULT = {32: Launch(4, 4), 64: Launch(1, 4)}
LAUNCH: dict[tuple[str, str, int, int, int], Launch] = {
    ("backward", "fp32", 32, 32, ANY): Launch(1, 2),
    ("forward", "fp32", 32, 64, ANY): Launch(1, 4),
    ("backward", "fp32", 32, 64, ANY): Launch(1, 4),
    ("backward", "fp32", 64, 32, 80): Launch(1, 8, 16),
    ("backward", "fp32", 64, 64, ANY): Launch(1, 8),
    ("forward", "fp32", 64, 64, 80): Launch(1, 8),
    ("backward", "fp32", 64, 64, 80): Launch(1, 8, 16),
    ("backward", "half", 64, 64, 80): Launch(1, 8, 32),
}
# Warps that a multiprocessor holds at once, by direction and arithmetic, at the tuned F <= 32 and d = 16.
RESIDENT = {("forward", "fp32"): 16, ("forward", "half"): 24, ("backward", "fp32"): 8, ("backward", "half"): 16}


def _block_f(fields: int) -> int:
    return 32 if fields <= 32 else 64


def _table_key(direction: str, fields: int, head_dim: int, dtype: torch.dtype,
               cc: int) -> tuple[str, str, int, int, int]:
    """The row of LAUNCH on sm_<cc>."""
    arithmetic = "fp32" if dtype == torch.float32 else "half"
    return direction, arithmetic, _block_f(fields), max(16, head_dim), architecture(cc)


def _launch(key: tuple[str, str, int, int, int]) -> Launch:
    """What the table has for that key."""
    return LAUNCH.get(key, LAUNCH.get((*key[:-1], ANY), DEFAULT[key[2]]))


def _candidates(direction: str, block_d: int) -> Iterator[Launch]:
    """What a search tries: more than two pairs a warp spill, and take long to compile."""
    yield from (Launch(pairs, warps) for pairs, warps in itertools.product((1, 2, 4, 8), repeat=2)
                if pairs <= 2 * warps)
    if direction == "backward":
        yield from (Launch(1, warps, columns) for warps in (4, 8) for columns in (16, 32) if columns < block_d)


def _kernel(direction: str, launch: Launch) -> tuple[Any, dict[str, int]]:
    """The kernel, and its constants of the launch configuration."""
    constants = {"PAIRS": launch.pairs}
    if launch.columns:
        return sliced_backward_kernel, {**constants, "SLICE": launch.columns}
    return (forward_kernel if direction == "forward" else backward_kernel), constants


def _constants(fields: int, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float,
               dropout_p: float) -> dict[str, Any]:
    """What both kernels take alike, next to their tensors, strides and launch configuration."""
    return {
        "factor": max(abs(scale) * LOG2_E, SMALLEST_NORMAL), "limit": threshold(dropout_p),
        "inverse_keep": 1.0 / (1.0 - dropout_p), "F": fields, "H": num_heads, "DH": head_dim,
        "BLOCK_F": _block_f(fields), "BLOCK_D": max(16, head_dim), "NEGATE": scale < 0,
        "DROPOUT": dropout_p > 0.0, "PRECISION": input_precision(dtype),
    }


def _run(direction: str, tensors: tuple[torch.Tensor | None, ...], strided: tuple[torch.Tensor, ...],
         num_heads: int, scale: float, dropout_p: float) -> None:
    """Launch the kernel on `tensors` with the strides of `strided`, the first of which is [B, F, D]."""
    batch, fields, dim = strided[0].shape
    if not batch:
        return
    dtype, head_dim, pairs = strided[0].dtype, dim // num_heads, batch * num_heads
    strides = [stride for x in strided for stride in x.stride()[:2]]
    constants = _constants(fields, num_heads, head_dim, dtype, scale, dropout_p)
    if direction == "backward":
        constants["scale"] = scale

    def run(launch: Launch) -> None:
        kernel, own = _kernel(direction, launch)
        with torch.cuda.device_of(strided[0]):
            kernel[(triton.cdiv(pairs, launch.pairs),)](*tensors, *strides, pairs, num_warps=launch.warps, **own,
                                                        **constants)

    key = _table_key(direction, fields, head_dim, dtype, capability(strided[0].device))
    run(launch_choice(("attention", *key), _launch(key), _candidates(direction, constants["BLOCK_D"]), run))


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float, dropout_p: float,
             seed: torch.Tensor | None) -> torch.Tensor:
    """[B, F, D] x 3, last dimension contiguous -> [B, F, D]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _run("forward", (q, k, v, out, seed), (q, k, v), num_heads, scale, dropout_p)
    return out


def _backward(grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int,
              scale: float, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """dq | dk | dv in one [B, F, 3 D]."""
    batch, fields, dim = q.shape
    grads = torch.empty(batch, fields, 3 * dim, dtype=q.dtype, device=q.device)
    _run("backward", (grad_out, q, k, v, grads, seed), (grad_out, q, k, v), num_heads, scale, dropout_p)
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
    """The kernels in every shape class, with dropout and the strides of one projection; H=4, F=27 or 64."""
    specs = []
    for block_f, width, dtype, direction, cc in itertools.product(
            (32, 64), (16, 32, 64), (torch.float32, torch.bfloat16), ("forward", "backward"), CAPABILITIES):
        fields, kind = (27, 64)[block_f == 64], ("bf16", "fp32")[dtype == torch.float32]
        key = _table_key(direction, fields, width, dtype, cc)
        launch = table_choice(("attention", *key), _launch(key))
        kernel, own = _kernel(direction, launch)
        constexprs = _constants(fields, 4, width, dtype, 1.0, 0.1) | own
        kinds = {"seed": "*i64", "pairs": "i32", "limit": "i32"}
        kinds |= dict.fromkeys(("factor", "scale", "inverse_keep"), "fp32")
        for name in ("factor", "limit", "inverse_keep"):
            del constexprs[name]
        signature = {name: kinds.get(name, "i32:16" if "stride" in name else f"*{kind}")
                     for name in kernel.arg_names if name not in constexprs}
        resident = RESIDENT[direction, "fp32" if kind == "fp32" else "half"] if (block_f, width) == (32, 16) else 8
        name = f"{direction} {kind} F {fields} d {width}"
        specs.append(Spec(kernel, signature, constexprs, launch.warps, name, (cc,), tensor_cores=True,
                          resident_warps=resident, tuned=block_f == 32 or width == 16))
    return specs

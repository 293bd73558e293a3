"""The attention half of a transformer layer in Triton: norm, residual and projections around the attention.

x + out(attention(qkv(LN(x)))), LN(x + out(attention(qkv(x)))) or without a norm, in three launches forward and six
backward; with fewer queries than tokens, q has launches of its own. What backward keeps is x, q | k | v, the heads'
output and, post-norm, the sum that the norm takes.

Traffic, n = tokens D elements of e bytes, next to separate kernels (norm, linear, attention, linear, sum), where all
heads have D columns; n e = 28 MB:
    pre        forward   qkv 1 + 3, attention 3 + 1, out 2 + 1                             11 n e against 15
               backward  out 1 + 1, its weight 2, attention 4 + 3, qkv 5 + 1, its weight 4   21 n e against 29
    post       forward   qkv 1 + 3, attention 3 + 1, out 2 + 2                             12 n e against 15
               backward  out 2 + 2, its weight 2, attention 4 + 3, qkv 4 + 1, its weight 4   22 n e against 29
    1 query    forward   kv 1 + 2, attention 2                                              5 n e
               backward  attention 2 + 2, kv 2 + 1 and x of pre, their weights 3            11 n e
and, beside weights that stay in L2, fp32 partial sums as in the FFN: no atomics, the same bits at every run. Tiles of
more than 64 columns, in slices, take x from the cache once more for every slice of outputs.
Occupancy: 8 warps a multiprocessor at least, or as many programs of the weight kernel as a tile says (`resident`).
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from ..attention.triton import backward_into as attention_backward
from ..attention.triton import forward as attention_forward
from ..triton_launch import (
    ANY,
    Key,
    architecture,
    arithmetic_of,
    capability,
    input_precision,
    is_measured,
    launch_choice,
    multiprocessors,
    row_of,
    table_choice,
)
from ..triton_norm import NORMS
from ..triton_sums import sum_parts, sum_rows
from ..triton_support import CAPABILITIES, Spec
from .triton_kernels import forward_kernel, token_kernel, weight_kernel

Tensor = torch.Tensor
KERNELS = {"forward": forward_kernel, "token": token_kernel, "weight": weight_kernel}


class Tile(NamedTuple):
    """A launch configuration: tokens and outputs at a time, warps, inputs at a time in the forward kernel (0: all),
    tiles in flight while one is worked on, and of the weight kernel programs that share a multiprocessor (0: 8 warps'
    worth).

    The weight kernel on Hopper has one tile in flight: of two, Triton refills one that its product still reads.

    Where a norm takes the outputs of the forward kernel, it has all of them at once.
    """

    tokens: int
    outputs: int
    warps: int
    inputs: int = 0
    stages: int = 3
    resident: int = 0


class Linear(NamedTuple):
    """What a launch has compiled in: of the norm, its place; of queries, how many of how many fields (0: all)."""

    norm: int = 0
    eps: float = 0.0
    queries: int = 0
    fields: int = 1


# By kernel, arithmetic ("half": fp16 and bf16), inputs as a tile has them, and architecture.
DEFAULT = {64: Tile(64, 64, 8), 128: Tile(32, 64, 8, 64), 256: Tile(32, 32, 8, 32)}
TILES: dict[tuple, Tile] = {
    **{(kernel, arithmetic, 64, 90): Tile(64, 64, 4, 0, 1, 4 if kernel == "weight" else 0)
       for kernel in ("forward", "token", "weight") for arithmetic in ("half", "tf32", "fp16x3")},  # by an H200
    **{("weight", arithmetic, 64, ANY): Tile(32, 64, 8) for arithmetic in ("half", "tf32", "fp16x3")},
    ("weight", "tf32", 64, 100): Tile(32, 32, 8),  # with 64 outputs all loads are of 4 bytes
    ("token", "fp16x3", 64, 80): Tile(32, 64, 8),  # with 64 tokens triton 3.6 spills
    ("forward", "half", 256, ANY): Tile(32, 32, 8, 64),  # with 32 inputs at a time loads are of 8 bytes
    **{("weight", arithmetic, 256, ANY): Tile(16, 32, 8) for arithmetic in ("half", "tf32", "fp16x3")},
}


def launch_key(kernel: str, inputs: int, outputs: int, norm: int, dtype: torch.dtype, cc: int) -> Key:
    """shape: inputs as a tile has them, 64 at least, outputs and norm."""
    shape = (max(64, triton.next_power_of_2(inputs)), outputs, norm)
    return Key("layer", kernel, shape, arithmetic_of(dtype), architecture(cc))


def default(key: Key) -> Tile:
    """What the table has."""
    width, outputs, norm = key.shape
    tile = row_of(TILES, key.kernel, key.arithmetic, width, key.architecture) or DEFAULT[width]
    return _whole_rows(key, tile)


def _whole_rows(key: Key, tile: Tile) -> Tile:
    """Where a norm takes the outputs of the forward kernel, it has all of them at once."""
    _, outputs, norm = key.shape
    if key.kernel != "forward" or norm != NORMS["post"] or tile.outputs >= outputs:
        return tile
    return tile._replace(outputs=triton.next_power_of_2(outputs))


def candidates(key: Key) -> Iterator[Tile]:
    """What a search tries."""
    width, outputs, norm = key.shape
    slices = (0,) if width == 64 else (32, 64)
    shapes = [(32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 32, 8), (128, 64, 4),
              (128, 64, 8)]
    resident, in_flight = ((1, 2, 4), (1,)) if key.kernel == "weight" else ((0,), (1, 2))  # as `stages` says
    for shape, columns, stages, programs in itertools.product(shapes, slices, in_flight, resident):
        yield _whole_rows(key, Tile(*shape, columns, stages, programs))


def _constants(kernel: str, tile: Tile, inputs: int, outputs: int, linear: Linear) -> dict[str, Any]:
    """What a kernel has compiled in, but for the precision."""
    padded = max(16, triton.next_power_of_2(inputs))
    own = {"forward": {"DS": min(tile.inputs, padded) or padded},
           "token": {"NP": max(tile.outputs, triton.next_power_of_2(outputs))}, "weight": {}}[kernel]
    return {"D": inputs, "DP": padded, "N": outputs, "NORM": linear.norm, "QUERIES": linear.queries,
            "FIELDS": linear.fields, "BM": tile.tokens, "BN": tile.outputs, "STAGES": tile.stages, **own}


def _launch(kernel: str, tile: Tile, programs: int, tensors: tuple[Tensor | None, ...], tokens: int, weight: Tensor,
            linear: Linear) -> None:
    """Run `programs` programs of a linear layer of weight [N, D] on that many tokens."""
    outputs, inputs = weight.shape
    with torch.cuda.device_of(weight):
        KERNELS[kernel][(programs,)](*tensors, tokens, linear.eps, PRECISION=input_precision(weight.dtype),
                                     num_warps=tile.warps, **_constants(kernel, tile, inputs, outputs, linear))


def _choice(kernel: str, weight: Tensor, linear: Linear, run: Any) -> Tile:
    outputs, inputs = weight.shape
    key = launch_key(kernel, inputs, outputs, linear.norm, weight.dtype, capability(weight.device))
    return launch_choice(key, default, candidates, run)


Affine = tuple[Tensor | None, Tensor | None]
NO_NORM: Affine = (None, None)


def _linear(x: Tensor, tokens: int, weight: Tensor, bias: Tensor, residual: Tensor | None, affine: Affine,
            linear: Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[LN](x) W^T + b [+ residual], or LN of that and that ("post", else empty): [tokens, N], in `dtype`."""
    y = x.new_empty(tokens, len(weight), dtype=dtype)
    z = torch.empty_like(y) if linear.norm == NORMS["post"] else y.new_empty(0)

    def run(tile: Tile) -> None:
        _launch("forward", tile, triton.cdiv(tokens, tile.tokens), (x, weight, bias, residual, *affine, y, z), tokens,
                weight, linear)

    if tokens:
        run(_choice("forward", weight, linear, run))
    return y, z


def _grad_tokens(dy: Tensor, inner: Tensor | None, extra: Tensor | None, residual: Tensor | None, weight: Tensor,
                 norm_weight: Tensor | None, linear: Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dX [tokens, D] in `dtype`, dZ of "post", and the gradients of the norm [2, D] in fp32, empty without one."""
    dx = dy.new_empty(len(dy), weight.shape[1], dtype=dtype)
    dz = torch.empty_like(dy) if linear.norm == NORMS["post"] else dy.new_empty(0)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(len(dy), tile.tokens)
        shape = (0,) if norm_weight is None else (programs, 2, len(norm_weight))
        partial = dy.new_empty(shape, dtype=torch.float32)
        if programs:
            _launch("token", tile, programs, (dy, inner, extra, residual, weight, norm_weight, dx, dz, partial),
                    len(dy), weight, linear)
        return partial if norm_weight is None else sum_rows(partial)

    return dx, dz, run(_choice("token", weight, linear, run))


def _grad_weight(dy: Tensor, x: Tensor, weight: Tensor, affine: Affine, linear: Linear) -> list[Tensor]:
    """dW [N, D] and db [N] in the dtype of the weight; a norm: x is normalised first."""

    def run(tile: Tile) -> list[Tensor]:
        slices = triton.cdiv(len(weight), tile.outputs)
        at_once = multiprocessors(x.device) * (tile.resident or 8 // tile.warps) // slices
        parts = max(1, min(at_once, triton.cdiv(len(dy), tile.tokens)))
        partial = x.new_empty(parts if len(dy) else 0, weight.numel() + len(weight), dtype=torch.float32)
        if len(dy):
            _launch("weight", tile, parts * slices, (dy, x, weight, *affine, partial), len(dy), weight, linear)
        return sum_parts(partial, (weight.shape, weight.shape[:1]), weight.dtype)

    return run(_choice("weight", weight, linear, run))


def forward(x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor, norm_weight: Tensor | None,
            norm_bias: Tensor | None, norm: int, eps: float, num_heads: int, queries: int, scale: float,
            dropout_p: float, seed: Tensor | None) -> tuple[Tensor, ...]:
    """y [B, Q, D], and for backward q | k | v (k | v and q apart for fewer queries than tokens), the heads' output
    [B, Q, E], and z, which is empty unless norm is "post"."""
    batch, fields, dim = x.shape
    width, tokens, dtype = w_out.shape[1], x.flatten(0, 1), w_qkv.dtype
    affine: Affine = (norm_weight, norm_bias)
    before = (affine, norm, eps) if norm == NORMS["pre"] else (NO_NORM, 0, eps)
    after = (affine, norm, eps) if norm == NORMS["post"] else (NO_NORM, 0, eps)
    q, first = x.new_empty(0, dtype=dtype), width if queries else 0
    if queries:
        flat, _ = _linear(tokens, batch * queries, w_qkv[:width], b_qkv[:width], None, before[0],
                          Linear(*before[1:], queries, fields), dtype)
        q = flat.view(batch, queries, width)
    qkv, _ = _linear(tokens, len(tokens), w_qkv[first:], b_qkv[first:], None, before[0], Linear(*before[1:]), dtype)
    qkv = qkv.view(batch, fields, len(w_qkv) - first)
    parts = (q, *qkv.chunk(2, dim=-1)) if queries else qkv.chunk(3, dim=-1)
    heads = attention_forward(*parts, num_heads, scale, dropout_p, seed)
    rows = queries or fields
    y, z = _linear(heads.flatten(0, 1), batch * rows, w_out, b_out, tokens, after[0],
                   Linear(*after[1:], queries, fields if queries else 1), x.dtype)
    return y.view(batch, rows, dim), qkv, q, heads, z.view(batch, rows, dim) if norm == NORMS["post"] else z


def backward(grad_out: Tensor, x: Tensor, qkv: Tensor, q: Tensor, heads: Tensor, z: Tensor, w_qkv: Tensor,
             w_out: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm: int, eps: float,
             num_heads: int, queries: int, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, ...]:
    """dx [B, F, D], dw_qkv, db_qkv, dw_out, db_out, and the gradients of the norm [2, D] in fp32, empty without one."""
    fields, width, dtype = x.shape[1], w_out.shape[1], w_qkv.dtype
    pre, post, tokens = norm == NORMS["pre"], norm == NORMS["post"], x.flatten(0, 1)
    dy, affine = grad_out.flatten(0, 1), ((norm_weight, norm_bias) if pre else NO_NORM)
    after, before = Linear(norm if post else 0, eps), Linear(norm if pre else 0, eps)
    grad_heads, dz, sums = _grad_tokens(dy, z.view(dy.shape) if post else None, None, None, w_out,
                                        norm_weight if post else None, after, dtype)
    residual = dz if post else dy
    to_out = _grad_weight(residual, heads.flatten(0, 1), w_out, NO_NORM, Linear())
    grad_heads, grads, extra = grad_heads.view(heads.shape), torch.empty_like(qkv), None
    if queries:
        grad_q, picked = torch.empty_like(q), Linear(before.norm, eps, queries, fields)
        attention_backward((grad_q, *grads.chunk(2, dim=-1)), grad_heads, q, *qkv.chunk(2, dim=-1), num_heads, scale,
                           dropout_p, seed)
        grad_q = grad_q.flatten(0, 1)
        extra, *_ = _grad_tokens(grad_q, None, None, None, w_qkv[:width], None, Linear(), torch.float32)
        to_q = _grad_weight(grad_q, tokens, w_qkv[:width], affine, picked)
    else:
        picked, to_q = before, []
        attention_backward(grads.chunk(3, dim=-1), grad_heads, *qkv.chunk(3, dim=-1), num_heads, scale, dropout_p, seed)
    flat, weight = grads.flatten(0, 1), w_qkv[width:] if queries else w_qkv
    dx, _, pre_sums = _grad_tokens(flat, tokens if pre else None, extra, residual, weight,
                                   norm_weight if pre else None, picked, x.dtype)
    to_qkv = _grad_weight(flat, tokens, weight, affine, before)
    if queries:
        to_qkv = [torch.cat(pair) for pair in zip(to_q, to_qkv, strict=True)]
    return dx.view(x.shape), *to_qkv, *to_out, pre_sums if pre else sums


def aot_specs() -> list[Spec]:
    """The three kernels of both projections, pre- and post-norm, at D = 64 and 192; at 64 without a norm and one query,
    too."""
    specs = []
    wide = itertools.product((192,), ("half", "fp16x3"), CAPABILITIES)
    for dim, arithmetic, cc in [*itertools.product((64,), ("half", "tf32", "fp16x3"), CAPABILITIES), *wide]:
        cases = [("qkv pre-norm", 3 * dim, NORMS["pre"], 0), ("out", dim, 0, 0),
                 ("out post-norm", dim, NORMS["post"], 0)]
        if dim == 64:
            cases += [("kv pre-norm of one query", 2 * dim, NORMS["pre"], 1), ("out of one query", dim, 0, 1)]
        for (name, outputs, norm, queries), kernel in itertools.product(cases, KERNELS):
            if kernel == "weight" and norm == NORMS["post"] or kernel != "token" and name.startswith("kv"):
                continue
            tuned = arithmetic != "tf32" and dim == 64 and (not queries or kernel == "token")
            specs.append(_spec(kernel, name, dim, outputs, Linear(norm, queries=queries, fields=40), arithmetic, cc,
                               tuned))
    return specs


def _spec(kernel: str, name: str, dim: int, outputs: int, linear: Linear, arithmetic: str, cc: int,
          tuned: bool) -> Spec:
    """A kernel of the projection of that name with weight [outputs, dim]."""
    key = Key("layer", kernel, (max(64, triton.next_power_of_2(dim)), outputs, linear.norm), arithmetic, cc)
    tile, half = table_choice(key, default), arithmetic == "half"
    constexprs = _constants(kernel, tile, dim, outputs, linear) | {"PRECISION": "tf32" if half else arithmetic}
    has_residual = name.startswith("out") if kernel == "forward" else name.startswith(("qkv", "kv"))
    absent = [] if has_residual else ["residual"]
    absent += [] if linear.norm else ["norm_weight", "norm_bias", "inner"]
    absent += [] if linear.queries and has_residual else ["extra"]
    function, dtype = KERNELS[kernel], "bf16" if half else "fp32"
    constexprs |= dict.fromkeys(parameter for parameter in absent if parameter in function.arg_names)
    kinds = {"tokens": "i32", "eps": "fp32"} | dict.fromkeys(("partial", "norm_weight", "norm_bias", "extra"), "*fp32")
    signature = {parameter: kinds.get(parameter, f"*{dtype}")
                 for parameter in function.arg_names if parameter not in constexprs}
    return Spec(function, signature, constexprs, tile.warps,
                f"{function.__name__} {name} {dtype if half else arithmetic} D {dim}", (cc,), tensor_cores=True,
                tuned=tuned, measured=is_measured(key),
                spills=0 if dim == 64 else 8)

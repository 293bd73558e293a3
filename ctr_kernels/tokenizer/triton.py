"""Lookup and tokens in Triton: rows are gathered straight into [B, T, D], and leave it as (ids, rows) in one pass.

With FIRST = 1 or 2 tokens (CLS, dense) in front of the K rows of a sample, n = B T D elements of e bytes; B=4096, K=26,
N=13, D=64, CLS, fp32, n e = 29.4 MB (T = 28), and r = B K D e = 27.3 MB of rows:
    forward    r + n e = 57 MB, the floor (rows read, tokens written), against 2 r + 2 n e for lookup and concatenation
    backward   n e + r = 57 MB, the floor (gradient read, row gradients written), and the dense token's once again;
               4 P (FIRST D + D N) bytes = 3.8 KB P of fp32 partial sums of the other gradients, written and read once
A fixed number P of programs shares the backward; each sums its samples in registers, and torch.sum adds the P sums in
a fixed order: no atomics, the same bits at every run. The work, 4 B N D FLOP each way, is nothing beside the traffic.

Occupancy: 16 warps a multiprocessor at least, 4 KB in flight a warp.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..sparse_update.plan import Plan, row_gradient, start_plan
from ..triton_autotune import launch_choice, table_choice
from ..triton_support import CAPABILITIES, Spec, architecture, capability

MAX_TILE = 16384
PROGRAMS = 4  # of the backward a multiprocessor


class Launch(NamedTuple):
    """A launch configuration: samples that a program works on at once, and warps."""

    samples: int
    warps: int


# By the elements of a sample's tokens, counts and widths rounded up to powers of 2: 4096 a program, or one sample.
TABLE = {1 << i: Launch(max(1, 4096 >> i), max(4, 1 << i >> 10)) for i in range(4, MAX_TILE.bit_length())}


@triton.jit
def _forward_kernel(
    weight,  # [num_rows, D], contiguous
    ids,  # int32 or int64 [B, K], contiguous
    dense,  # [B, N], contiguous
    dense_weight, dense_bias,  # [D, N], [D], contiguous
    cls,  # [D]; None without one
    field_bias,  # [K, D], contiguous; None without one
    out,  # [B, T, D], contiguous
    batch, num_rows,
    K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
):
    """All tokens of ROWS samples; the row of an id outside the table is NaN."""
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    field, column, feature = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    there, wide = sample < batch, column < D
    present = there[:, None] & (field < K)[None, :]
    row = tl.load(ids + sample[:, None] * K + field[None, :], mask=present, other=-1).to(tl.int64)
    inside = (row >= 0) & (row < num_rows)  # false where no field is present
    tile = tl.load(weight + row[:, :, None] * D + column[None, None, :], mask=inside[:, :, None] & wide[None, None, :],
                   other=float("nan"))
    if field_bias is not None:
        bias = tl.load(field_bias + field[:, None] * D + column[None, :],
                       mask=(field < K)[:, None] & wide[None, :], other=0.0)
        tile = (tile.to(tl.float32) + bias.to(tl.float32)[None, :, :]).to(tile.dtype)
    start = sample * ((FIRST + K) * D)
    tl.store(out + start[:, None, None] + (field[None, :, None] + FIRST) * D + column[None, None, :], tile,
             mask=present[:, :, None] & wide[None, None, :])

    features = tl.load(dense + sample[:, None] * N + feature[None, :],
                       mask=there[:, None] & (feature < N)[None, :], other=0.0).to(tl.float32)
    matrix = tl.load(dense_weight + column[:, None] * N + feature[None, :],
                     mask=wide[:, None] & (feature < N)[None, :], other=0.0).to(tl.float32)
    token = tl.sum(features[:, None, :] * matrix[None, :, :], axis=2)
    token += tl.load(dense_bias + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    inside = there[:, None] & wide[None, :]
    first = out + start[:, None] + column[None, :]
    tl.store(first + (FIRST - 1) * D, token.to(out.dtype.element_ty), mask=inside)
    if cls is not None:
        token = tl.load(cls + column, mask=wide, other=0.0)[None, :] + tl.zeros((ROWS, BLOCK_D), out.dtype.element_ty)
        tl.store(first, token, mask=inside)


@triton.jit
def _backward_kernel(
    grad,  # [B, T, D], contiguous
    dense,  # [B, N], contiguous
    rows,  # [B K, D], contiguous: gradients of the table's rows
    partial,  # fp32 [programs, HEAD D + D N]: sums over samples of the first HEAD tokens, and of the dense weight
    batch,
    K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
):
    """The row gradients of every so-manieth group of ROWS samples, and the sums over all of these."""
    token, column, feature = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    wide, known = column < D, feature < N
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    grad_weight = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(batch, ROWS), tl.num_programs(0)):
        sample = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = sample < batch
        start = sample * ((FIRST + K) * D)
        offsets = token[None, :, None] * D + column[None, None, :]
        inside = there[:, None, None] & (token < FIRST + K)[None, :, None] & wide[None, None, :]
        tile = tl.load(grad + start[:, None, None] + offsets, mask=inside, other=0.0)
        tl.store(rows + (sample * (K * D) - FIRST * D)[:, None, None] + offsets, tile,
                 mask=inside & (token >= FIRST)[None, :, None])
        total += tl.sum(tile.to(tl.float32), axis=0)
        grad_token = tl.load(grad + start[:, None] + ((FIRST - 1) * D + column)[None, :],
                             mask=there[:, None] & wide[None, :], other=0.0).to(tl.float32)
        features = tl.load(dense + sample[:, None] * N + feature[None, :], mask=there[:, None] & known[None, :],
                           other=0.0).to(tl.float32)
        grad_weight += tl.sum(grad_token[:, :, None] * features[:, None, :], axis=0)
    partial += tl.program_id(0).to(tl.int64) * (HEAD * D + D * N)
    tl.store(partial + token[:, None] * D + column[None, :], total, mask=(token < HEAD)[:, None] & wide[None, :])
    tl.store(partial + HEAD * D + column[:, None] * N + feature[None, :], grad_weight,
             mask=wide[:, None] & known[None, :])


Key = tuple[str, str, int, int, str, int]


def _key(kernel: str, tokens: int, dim: int, dtype: torch.dtype, cc: int) -> Key:
    """(operation, kernel, tokens of a sample and elements of a token as a tile has them, arithmetic, architecture)."""
    block, block_d = triton.next_power_of_2(tokens), max(16, triton.next_power_of_2(dim))
    if block * block_d > MAX_TILE:
        raise ValueError(f"{tokens} tokens of D={dim}: kernels='triton' takes up to {MAX_TILE} elements, both rounded "
                         "up to a power of 2; kernels='eager' takes any")
    return "tokenizer", kernel, block, block_d, "fp32" if dtype == torch.float32 else "half", architecture(cc)


def _candidates(elements: int) -> Iterator[Launch]:
    """What a search tries: not more than MAX_TILE elements at once."""
    return (Launch(*shape) for shape in itertools.product((1, 2, 4, 8), (2, 4, 8)) if shape[0] * elements <= MAX_TILE)


def _choice(key: Key, run: Callable[[Launch], object]) -> Launch:
    elements = key[2] * key[3]
    return launch_choice(key, TABLE[elements], _candidates(elements), run)


def _constants(fields: int, features: int, dim: int, block_d: int, first: int, launch: Launch) -> dict[str, int]:
    """What both kernels have compiled in."""
    return {"K": fields, "N": features, "D": dim, "BLOCK_N": triton.next_power_of_2(features), "BLOCK_D": block_d,
            "FIRST": first, "ROWS": launch.samples}


def _forward(weight: torch.Tensor, ids: torch.Tensor, dense: torch.Tensor, dense_weight: torch.Tensor,
             dense_bias: torch.Tensor, cls: torch.Tensor | None, field_bias: torch.Tensor | None) -> torch.Tensor:
    """[B, T, D]; all tensors contiguous."""
    (batch, fields), dim, first = ids.shape, weight.shape[1], 1 + (cls is not None)
    out = torch.empty(batch, first + fields, dim, dtype=weight.dtype, device=weight.device)
    key = _key("forward", fields, dim, weight.dtype, capability(weight.device))

    def run(launch: Launch) -> None:
        with torch.cuda.device_of(weight):
            _forward_kernel[(triton.cdiv(batch, launch.samples),)](
                weight, ids, dense, dense_weight, dense_bias, cls, field_bias, out, batch, len(weight), BLOCK_K=key[2],
                num_warps=launch.warps, **_constants(fields, dense.shape[1], dim, key[3], first, launch))

    if batch:
        run(_choice(key, run))
    return out


def _backward(grad: torch.Tensor, dense: torch.Tensor, fields: int, head: int) -> tuple[torch.Tensor, ...]:
    """Row gradients [B K, D], fp32 sums over samples of the first `head` tokens [head, D], dense weight [D, N]."""
    (batch, tokens, dim), features, cuda = grad.shape, dense.shape[1], grad.device.type == "cuda"
    rows = torch.empty(batch * fields, dim, dtype=grad.dtype, device=grad.device)
    key = _key("backward", tokens, dim, grad.dtype, capability(grad.device))
    processors = torch.cuda.get_device_properties(grad.device).multi_processor_count if cuda else 1

    def run(launch: Launch) -> torch.Tensor:
        programs = min(PROGRAMS * processors, triton.cdiv(batch, launch.samples))
        partial = torch.empty(programs, (head + features) * dim, dtype=torch.float32, device=grad.device)
        with torch.cuda.device_of(grad):
            _backward_kernel[(programs,)](
                grad, dense, rows, partial, batch, BLOCK_T=key[2], HEAD=head, num_warps=launch.warps,
                **_constants(fields, features, dim, key[3], tokens - fields, launch))
        return partial.sum(0)

    flat = run(_choice(key, run)) if batch else grad.new_zeros((head + features) * dim, dtype=torch.float32)
    sums, grad_weight = flat.split((head * dim, dim * features))
    return rows, sums.view(head, dim), grad_weight.view(dim, features)


class _Tokens(torch.autograd.Function):
    """Keeps the ids and the numeric part; the table's gradient is a sparse COO tensor of (ids, rows)."""

    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, plan: Plan | None, weight: torch.Tensor, ids: torch.Tensor,
                dense: torch.Tensor, dense_weight: torch.Tensor, dense_bias: torch.Tensor, cls: torch.Tensor | None,
                field_bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(indices, dense, dense_weight)
        ctx.table, ctx.fields, ctx.biased, ctx.plan = weight.shape, ids.shape[1], field_bias is not None, plan
        return _forward(weight, ids, dense, dense_weight, dense_bias, cls, field_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, dense, dense_weight = ctx.saved_tensors
        fields = ctx.fields
        first = grad.shape[1] - fields
        rows, sums, grad_weight = _backward(grad.contiguous(), dense, fields, first + fields * ctx.biased)
        table = row_gradient(indices, ctx.plan, rows, ctx.table)
        grad_dense = grad[:, first - 1] @ dense_weight if ctx.needs_input_grad[2] else None
        sums = sums.to(grad.dtype)
        return (None, None, table, None, grad_dense, grad_weight.to(grad.dtype), sums[first - 1],
                sums[0] if first == 2 else None, sums[first:] if ctx.biased else None)


@torch.compiler.disable  # a compiled graph cannot hold the sparse gradient
def field_tokens_triton(weight: torch.Tensor, ids: torch.Tensor, dense: torch.Tensor, dense_weight: torch.Tensor,
                        dense_bias: torch.Tensor, cls: torch.Tensor | None,
                        field_bias: torch.Tensor | None) -> torch.Tensor:
    """[B, T, D], fp32, bf16 or fp16; the ids and the numeric part are all that backward keeps.

    The sort of the ids, for the row update, begins here: see sparse_update/plan.py.
    """
    indices = ids.reshape(1, -1).long()
    plan = start_plan(weight, indices) if weight.requires_grad and torch.is_grad_enabled() else None
    tensors = (None if t is None else t.contiguous()
               for t in (weight, ids, dense, dense_weight, dense_bias, cls, field_bias))
    return _Tokens.apply(indices, plan, *tensors)


def aot_specs() -> list[Spec]:
    """Both kernels at the tuned shape, K=26, N=13, D=64, with CLS; and with a bias for each field."""
    specs = []
    for (dtype, biased), cc in itertools.product((("fp32", False), ("bf16", False), ("fp32", True)), CAPABILITIES):
        kinds = dict.fromkeys(("weight", "dense", "dense_weight", "dense_bias", "cls", "field_bias", "out", "grad",
                               "rows"), f"*{dtype}")
        kinds |= {"ids": "*i32", "partial": "*fp32", "batch": "i32", "num_rows": "i32"}
        extra = {"BLOCK_K": 32} | ({} if biased else {"field_bias": None})
        for name, kernel, tokens, own in (("forward", _forward_kernel, 26, extra),
                                          ("backward", _backward_kernel, 28,
                                           {"BLOCK_T": 32, "HEAD": 28 if biased else 2})):
            key = _key(name, tokens, 64, torch.float32 if dtype == "fp32" else torch.bfloat16, cc)
            launch = table_choice(key, TABLE[key[2] * key[3]])
            constexprs = _constants(26, 13, 64, key[3], 2, launch) | own
            signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constexprs}
            label = f"{kernel.__name__[1:]} {dtype}{' field bias' if biased else ''}"
            specs.append(Spec(kernel, signature, constexprs, launch.warps, label, (cc,), resident_warps=16))
    return specs

"""The low-rank cross layer in Triton: one kernel forward, two backward.

For a tile of rows, g the gradient of the output, h = U x and t = V h + b of width R and W:
    forward    y = x0 t + x                                                                 2 dots
    row        d = V^T (x0 g);  dx0 = g t,  dx = g + U^T d                                  4 dots, h again
    weight     dV = (x0 g)^T h,  dU = d^T x,  db = colsum(x0 g)                             2 dots
The weight kernel works on slices of W columns: a fixed number of its programs share a slice, sum every P-th tile of
rows in registers and write fp32 partial sums once, which triton_sums.py adds in a fixed order: no atomics.

Traffic, n = B W elements of e bytes (B=4096, W=429, R=32, fp32: n e = 7.0 MB), next to eager PyTorch:
    forward    3 n e, the floor (x0, x read, y written; x once more from the cache); 4 n R FLOP; eager 8 n e in four
    row        5 n e, the floor (g, x0, x read, dx0, dx written); and g once more from the cache; h and d kept
    weight     3 n e (g, x0, x read); 4 P (2 W R + W) bytes of partial sums, written and read once
W is rarely a multiple of 4 elements (429), so that rows are not aligned and loads are one element a thread.
Occupancy: 8 warps a multiprocessor at least, as the fixed number of programs of the weight kernel takes for granted.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_launch import (
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
from ..triton_sums import sum_parts
from ..triton_support import CAPABILITIES, Spec, dot

Tensor = torch.Tensor


class Tile(NamedTuple):
    """A launch configuration: rows and columns at a time, and warps."""

    rows: int
    columns: int
    warps: int


# By kernel, arithmetic ("half": fp16 and bf16) and architecture, for all widths and ranks.
DEFAULT = Tile(32, 32, 4)
TILES: dict[tuple, Tile] = {("weight", "half", 80): Tile(64, 32, 4),  # with 32 rows it spills at W = 2496
                           ("weight", "fp16x3", 100): Tile(64, 32, 4)}  # so does this


def launch_key(kernel: str, width: int, rank: int, dtype: torch.dtype, cc: int) -> Key:
    """shape: the width, and the rank as a tile has it."""
    return Key("cross", kernel, (width, block_of(rank)), arithmetic_of(dtype), architecture(cc))


def block_of(rank: int) -> int:
    """The rank as a tile has it."""
    return max(16, triton.next_power_of_2(rank))


def default(key: Key) -> Tile:
    """What the table has."""
    return row_of(TILES, key.kernel, key.arithmetic, key.architecture) or DEFAULT


def candidates(key: Key) -> Iterator[Tile]:
    """What a search tries."""
    return itertools.starmap(Tile, itertools.product((16, 32, 64), (32, 64), (2, 4, 8)))


@triton.jit
def _tile(pointer, start, row, column, rows, W: tl.constexpr):
    """[BM, BN] of a [B, W] tensor, contiguous, from row `start`; zero beyond the edges."""
    inside = (row < rows - start)[:, None] & (column < W)[None, :]
    return tl.load(pointer + start * W + row[:, None] * W + column[None, :], mask=inside, other=0.0)


@triton.jit
def _rank_rows(u, column, R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr):
    """[RP, BN]: columns of u [R, W]."""
    rank = tl.arange(0, RP)
    return tl.load(u + rank[:, None] * W + column[None, :], mask=(rank < R)[:, None] & (column < W)[None, :], other=0.0)


@triton.jit
def _rank_columns(v, column, R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr):
    """[BN, RP]: rows of v [W, R]."""
    rank = tl.arange(0, RP)
    return tl.load(v + column[:, None] * R + rank[None, :], mask=(column < W)[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def _forward_kernel(
    x0, x,  # [B, W], contiguous
    u, v, bias,  # [R, W], [W, R], [W], contiguous
    y,  # [B, W], contiguous
    rows,  # B
    W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """One tile of BM rows."""
    start = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    hidden = tl.zeros((BM, RP), tl.float32)
    for first in range(0, W, BN):
        column = first + tl.arange(0, BN)
        tile_x = _tile(x, start, row, column, rows, W)
        hidden = dot(tile_x, tl.trans(_rank_rows(u, column, R, RP, W)), hidden, PRECISION)
    hidden = hidden.to(u.dtype.element_ty)
    for first in range(0, W, BN):
        column = first + tl.arange(0, BN)
        total = dot(hidden, tl.trans(_rank_columns(v, column, R, RP, W)), None, PRECISION)
        total += tl.load(bias + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
        total = _tile(x0, start, row, column, rows, W).to(tl.float32) * total
        total += _tile(x, start, row, column, rows, W).to(tl.float32)
        tl.store(y + start * W + row[:, None] * W + column[None, :], total.to(y.dtype.element_ty),
                 mask=(row < rows - start)[:, None] & (column < W)[None, :])


@triton.jit
def _row_kernel(
    grad, x0, x,  # [B, W], contiguous
    u, v, bias,  # [R, W], [W, R], [W], contiguous
    dx0, dx,  # [B, W], contiguous
    hidden, grad_hidden,  # [B, R], contiguous: h and d, for the weight kernel
    rows,  # B
    W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """The gradients of x0 and x of one tile of BM rows."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, rank = tl.arange(0, BM), tl.arange(0, RP)
    h = tl.zeros((BM, RP), tl.float32)
    d = tl.zeros((BM, RP), tl.float32)
    for first in range(0, W, BN):
        column = first + tl.arange(0, BN)
        h = dot(_tile(x, start, row, column, rows, W), tl.trans(_rank_rows(u, column, R, RP, W)), h, PRECISION)
        product = _tile(x0, start, row, column, rows, W) * _tile(grad, start, row, column, rows, W)
        d = dot(product, _rank_columns(v, column, R, RP, W), d, PRECISION)
    h, d = h.to(u.dtype.element_ty), d.to(u.dtype.element_ty)
    narrow = start * R + row[:, None] * R + rank[None, :]
    known = (row < rows - start)[:, None] & (rank < R)[None, :]
    tl.store(hidden + narrow, h, mask=known)
    tl.store(grad_hidden + narrow, d, mask=known)
    for first in range(0, W, BN):
        column = first + tl.arange(0, BN)
        offsets = start * W + row[:, None] * W + column[None, :]
        inside = (row < rows - start)[:, None] & (column < W)[None, :]
        tile_grad = _tile(grad, start, row, column, rows, W).to(tl.float32)
        total = dot(h, tl.trans(_rank_columns(v, column, R, RP, W)), None, PRECISION)
        total += tl.load(bias + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
        tl.store(dx0 + offsets, (total * tile_grad).to(dx0.dtype.element_ty), mask=inside)
        total = dot(d, _rank_rows(u, column, R, RP, W), tile_grad, PRECISION)
        tl.store(dx + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    grad, x0, x,  # [B, W], contiguous
    hidden, grad_hidden,  # [B, R], contiguous
    partial,  # fp32 [programs a slice, 2 W R + W]: dU [R, W], dV [W, R], db
    rows,  # B
    W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """The sums of one slice of BN columns over a share of the tiles of rows."""
    SLICES: tl.constexpr = (W + BN - 1) // BN
    part, first = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BN
    row, column, rank = tl.arange(0, BM), first + tl.arange(0, BN), tl.arange(0, RP)
    du = tl.zeros((BN, RP), tl.float32)  # transposed
    dv = tl.zeros((BN, RP), tl.float32)
    db = tl.zeros((BN,), tl.float32)
    for tile in range(part, tl.cdiv(rows, BM), tl.num_programs(0) // SLICES):
        start = tl.cast(tile, tl.int64) * BM
        product = _tile(x0, start, row, column, rows, W) * _tile(grad, start, row, column, rows, W)
        h, d = _tile(hidden, start, row, rank, rows, R), _tile(grad_hidden, start, row, rank, rows, R)
        db += tl.sum(product.to(tl.float32), axis=0)
        dv = dot(tl.trans(product), h, dv, PRECISION)
        du = dot(tl.trans(_tile(x, start, row, column, rows, W)), d, du, PRECISION)
    partial += part.to(tl.int64) * (2 * W * R + W)
    inside = (column < W)[:, None] & (rank < R)[None, :]
    tl.store(partial + (rank[None, :] * W + column[:, None]), du, mask=inside)
    tl.store(partial + W * R + (column[:, None] * R + rank[None, :]), dv, mask=inside)
    tl.store(partial + 2 * W * R + column, db, mask=column < W)


def _launch(kernel: Any, tile: Tile, programs: int, tensors: tuple[Tensor, ...], u: Tensor) -> None:
    """Run `programs` programs on tensors of which the first is [B, W]."""
    rank, width = u.shape
    with torch.cuda.device_of(u):
        kernel[(programs,)](*tensors, len(tensors[0]), W=width, R=rank, RP=block_of(rank), BM=tile.rows,
                            BN=tile.columns, PRECISION=input_precision(u.dtype), num_warps=tile.warps)


def _key(kernel: str, u: Tensor) -> Key:
    rank, width = u.shape
    return launch_key(kernel, width, rank, u.dtype, capability(u.device))


def forward(x0: Tensor, x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """[B, W]; all tensors contiguous."""
    y = torch.empty_like(x)

    def run(tile: Tile) -> None:
        _launch(_forward_kernel, tile, triton.cdiv(len(x), tile.rows), (x0, x, u, v, bias, y), u)

    if len(x):
        run(launch_choice(_key("forward", u), default, candidates, run))
    return y


def backward(grad_out: Tensor, x0: Tensor, x: Tensor, u: Tensor, v: Tensor,
             bias: Tensor) -> tuple[Tensor, ...]:
    """dx0 and dx [B, W]; dU [R, W], dV [W, R] and db [W]."""
    dx0, dx, (rank, width) = torch.empty_like(x), torch.empty_like(x), u.shape
    hidden, grad_hidden = (x.new_empty(len(x), rank) for _ in range(2))

    def rows(tile: Tile) -> None:
        _launch(_row_kernel, tile, triton.cdiv(len(x), tile.rows),
                (grad_out, x0, x, u, v, bias, dx0, dx, hidden, grad_hidden), u)

    def weights(tile: Tile) -> list[Tensor]:
        slices = triton.cdiv(width, tile.columns)
        parts = max(1, min(multiprocessors(x.device, interpreted=16) * (8 // tile.warps) // slices,
                           triton.cdiv(len(x), tile.rows))) if len(x) else 0
        partial = x.new_empty(parts, 2 * width * rank + width, dtype=torch.float32)
        if parts:
            _launch(_weight_kernel, tile, parts * slices, (grad_out, x0, x, hidden, grad_hidden, partial), u)
        return sum_parts(partial, (u.shape, v.shape, bias.shape), u.dtype)

    if len(x):
        rows(launch_choice(_key("row", u), default, candidates, rows))
    return dx0, dx, *weights(launch_choice(_key("weight", u), default, candidates, weights))


def aot_specs() -> list[Spec]:
    """The three kernels in all arithmetics at the widths of the models, and at twice their rank.

    DCNv2's is 429, and with embedded numeric features 39 x 16 = 624; that of a shortcut from tokens, 39 x 64 = 2496.
    """
    specs = []
    kernels = {"forward": _forward_kernel, "row": _row_kernel, "weight": _weight_kernel}
    shapes = [*itertools.product(("fp16x3", "tf32", "half"), (429, 624, 2496), (32,)), ("fp16x3", 624, 64)]
    for (arithmetic, width, rank), (name, kernel), cc in itertools.product(shapes, kernels.items(), CAPABILITIES):
        key = Key("cross", name, (width, block_of(rank)), arithmetic, cc)
        tile = table_choice(key, default)
        constexprs = {"W": width, "R": rank, "RP": block_of(rank), "BN": tile.columns, "BM": tile.rows,
                      "PRECISION": "tf32" if arithmetic == "half" else arithmetic}
        kinds = {"partial": "*fp32", "rows": "i32"}
        signature = {argument: kinds.get(argument, "*bf16" if arithmetic == "half" else "*fp32")
                     for argument in kernel.arg_names if argument not in constexprs}
        label = f"{kernel.__name__[1:]} {'bf16' if arithmetic == 'half' else arithmetic} W {width} R {rank}"
        specs.append(Spec(kernel, signature, constexprs, tile.warps, label, (cc,), tensor_cores=True,
                          tuned=arithmetic != "tf32" and width != 624, measured=is_measured(key),
                          spills=32 if rank == 64 else 0))
    return specs

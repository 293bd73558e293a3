"""Weight gradients of Triton kernels: partial sums of a fixed number of programs, added in a fixed order."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_support import CAPABILITIES, Spec

COLUMNS, ROWS, WARPS = 128, 32, 4  # of a program, of those at a time
FOLDED = 64  # parts that many are first folded into


@triton.jit
def sum_kernel(
    partial,  # fp32 [parts, N0 + N1 + N2 + N3], contiguous
    out0, out1, out2, out3,  # [N0], [N1], [N2], [N3], contiguous
    parts,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):
    """Sums over the parts, in the dtype of the outputs; partial sums are fewer than 2^31."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width: tl.constexpr = N0 + N1 + N2 + N3
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & (column < width)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    found = tl.sum(total, 0).to(out0.dtype.element_ty)
    tl.store(out0 + column, found, mask=column < N0)
    tl.store(out1 + (column - N0), found, mask=(column >= N0) & (column < N0 + N1))
    tl.store(out2 + (column - N0 - N1), found, mask=(column >= N0 + N1) & (column < N0 + N1 + N2))
    tl.store(out3 + (column - N0 - N1 - N2), found, mask=(column >= N0 + N1 + N2) & (column < width))


@triton.jit
def fold_kernel(
    partial,  # fp32 [parts, WIDTH], contiguous
    out,  # fp32 [programs, WIDTH], contiguous
    parts,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):
    """Sums of every programs-th part: one row of `out` for each program."""
    column = tl.arange(0, PADDED)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(tl.program_id(0), parts, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS) * tl.num_programs(0)
        mask = (row < parts)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(out + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


def sum_rows(partial: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension of fp32 [parts, ...], many short ones, in a fixed order: two launches, where one
    would have a few programs add all parts. Rows are of 4096 elements at most; no parts give zeros."""
    width = partial[0].numel() if len(partial) else 0
    if not width:
        return partial.sum(0)
    for programs in (FOLDED, 1) if len(partial) > FOLDED else (1,):
        out = partial.new_empty((programs, *partial.shape[1:]))
        padded = triton.next_power_of_2(width)
        with torch.cuda.device_of(partial):
            fold_kernel[(programs,)](partial, out, len(partial), WIDTH=width, PADDED=padded,
                                     ROWS=max(1, min(32, 8192 // padded)), num_warps=WARPS)
        partial = out
    return partial[0]


def sum_parts(partial: torch.Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Sums over the first dimension of fp32 [parts, N], in up to four tensors of those shapes, one after the other,
    each with memory of its own. No parts give zeros."""
    if not len(partial):
        return [partial.new_zeros(shape, dtype=dtype) for shape in shapes]
    outs = [partial.new_empty(shape, dtype=dtype) for shape in shapes]
    sizes = [out.numel() for out in outs] + [0] * (4 - len(outs))
    with torch.cuda.device_of(partial):
        sum_kernel[(triton.cdiv(sum(sizes), COLUMNS),)](
            partial, *outs, *[outs[0]] * (4 - len(outs)), len(partial), *sizes, COLUMNS=COLUMNS, ROWS=ROWS,
            num_warps=WARPS)
    return outs


def sum_spec(name: str, dtype: str, sizes: tuple[int, int, int, int]) -> Spec:
    """The kernel to be compiled without a GPU."""
    signature = {"partial": "*fp32", "parts": "i32", **{f"out{i}": f"*{dtype}" for i in range(4)}}
    constexprs: dict[str, Any] = {"COLUMNS": COLUMNS, "ROWS": ROWS, **{f"N{i}": size for i, size in enumerate(sizes)}}
    return Spec(sum_kernel, signature, constexprs, WARPS, name, CAPABILITIES)

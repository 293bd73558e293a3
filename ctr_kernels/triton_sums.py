"""Weight gradients of Triton kernels: partial sums of a fixed number of programs, added in a fixed order."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_support import CAPABILITIES, Spec

COLUMNS, ROWS, WARPS = 128, 32, 4  # of a program, of those at a time


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

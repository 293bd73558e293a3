"""Row updates of an embedding table in Triton: duplicates summed, each touched row read and written once.

Here: launch configurations and launches; the kernels are in triton_kernels.py.

The lookup needs no kernel of its own: `F.embedding(ids, weight, sparse=True)` reads the ids and n rows and writes n
rows, 8 n + 2 n r bytes (r = bytes of a row), which is its floor; and its gradient is the pair (ids, rows) itself,
made from views without a kernel.

The update of n (id, row) pairs, U ids of them distinct, has a data-dependent shape only on paper:

1. The ids, narrowed to int32 where the table allows it, are sorted with their positions (stable, so that the order
   of every sum is fixed). Equal ids now form runs. This depends on ids alone, and is done at the lookup: see plan.py.
2. `chunk_kernel`: a program takes CHUNK sorted positions whatever the runs are, gathers their rows tile by tile,
   and sums each run by a segmented scan: the join of (sum a, flag) and (sum b, flag) is b where b starts a run, else
   a + b. A run that lies inside the chunk is finished, and its row is updated at once. The (at most two) others are
   parts of runs that cross the chunk's ends: their sums go to `partial`, [chunks, 2, dim]: slot 0 for the run that
   began in an earlier chunk, slot 1 for the run that begins here and goes on.
3. `close_kernel`: the program of the chunk in which such a run begins adds slot 1 of its own chunk and slot 0 of all
   following chunks of the run, and updates the row.

No atomics, no host synchronisation, shapes and grids that depend on n alone: the result is deterministic and a CUDA
graph can hold it. Skew costs little: with one id for the whole batch the first kernel does what it always does, and
the second adds n / CHUNK sums in one program; a run of a field, n <= batch, is at most batch / CHUNK sums.

Traffic next to the floor, n = 106,496 uniform ids on 2M rows of 64 fp32 (U = 103,700, r = 256):
    gradient rows   n r            27.3 MB    floor, read once
    table rows      2 U r          53.1 MB    floor, read and written once; half of it in bf16
    state           8 U             0.8 MB    rowwise Adagrad; 2 U r for Adagrad, 4 U r for Adam (2 U r in bf16)
    decay           8 U             0.8 MB    where it counts steps
    sorted ids      12 n            1.3 MB    (4 + 8 for the positions; neighbours come from the cache)
    partial sums    <= 4 n r / CHUNK   1.7 MB if every chunk's ends are crossed, 0.1 MB at uniform ids
3 n dim + 2 U dim FLOP = 34 MFLOP for SGD, some 8 U dim more for Adam, 13 instructions an element for the rounding of
bf16: below the memory time. The sort, four radix passes of 24 n bytes = 10.2 MB, comes on top.

Occupancy on sm_90 with fp32 rows of 64: 118 registers (SGD), and 152 (rowwise Adagrad) and 148 (Adam), which would take
162 and 155 if they were not held to REGISTERS: 17 or 13 one-warp programs fit an SM. The 1,664 programs of
n = 106,496 are 12.6 an SM of 132, so that all run at once, each with 4 KB of gradient and 4 KB of table rows in flight
(2 KB each with the tiles of Adagrad and Adam, whose state comes along). bf16 takes 189 registers. An H200 was fastest
with 128 for each, and 8 positions a tile where state comes along: 38, 39 and 59 us for SGD, rowwise Adagrad and Adam.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton

from ..library import last_dim_contiguous
from ..triton_launch import Key, architecture, capability, is_measured, launch_choice, table_choice, width_of
from ..triton_support import CAPABILITIES, Spec
from .plan import sort_ids
from .rule import RULES, Rule
from .triton_kernels import chunk_kernel, close_kernel

CLOSE_WARPS = 4
CLOSE_ELEMENTS = 4096  # of a tile of partial sums


class Launch(NamedTuple):
    """A launch configuration of the chunk kernel."""

    chunk: int  # sorted positions of a program
    tile: int  # of them at a time
    warps: int
    registers: int  # of a thread, at most; 0: as many as it takes


# By padded row width: positions of a chunk and of a tile, warps. One row lies within as few warps as 16-byte loads
# allow, so that the scan over positions needs shuffles only, no shared memory.
TABLE = {16: (64, 32, 1), 32: (64, 32, 1), 64: (64, 16, 1), 128: (64, 8, 1), 256: (64, 8, 2), 512: (64, 8, 4),
         1024: (64, 8, 8), 2048: (64, 4, 16)}
MAX_DIM = max(TABLE)
REGISTERS = {("rowwise-adagrad", 64): 152, ("lazy-adam", 64): 152}  # bf16 and counted steps would spill with so few


def _block(dim: int) -> int:
    """The row width as a tile has it."""
    return max(16, triton.next_power_of_2(dim))


def launch_key(rule: str, dim: int, dtype: torch.dtype, counts: bool, cc: int) -> Key:
    """shape: the row width as a tile has it, and whether decay counts the steps between; dtype: of the table."""
    return Key("sparse_update", rule, (_block(dim), int(counts)), width_of(dtype), architecture(cc))


def default(key: Key) -> Launch:
    """What the table has: half the positions of a tile where rows of state come along."""
    block, counts = key.shape
    chunk, tile, warps = TABLE[block]
    registers = 0 if key.arithmetic == "half" or counts else REGISTERS.get((key.kernel, block), 0)
    return Launch(chunk, max(2, tile // 2) if key.kernel in ("adagrad", "lazy-adam") else tile, warps, registers)


def candidates(key: Key) -> Iterator[Launch]:
    """What a search tries: 16 or 32 elements a thread."""
    block, _ = key.shape
    for chunk, factor, elements in itertools.product((64, 128), (1, 2, 4), (16, 32)):
        warps = factor * max(1, block // 256)
        tile = elements * 32 * warps // block
        if 2 <= tile <= chunk:
            yield from (Launch(chunk, tile, warps, registers) for registers in ((0, 128) if warps == 1 else (0,)))


def _constants(rule: Rule) -> dict[str, Any]:
    """What both kernels have compiled in."""
    log1, log2 = (math.log2(beta) if beta else -math.inf for beta in (rule.beta1, rule.beta2))
    return {"RULE": rule.name, "FRESH1": 1.0 - rule.beta1, "FRESH2": 1.0 - rule.beta2, "LOG2_BETA1": log1,
            "LOG2_BETA2": log2, "DECAYS": bool(rule.weight_decay)}


def refusal(weight: torch.Tensor) -> str | None:
    """Why the kernels do not take the table [num_rows, dim]; None: they do."""
    if weight.shape[1] > MAX_DIM:
        return (f"rows of {weight.shape[1]} elements: kernels='triton' updates rows of at most {MAX_DIM}; "
                "kernels='eager' takes any")
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return f"the table has strides {weight.stride()}; kernels='triton' needs rows without gaps"
    return None


def update(weight: torch.Tensor, first: torch.Tensor | None, second: torch.Tensor | None, last: torch.Tensor | None,
           ids: torch.Tensor, rows: torch.Tensor, sorted_ids: torch.Tensor | None, order: torch.Tensor | None,
           rule: int, lr: float, lr_on_device: torch.Tensor | None, weight_decay: float, eps: float, beta1: float,
           beta2: float, step: torch.Tensor | None, seed: torch.Tensor | None) -> None:
    """ctr::sparse_update; ids outside the table, which the lookup has refused, are left out."""
    num_rows, dim = weight.shape
    if (reason := refusal(weight)) is not None:
        raise ValueError(reason)
    tables, chosen = (weight, first, second, last), Rule(RULES[rule], lr, weight_decay, eps, beta1, beta2)
    if ids.numel() == 0:
        return
    if sorted_ids is None or order is None:  # of ids that no lookup has seen: one of 2^32 would else be 0 in int32
        sorted_ids, order = sort_ids(ids.long().clamp(-1, num_rows), num_rows)
    on_device = lr_on_device is not None
    scalars = (lr_on_device if on_device else lr, step, seed, weight_decay, eps)
    rows, constants = last_dim_contiguous(rows), {"LR_IS_TENSOR": on_device, **_constants(chosen)}
    copies: list[torch.Tensor | None] = []

    def rehearse(launch: Launch) -> None:
        if not copies:
            copies.extend(None if table is None else table.clone() for table in tables)
        _run(launch, copies, sorted_ids, order, rows, scalars, constants)

    key = launch_key(chosen.name, dim, weight.dtype, last is not None, capability(weight.device))
    launch = launch_choice(key, default, candidates, rehearse)
    _run(launch, tables, sorted_ids, order, rows, scalars, constants)


def _run(launch: Launch, tables: Sequence[torch.Tensor | None], sorted_ids: torch.Tensor, order: torch.Tensor,
         rows: torch.Tensor, scalars: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Both kernels on tables (the table, and its state as `RowState` has it), in place."""
    weight, n = tables[0], len(sorted_ids)
    assert weight is not None
    num_rows, dim = weight.shape
    chunks, block = triton.cdiv(n, launch.chunk), _block(dim)
    partial = torch.empty(chunks, 2, dim, dtype=torch.float32, device=weight.device)
    shape = {"DIM": dim, "BLOCK_D": block, "CHUNK": launch.chunk, "WEIGHT_STRIDE": weight.stride(0)}
    with torch.cuda.device_of(weight):
        chunk_kernel[(chunks,)](*tables, sorted_ids, order, rows, partial, *scalars, n, num_rows,
                                ROWS_STRIDE=rows.stride(0), TILE=launch.tile, num_warps=launch.warps,
                                maxnreg=launch.registers or None, **shape, **constants)
        if chunks > 1:
            close_kernel[(chunks - 1,)](*tables, sorted_ids, partial, *scalars, chunks, num_rows,
                                        TILE=CLOSE_ELEMENTS // block, num_warps=CLOSE_WARPS, **shape, **constants)


# To compile without a GPU: (dim, rule, dtype of table and moments, decay that counts steps).
AOT = [(64, "sgd", "fp32", False), (64, "rowwise-adagrad", "fp32", False), (64, "rowwise-adagrad", "bf16", True),
       (64, "adagrad", "fp32", True), (64, "lazy-adam", "fp32", False), (64, "lazy-adam", "bf16", True),
       (16, "rowwise-adagrad", "fp32", False), (2048, "rowwise-adagrad", "fp32", False),
       (2048, "lazy-adam", "bf16", True)]


def aot_specs() -> list[Spec]:
    """The launch configurations to compile without a GPU: both kernels at the tuned width, the ends of the table."""
    specs = []
    for (dim, name, dtype, counts), cc in itertools.product(AOT, CAPABILITIES):
        rule = Rule(name, 0.1, weight_decay=0.1 if counts else 0.0)
        key = launch_key(name, dim, torch.float32 if dtype == "fp32" else torch.bfloat16, counts, cc)
        launch = table_choice(key, default)
        adam = name == "lazy-adam"
        kinds = {"weight": f"*{dtype}", "first": f"*{dtype if adam else 'fp32'}", "second": f"*{dtype}",
                 "last": "*i32", "sorted_ids": "*i32", "order": "*i64", "rows": "*fp32", "partial": "*fp32",
                 "lr": "*fp32", "step": "*i64", "seed": "*i64", "weight_decay": "fp32", "eps": "fp32", "n": "i32",
                 "chunks": "i32", "num_rows": "i32"}
        absent = {"first": name == "sgd", "second": not adam, "last": not counts, "seed": dtype != "bf16",
                  "step": not (adam or counts or dtype == "bf16")}
        shared = {"WEIGHT_STRIDE": dim, "DIM": dim, "BLOCK_D": dim, "CHUNK": launch.chunk, "LR_IS_TENSOR": True,
                  **_constants(rule), **{argument: None for argument, is_absent in absent.items() if is_absent}}
        for kernel, own, warps, limit in [
                (chunk_kernel, {"ROWS_STRIDE": dim, "TILE": launch.tile}, launch.warps, launch.registers or None),
                (close_kernel, {"TILE": CLOSE_ELEMENTS // dim}, CLOSE_WARPS, None)]:
            if kernel is close_kernel and dim != 64:
                continue
            constexprs = own | shared
            signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constexprs}
            label = f"{kernel.__name__} {name} {dtype} dim {dim}" + (" counting steps" if counts else "")
            specs.append(Spec(kernel, signature, constexprs, warps, label, (cc,),
                              resident_warps=13 if (dim, dtype) == (64, "fp32") else 8, max_registers=limit,
                              measured=is_measured(key)))
    return specs

"""Row updates of an embedding table in Triton: duplicates summed, each touched row read and written once.

The lookup needs no kernel of its own: `F.embedding(ids, weight, sparse=True)` reads the ids and n rows and writes n
rows, 8 n + 2 n r bytes (r = bytes of a row), which is its floor; and its gradient is the pair (ids, rows) itself,
made from views without a kernel.

The update of n (id, row) pairs, U ids of them distinct, has a data-dependent shape only on paper:

1. The ids, narrowed to int32 where the table allows it, are sorted with their positions (stable, so that the order
   of every sum is fixed). Equal ids now form runs. This depends on ids alone, and is done at the lookup: see plan.py.
2. `_chunk_kernel`: a program takes CHUNK sorted positions whatever the runs are, gathers their rows tile by tile,
   and sums each run by a segmented scan: the join of (sum a, flag) and (sum b, flag) is b where b starts a run, else
   a + b. A run that lies inside the chunk is finished, and its row is updated at once. The (at most two) others are
   parts of runs that cross the chunk's ends: their sums go to `partial`, [chunks, 2, dim]: slot 0 for the run that
   began in an earlier chunk, slot 1 for the run that begins here and goes on.
3. `_close_kernel`: the program of the chunk in which such a run begins adds slot 1 of its own chunk and slot 0 of all
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
162 and 155 if they were not held to MAX_REGISTERS: 17 or 13 one-warp programs fit an SM. The 1,664 programs of
n = 106,496 are 12.6 an SM of 132, so that all run at once, each with 4 KB of gradient and 4 KB of table rows in flight
(2 KB each with the tiles of Adagrad and Adam, whose state comes along). bf16 takes 189 registers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..library import last_dim_contiguous
from ..triton_support import Spec, philox
from .plan import Plan, sort_ids
from .rule import RowState, Rule

CHUNK = 64  # sorted positions of a program

# Launch configurations of the first kernel by padded row width: (positions of a tile, warps). One row lies within as
# few warps as 16-byte loads allow, so that the scan over positions needs shuffles only, no shared memory.
TILES = {16: (32, 1), 32: (32, 1), 64: (16, 1), 128: (8, 1), 256: (8, 2), 512: (8, 4), 1024: (8, 8), 2048: (4, 16)}
MAX_DIM = max(TILES)
MAX_REGISTERS = {("rowwise-adagrad", 64): 152, ("lazy-adam", 64): 152}  # a thread; fp32 without counted steps only
CLOSE_WARPS = 4
CLOSE_ELEMENTS = 4096  # of a tile of partial sums


@triton.jit
def _join(left, left_starts, right, right_starts):
    """The sum up to the end of two neighbouring pieces: of the right one alone where a run starts in it."""
    return tl.where(right_starts, right, left + right), left_starts | right_starts


@triton.jit
def _scalars(lr, step, seed, weight_decay, RULE: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr):
    """(rate, what decay leaves in a step, its log2, step, key of the rounding) of this step; see rule.py.

    In fp64, once a program: 1 - beta^t loses most digits of fp32 at small t.
    """
    exact = tl.full([], 1.0, tl.float64) * lr
    keep = 1.0 - exact * weight_decay
    rate, now, key = exact, 0, 0
    if step is not None:
        now = tl.load(step)
    if RULE == "lazy-adam":
        correction1 = 1.0 - tl.exp2(now.to(tl.float64) * LOG2_BETA1)
        rate = exact * tl.sqrt(1.0 - tl.exp2(now.to(tl.float64) * LOG2_BETA2)) / correction1
    if seed is not None:
        key = tl.load(seed) + now * -0x61C8864680B583EB  # KEY_STEP - 2^64
    return rate.to(tl.float32), keep.to(tl.float32), tl.log2(keep).to(tl.float32), now, key


@triton.jit
def _rounded(values, dtype: tl.constexpr, ids, which, num_rows, key, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """values fp32 [R, BLOCK_D] of the rows ids [R] as `dtype`; bf16 is rounded stochastically as in rule.py.

    A Philox call yields the 8 halves of 8 neighbouring columns, which a thread holds as 16 bytes of bf16.
    """
    if dtype == tl.bfloat16:
        counter = ((which * num_rows + ids.to(tl.int64)) * ((DIM + 7) // 8))[:, None]
        w0, w1, w2, w3 = philox(key, counter + tl.arange(0, BLOCK_D // 8)[None, :])
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, BLOCK_D / 8, 2, 2]: w0, w1, w2, w3
        noise = tl.reshape(tl.join(words & 0xFFFF, words >> 16), values.shape).to(tl.int32, bitcast=True)
        bits = values.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        values = tl.where(finite, (bits + noise) & -0x10000, bits).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _fetch(weight, first, second, last, ids, chosen,
           WEIGHT_STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, RULE: tl.constexpr):
    """What an update of the rows ids [R] reads, where chosen [R]: rows [R, BLOCK_D] fp32, first and second state in
    fp32 ([R, BLOCK_D], or [R] where the rule has one number a row or none), and the step that touched them last."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = chosen[:, None] & (columns < DIM)
    wide = ids.to(tl.int64)
    row = tl.load(weight + wide[:, None] * WEIGHT_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    a, b = tl.zeros(ids.shape, tl.float32), tl.zeros(ids.shape, tl.float32)
    touched = tl.zeros(ids.shape, tl.int32)
    if RULE == "rowwise-adagrad":
        a = tl.load(first + ids, mask=chosen, other=0.0)
    if RULE == "adagrad" or RULE == "lazy-adam":
        a = tl.load(first + wide[:, None] * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    if RULE == "lazy-adam":
        b = tl.load(second + wide[:, None] * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    if last is not None:
        touched = tl.load(last + ids, mask=chosen, other=0)
    return row, a, b, touched


@triton.jit
def _update(weight, first, second, last, ids, chosen, fetched, grad, scalars, eps, num_rows,
            WEIGHT_STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, RULE: tl.constexpr,
            FRESH1: tl.constexpr, FRESH2: tl.constexpr, DECAYS: tl.constexpr):
    """Write back what `_fetch` read, updated with grad [R, BLOCK_D]."""
    row, a, b, touched = fetched
    rate, keep, log2_keep, now, key = scalars
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = chosen[:, None] & (columns < DIM)
    wide = ids.to(tl.int64)
    move = rate * grad
    if RULE == "rowwise-adagrad":
        a += tl.sum(grad * grad, 1) / DIM
        tl.store(first + ids, a, mask=chosen)
        move = tl.div_rn(rate, tl.sqrt_rn(a) + eps)[:, None] * grad
    elif RULE == "adagrad":
        a += grad * grad
        tl.store(first + wide[:, None] * DIM + columns, a, mask=mask)
        move = rate * tl.div_rn(grad, tl.sqrt_rn(a) + eps)
    elif RULE == "lazy-adam":
        a += FRESH1 * (grad - a)
        b += FRESH2 * (grad * grad - b)
        move = rate * tl.div_rn(a, tl.sqrt_rn(b) + eps)
        a = _rounded(a, first.dtype.element_ty, ids, 1, num_rows, key, DIM, BLOCK_D)
        b = _rounded(b, second.dtype.element_ty, ids, 2, num_rows, key, DIM, BLOCK_D)
        tl.store(first + wide[:, None] * DIM + columns, a, mask=mask)
        tl.store(second + wide[:, None] * DIM + columns, b, mask=mask)
    if last is not None:
        tl.store(last + ids, now.to(tl.int32) + tl.zeros(ids.shape, tl.int32), mask=chosen)
        row *= tl.exp2((now - touched).to(tl.float32) * log2_keep)[:, None]
    elif DECAYS:
        row *= keep
    row = _rounded(row - move, weight.dtype.element_ty, ids, 0, num_rows, key, DIM, BLOCK_D)
    tl.store(weight + wide[:, None] * WEIGHT_STRIDE + columns, row, mask=mask)


@triton.jit
def _chunk_kernel(
    weight,  # [num_rows, DIM], rows WEIGHT_STRIDE apart
    first,  # state of the rule as `RowState` has it, None where it has none
    second,
    last,
    sorted_ids,  # [n] int32 or int64
    order,  # [n] int64: sorted_ids[i] = ids[order[i]]
    rows,  # [n, DIM], rows ROWS_STRIDE apart
    partial,  # [chunks, 2, DIM] fp32
    lr,  # fp32, or a pointer to a float
    step,  # pointers to int64, or None
    seed,
    weight_decay,
    eps,
    n,
    num_rows,
    WEIGHT_STRIDE: tl.constexpr,
    ROWS_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
    FRESH1: tl.constexpr,  # 1 - beta
    FRESH2: tl.constexpr,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    DECAYS: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    rate = tl.load(lr) if LR_IS_TENSOR else lr
    scalars = _scalars(rate, step, seed, weight_decay, RULE, LOG2_BETA1, LOG2_BETA2)
    sorted_ids += chunk * CHUNK
    order += chunk * CHUNK
    left = tl.minimum(n - chunk * CHUNK, CHUNK + 1).to(tl.int32)  # positions from here on, one beyond the chunk counted
    before = tl.load(sorted_ids - 1, mask=chunk > 0, other=-1)  # no id is -1
    after = tl.load(sorted_ids + CHUNK, mask=left > CHUNK, other=-1)
    position = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside_row = columns < DIM
    carry = tl.zeros([1, BLOCK_D], tl.float32)  # the sum of the run so far that reaches into the tile
    carried = before
    for start in range(0, CHUNK, TILE):
        at = start + position  # [TILE]
        inside = at < left
        ids = tl.load(sorted_ids + at, mask=inside, other=-1)
        previous = tl.load(sorted_ids + at - 1, mask=inside & ((chunk > 0) | (at > 0)), other=-1)
        following = tl.load(sorted_ids + at + 1, mask=at + 1 < left, other=-1)
        source = tl.load(order + at, mask=inside, other=0)
        began = ids == before
        crosses = began | (ids == after)
        ends = inside & ((ids != following) | (at == CHUNK - 1))
        finished = ends & ~crosses & (ids >= 0) & (ids < num_rows)
        grad = tl.load(rows + source[:, None] * ROWS_STRIDE + columns, mask=inside[:, None] & inside_row, other=0.0)
        fetched = _fetch(weight, first, second, last, ids, finished, WEIGHT_STRIDE, DIM, BLOCK_D, RULE)
        grad = grad.to(tl.float32)  # [TILE, BLOCK_D]
        starts = tl.broadcast_to((ids != previous)[:, None], [TILE, BLOCK_D])
        grad, starts = tl.associative_scan((grad, starts), 0, _join)
        grad += tl.where((ids == carried)[:, None], carry, 0.0)
        carry = tl.sum(tl.where((position == TILE - 1)[:, None], grad, 0.0), 0, keep_dims=True)
        carried = tl.load(sorted_ids + start + TILE - 1, mask=start + TILE <= left, other=-1)
        _update(weight, first, second, last, ids, finished, fetched, grad, scalars, eps, num_rows, WEIGHT_STRIDE, DIM,
                BLOCK_D, RULE, FRESH1, FRESH2, DECAYS)
        slot = 2 * chunk + tl.where(began, 0, 1)
        tl.store(partial + slot[:, None] * DIM + columns, grad, mask=(ends & crosses)[:, None] & inside_row)


@triton.jit
def _close_kernel(
    weight,  # [num_rows, DIM], rows WEIGHT_STRIDE apart
    first,  # state of the rule as `RowState` has it, None where it has none
    second,
    last,
    sorted_ids,  # [n] int32 or int64
    partial,  # [chunks, 2, DIM] fp32
    lr,  # fp32, or a pointer to a float
    step,  # pointers to int64, or None
    seed,
    weight_decay,
    eps,
    chunks,
    num_rows,
    WEIGHT_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
    FRESH1: tl.constexpr,  # 1 - beta
    FRESH2: tl.constexpr,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    DECAYS: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)  # one of all but the last
    before = tl.load(sorted_ids + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    run = tl.load(sorted_ids + chunk * CHUNK + CHUNK - 1)
    after = tl.load(sorted_ids + chunk * CHUNK + CHUNK)
    if (run == after) & (run != before):
        columns = tl.arange(0, BLOCK_D)[None, :]
        total = tl.load(partial + (2 * chunk + 1) * DIM + columns, mask=columns < DIM, other=0.0)  # [1, BLOCK_D]
        tile = chunk + 1
        goes_on = run == after
        while goes_on:
            at = tile + tl.arange(0, TILE)
            head = tl.load(sorted_ids + at * CHUNK, mask=at < chunks, other=-1)
            mask = ((at < chunks) & (head == run))[:, None] & (columns < DIM)
            total += tl.sum(tl.load(partial + 2 * at[:, None] * DIM + columns, mask=mask, other=0.0), 0, keep_dims=True)
            tile += TILE
            goes_on = (tile < chunks) & (tl.load(sorted_ids + tile * CHUNK, mask=tile < chunks, other=-1) == run)
        ids = run + tl.zeros([1], run.dtype)
        in_table = (ids >= 0) & (ids < num_rows)
        fetched = _fetch(weight, first, second, last, ids, in_table, WEIGHT_STRIDE, DIM, BLOCK_D, RULE)
        rate = tl.load(lr) if LR_IS_TENSOR else lr
        scalars = _scalars(rate, step, seed, weight_decay, RULE, LOG2_BETA1, LOG2_BETA2)
        _update(weight, first, second, last, ids, in_table, fetched, total, scalars, eps, num_rows, WEIGHT_STRIDE, DIM,
                BLOCK_D, RULE, FRESH1, FRESH2, DECAYS)


def _tile(block: int, rule: str) -> tuple[int, int]:
    """(positions of a tile, warps) of the first kernel; half the positions where rows of state come along."""
    tile, warps = TILES[block]
    return (max(2, tile // 2) if rule in ("adagrad", "lazy-adam") else tile), warps


def _max_registers(block: int, rule: str, dtype: torch.dtype, counts: bool) -> int | None:
    """Of a thread of the first kernel; None for as many as it takes: bf16 and counted steps would spill."""
    return MAX_REGISTERS.get((rule, block)) if dtype == torch.float32 and not counts else None


def _constants(rule: Rule) -> dict[str, Any]:
    """What both kernels have compiled in."""
    log1, log2 = (math.log2(beta) if beta else -math.inf for beta in (rule.beta1, rule.beta2))
    return {"RULE": rule.name, "FRESH1": 1.0 - rule.beta1, "FRESH2": 1.0 - rule.beta2, "LOG2_BETA1": log1,
            "LOG2_BETA2": log2, "DECAYS": bool(rule.weight_decay)}


def update_triton(weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, rule: Rule, state: RowState,
                  plan: Plan | None = None) -> None:
    """`update_reference`, in place; ids outside the table, which the lookup has refused, are left out.

    The plan, if any, is of these ids. A learning rate on the table's device is read there.
    """
    num_rows, dim = weight.shape
    if dim > MAX_DIM:
        raise ValueError(f"rows of {dim} elements: kernels='triton' updates rows of at most {MAX_DIM}; "
                         "kernels='eager' takes any")
    if weight.stride(1) != 1 and dim > 1:
        raise ValueError(f"the table has strides {weight.stride()}; kernels='triton' needs rows without gaps")
    n = ids.numel()
    if n == 0:
        return
    rows, lr = last_dim_contiguous(rows), rule.lr
    on_device = isinstance(lr, torch.Tensor) and lr.device == weight.device
    lr = lr if on_device else float(lr)  # a tensor that is elsewhere is on the host: nothing waits
    sorted_ids, order = sort_ids(ids, num_rows) if plan is None else (plan.sorted_ids, plan.order)
    chunks, block = triton.cdiv(n, CHUNK), max(16, triton.next_power_of_2(dim))
    partial = torch.empty(chunks, 2, dim, dtype=torch.float32, device=weight.device)
    tile, warps = _tile(block, rule.name)
    tables = (weight, state.first if rule.name != "sgd" else None,
              state.second if rule.name == "lazy-adam" else None, state.last)
    scalars = (lr, state.step, state.seed, float(rule.weight_decay), float(rule.eps))
    constants = {"DIM": dim, "BLOCK_D": block, "CHUNK": CHUNK, "WEIGHT_STRIDE": weight.stride(0),
                 "LR_IS_TENSOR": on_device, **_constants(rule)}
    with torch.cuda.device_of(weight):
        _chunk_kernel[(chunks,)](*tables, sorted_ids, order, rows, partial, *scalars, n, num_rows,
                                 ROWS_STRIDE=rows.stride(0), TILE=tile, num_warps=warps,
                                 maxnreg=_max_registers(block, rule.name, weight.dtype, state.last is not None),
                                 **constants)
        if chunks > 1:
            _close_kernel[(chunks - 1,)](*tables, sorted_ids, partial, *scalars, chunks, num_rows,
                                         TILE=CLOSE_ELEMENTS // block, num_warps=CLOSE_WARPS, **constants)
    for written in tables:
        if written is not None:
            torch.autograd.graph.increment_version(written)  # as any in-place operator of torch does


# To compile without a GPU: (dim, rule, dtype of table and moments, decay that counts steps).
AOT = [(64, "sgd", "fp32", False), (64, "rowwise-adagrad", "fp32", False), (64, "rowwise-adagrad", "bf16", True),
       (64, "adagrad", "fp32", True), (64, "lazy-adam", "fp32", False), (64, "lazy-adam", "bf16", True),
       (16, "rowwise-adagrad", "fp32", False), (2048, "rowwise-adagrad", "fp32", False),
       (2048, "lazy-adam", "bf16", True)]


def aot_specs() -> list[Spec]:
    """The launch configurations to compile without a GPU: both kernels at the tuned width, the ends of the table."""
    specs = []
    for dim, name, dtype, counts in AOT:
        rule = Rule(name, 0.1, weight_decay=0.1 if counts else 0.0)
        tile, warps = _tile(dim, name)
        adam = name == "lazy-adam"
        kinds = {"weight": f"*{dtype}", "first": f"*{dtype if adam else 'fp32'}", "second": f"*{dtype}",
                 "last": "*i32", "sorted_ids": "*i32", "order": "*i64", "rows": "*fp32", "partial": "*fp32",
                 "lr": "*fp32", "step": "*i64", "seed": "*i64", "weight_decay": "fp32", "eps": "fp32", "n": "i32",
                 "chunks": "i32", "num_rows": "i32"}
        absent = {"first": name == "sgd", "second": not adam, "last": not counts, "seed": dtype != "bf16",
                  "step": not (adam or counts or dtype == "bf16")}
        shared = {"WEIGHT_STRIDE": dim, "DIM": dim, "BLOCK_D": dim, "CHUNK": CHUNK, "LR_IS_TENSOR": True,
                  **_constants(rule), **{argument: None for argument, is_absent in absent.items() if is_absent}}
        for kernel, constexprs, num_warps in [(_chunk_kernel, {"ROWS_STRIDE": dim, "TILE": tile}, warps),
                                              (_close_kernel, {"TILE": CLOSE_ELEMENTS // dim}, CLOSE_WARPS)]:
            if kernel is _close_kernel and dim != 64:
                continue
            constexprs |= shared
            signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constexprs}
            label = f"{kernel.__name__[1:]} {name} {dtype} dim {dim}" + (" counting steps" if counts else "")
            limit = _max_registers(dim, name, torch.float32 if dtype == "fp32" else torch.bfloat16, counts)
            specs.append(Spec(kernel, signature, constexprs, num_warps, label,
                              resident_warps=13 if (dim, dtype) == (64, "fp32") else 8,
                              max_registers=limit if kernel is _chunk_kernel else None))
    return specs

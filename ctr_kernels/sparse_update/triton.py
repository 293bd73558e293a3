"""Row updates of an embedding table in Triton: duplicates summed, each touched row read and written once.

The lookup needs no kernel of its own: `F.embedding(ids, weight, sparse=True)` reads the ids and n rows and writes n
rows, 8 n + 2 n r bytes (r = bytes of a row), which is its floor; and its gradient is the pair (ids, rows) itself,
made from views without a kernel.

The update of n (id, row) pairs, U ids of them distinct, has a data-dependent shape only on paper:

1. The ids, narrowed to int32 where the table allows it, are sorted with their positions (stable, so that the order
   of every sum is fixed). Equal ids now form runs. This depends on ids alone.
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
    table rows      2 U r          53.1 MB    floor, read and written once (rowwise Adagrad: and 8 U bytes of state)
    sorted ids      12 n            1.3 MB    (4 + 8 for the positions; neighbours come from the cache)
    partial sums    <= 4 n r / CHUNK   1.7 MB if every chunk's ends are crossed, 0.1 MB at uniform ids
3 n dim + 2 U dim FLOP = 34 MFLOP: far below the memory time. The sort, four radix passes of 24 n bytes = 10.2 MB, comes
on top.

Occupancy: at most 134 registers for fp32 rows of 64 (sm_90), so 15 one-warp programs fit an SM; the 1,664 programs of
n = 106,496 are 12.6 an SM, one wave, each with 4 KB of gradient and 4 KB of table rows in flight.
"""

import torch
import triton
import triton.language as tl

from ..library import last_dim_contiguous
from ..triton_support import Spec
from .plan import Plan, sort_ids
from .rule import RowState, Rule

CHUNK = 64  # sorted positions of a program

# Launch configurations of the first kernel by padded row width: (positions of a tile, warps). One row lies within as
# few warps as 16-byte loads allow, so that the scan over positions needs shuffles only, no shared memory.
TILES = {16: (32, 1), 32: (32, 1), 64: (16, 1), 128: (8, 1), 256: (8, 2), 512: (8, 4), 1024: (8, 8), 2048: (4, 16)}
MAX_DIM = max(TILES)
CLOSE_WARPS = 4
CLOSE_ELEMENTS = 4096  # of a tile of partial sums


@triton.jit
def _join(left, left_starts, right, right_starts):
    """The sum up to the end of two neighbouring pieces: of the right one alone where a run starts in it."""
    return tl.where(right_starts, right, left + right), left_starts | right_starts


@triton.jit
def _fetch(weight, state, ids, chosen,
           WEIGHT_STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ADAGRAD: tl.constexpr):
    """Rows [R, BLOCK_D] and accumulators [R] of the table rows ids [R] where chosen [R], in fp32."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = weight + ids.to(tl.int64)[:, None] * WEIGHT_STRIDE + columns
    row = tl.load(pointers, mask=chosen[:, None] & (columns < DIM), other=0.0).to(tl.float32)
    sums = tl.load(state + ids, mask=chosen, other=0.0) if ADAGRAD else tl.zeros(ids.shape, tl.float32)
    return row, sums


@triton.jit
def _update(weight, state, ids, chosen, row, sums, grad, lr, eps,
            WEIGHT_STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ADAGRAD: tl.constexpr,
            LR_IS_TENSOR: tl.constexpr):
    """Write back what `_fetch` read, updated with grad [R, BLOCK_D]."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    step = tl.load(lr).to(tl.float32) if LR_IS_TENSOR else lr
    if ADAGRAD:
        sums += tl.sum(grad * grad, 1) / DIM
        tl.store(state + ids, sums, mask=chosen)
        step = tl.div_rn(step, tl.sqrt_rn(sums) + eps)[:, None]
    row -= step * grad
    pointers = weight + ids.to(tl.int64)[:, None] * WEIGHT_STRIDE + columns
    tl.store(pointers, row.to(weight.dtype.element_ty), mask=chosen[:, None] & (columns < DIM))


@triton.jit
def _chunk_kernel(
    weight,  # [num_rows, DIM], rows WEIGHT_STRIDE apart
    state,  # [num_rows] fp32, or None without ADAGRAD
    sorted_ids,  # [n] int32 or int64
    order,  # [n] int64: sorted_ids[i] = ids[order[i]]
    rows,  # [n, DIM], rows ROWS_STRIDE apart
    partial,  # [chunks, 2, DIM] fp32
    lr,  # fp32, or a pointer to one
    eps,
    n,
    num_rows,
    WEIGHT_STRIDE: tl.constexpr,
    ROWS_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ADAGRAD: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
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
        row, sums = _fetch(weight, state, ids, finished, WEIGHT_STRIDE, DIM, BLOCK_D, ADAGRAD)
        grad = grad.to(tl.float32)  # [TILE, BLOCK_D]
        starts = tl.broadcast_to((ids != previous)[:, None], [TILE, BLOCK_D])
        grad, starts = tl.associative_scan((grad, starts), 0, _join)
        grad += tl.where((ids == carried)[:, None], carry, 0.0)
        carry = tl.sum(tl.where((position == TILE - 1)[:, None], grad, 0.0), 0, keep_dims=True)
        carried = tl.load(sorted_ids + start + TILE - 1, mask=start + TILE <= left, other=-1)
        _update(weight, state, ids, finished, row, sums, grad, lr, eps, WEIGHT_STRIDE, DIM, BLOCK_D, ADAGRAD,
                LR_IS_TENSOR)
        slot = 2 * chunk + tl.where(began, 0, 1)
        tl.store(partial + slot[:, None] * DIM + columns, grad, mask=(ends & crosses)[:, None] & inside_row)


@triton.jit
def _close_kernel(
    weight,  # [num_rows, DIM], rows WEIGHT_STRIDE apart
    state,  # [num_rows] fp32, or None without ADAGRAD
    sorted_ids,  # [n] int32 or int64
    partial,  # [chunks, 2, DIM] fp32
    lr,  # fp32, or a pointer to one
    eps,
    chunks,
    num_rows,
    WEIGHT_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ADAGRAD: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)  # one of all but the last
    before = tl.load(sorted_ids + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    last = tl.load(sorted_ids + chunk * CHUNK + CHUNK - 1)
    after = tl.load(sorted_ids + chunk * CHUNK + CHUNK)
    if (last == after) & (last != before):
        columns = tl.arange(0, BLOCK_D)[None, :]
        total = tl.load(partial + (2 * chunk + 1) * DIM + columns, mask=columns < DIM, other=0.0)  # [1, BLOCK_D]
        tile = chunk + 1
        goes_on = last == after
        while goes_on:
            at = tile + tl.arange(0, TILE)
            first = tl.load(sorted_ids + at * CHUNK, mask=at < chunks, other=-1)
            mask = ((at < chunks) & (first == last))[:, None] & (columns < DIM)
            total += tl.sum(tl.load(partial + 2 * at[:, None] * DIM + columns, mask=mask, other=0.0), 0, keep_dims=True)
            tile += TILE
            goes_on = (tile < chunks) & (tl.load(sorted_ids + tile * CHUNK, mask=tile < chunks, other=-1) == last)
        ids = last + tl.zeros([1], last.dtype)
        in_table = (ids >= 0) & (ids < num_rows)
        row, sums = _fetch(weight, state, ids, in_table, WEIGHT_STRIDE, DIM, BLOCK_D, ADAGRAD)
        _update(weight, state, ids, in_table, row, sums, total, lr, eps, WEIGHT_STRIDE, DIM, BLOCK_D, ADAGRAD,
                LR_IS_TENSOR)


def _launch(weight: torch.Tensor, state: torch.Tensor | None, ids: torch.Tensor, rows: torch.Tensor,
            lr: float | torch.Tensor, eps: float, plan: Plan | None) -> None:
    """Both kernels; ids outside the table, which the lookup has refused, are left out."""
    num_rows, dim = weight.shape
    if dim > MAX_DIM:
        raise ValueError(f"rows of {dim} elements: kernels='triton' updates rows of at most {MAX_DIM}; "
                         "kernels='eager' takes any")
    if weight.stride(1) != 1 and dim > 1:
        raise ValueError(f"the table has strides {weight.stride()}; kernels='triton' needs rows without gaps")
    n = ids.numel()
    if n == 0:
        return
    rows = last_dim_contiguous(rows)
    on_device = isinstance(lr, torch.Tensor) and lr.device == weight.device
    lr = lr if on_device else float(lr)  # a tensor that is elsewhere is on the host: nothing waits
    sorted_ids, order = sort_ids(ids, num_rows) if plan is None else (plan.sorted_ids, plan.order)
    chunks, block = triton.cdiv(n, CHUNK), max(16, triton.next_power_of_2(dim))
    partial = torch.empty(chunks, 2, dim, dtype=torch.float32, device=weight.device)
    tile, warps = TILES[block]
    flags = (state is not None, on_device)
    with torch.cuda.device_of(weight):
        _chunk_kernel[(chunks,)](weight, state, sorted_ids, order, rows, partial, lr, eps, n, num_rows,
                                 weight.stride(0), rows.stride(0), dim, block, CHUNK, tile, *flags, num_warps=warps)
        if chunks > 1:
            _close_kernel[(chunks - 1,)](weight, state, sorted_ids, partial, lr, eps, chunks, num_rows,
                                         weight.stride(0), dim, block, CHUNK, CLOSE_ELEMENTS // block, *flags,
                                         num_warps=CLOSE_WARPS)
    for written in (weight,) if state is None else (weight, state):
        torch.autograd.graph.increment_version(written)  # as any in-place operator of torch does


def update_triton(weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, rule: Rule, state: RowState,
                  plan: Plan | None = None) -> None:
    """`update_reference`, in place; the plan, if any, is of these ids."""
    if rule.name not in ("sgd", "rowwise-adagrad") or rule.weight_decay or state.seed is not None:
        raise NotImplementedError(f"kernels='triton' has no {rule.name} with decay or bf16 yet; use kernels='eager'")
    _launch(weight, state.first, ids, rows, rule.lr, rule.eps, plan)


def aot_specs() -> list[Spec]:
    """The launch configurations to compile without a GPU: both kernels at the tuned width, the ends of the table."""
    kinds = {"state": "*fp32", "sorted_ids": "*i32", "order": "*i64", "partial": "*fp32",
             "lr": "*fp32", "eps": "fp32", "n": "i32", "chunks": "i32", "num_rows": "i32"}
    specs = []
    for dim, dtype, adagrad in [(64, "fp32", False), (64, "fp32", True), (64, "bf16", True), (16, "fp32", True),
                                (2048, "fp32", True)]:
        tile, warps = TILES[dim]
        shared = {"WEIGHT_STRIDE": dim, "DIM": dim, "BLOCK_D": dim, "CHUNK": CHUNK, "ADAGRAD": adagrad,
                  "LR_IS_TENSOR": True} | ({} if adagrad else {"state": None})
        kinds |= {"weight": f"*{dtype}", "rows": f"*{dtype}"}
        for kernel, constexprs, num_warps in [(_chunk_kernel, {"ROWS_STRIDE": dim, "TILE": tile}, warps),
                                              (_close_kernel, {"TILE": CLOSE_ELEMENTS // dim}, CLOSE_WARPS)]:
            if kernel is _close_kernel and dim != 64:
                continue
            constexprs |= shared
            signature = {name: kinds[name] for name in kernel.arg_names if name not in constexprs}
            name = f"{kernel.__name__[1:]} {'adagrad' if adagrad else 'sgd'} {dtype} dim {dim}"
            specs.append(Spec(kernel, signature, constexprs, num_warps, name))
    return specs

"""The kernels of the row updates: runs of equal ids summed in sorted order, each row updated once; see triton.py."""

import triton
import triton.language as tl

from ..triton_support import philox


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
        counter = ((which * tl.cast(num_rows, tl.int64) + ids.to(tl.int64)) * ((DIM + 7) // 8))[:, None]
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
def chunk_kernel(
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
def close_kernel(
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

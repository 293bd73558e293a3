"""The feed-forward network in Triton: one kernel forward, two backward; the hidden never leaves the chip.

For a tile of tokens X [BM, D] and a slice of BH hidden units, M the dropout multipliers (philox.py):
    forward    A = X W1^T + b1,  H = act(A) M,  Y += H W2^T                                        2 dots
    backward   A again, dH = dY W2, dA = dH M act'(A)                                              2 dots
               token kernel:   dX += dA W1, over the slices of a tile                              1 dot
               weight kernel:  dW1 += dA^T X, dW2^T += H^T dY, db1 += rowsum(dA^T), db2 += colsum(dY)   2 dots
The weight kernel works on A^T = W1 X^T, so that H^T and dA^T are left operands as they come out. A fixed number of its
programs share a slice; each sums every so-manieth tile in registers and writes fp32 partial sums once, which torch.sum
adds in a fixed order: no atomics, the same bits at every run. Recomputing A and dH in both kernels costs two dots
of seven, but one kernel that holds all the sums in registers spills. So do the sums of both layers in fp32 at D > 64
and "highest" precision: there the weight kernel makes a pass for each layer, of three dots and of two.

Traffic and work next to the floor, n tokens, elements of e bytes, P partial sums; n=110,592, D=64, hidden=256, fp32:
    forward    2 n D e = 57 MB, the floor (x read, y written); weights (128 KB) come from L2; 4 n D hidden = 7.2 GFLOP
    token      3 n D e = 85 MB, the floor (x, dy read, dx written); 6 n D hidden = 10.9 GFLOP
    weight     2 n D e = 57 MB from memory, hidden / BH times that from L2; 8 n D hidden = 14.5 GFLOP;
               4 P (2 D hidden + hidden + D) bytes = 0.13 MB P of partial sums, written and read once
The floor of the backward is 18.1 GFLOP (five dots) and 85 MB; it takes 25.4 GFLOP (seven) and 142 MB.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..philox import threshold
from ..triton_support import Spec, capability, dot, dropout_multipliers
from .reference import ACTIVATIONS
from .triton_tiles import STAGES, TILES, Tile, tiles_for

MAX_DIM = 128


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    """Value and slope of GELU (erf), GELU (tanh) or ReLU: ACTIVATION is the index in reference.ACTIVATIONS.

    GELU is x Phi(x), Phi the normal distribution function: Phi(-t) = exp(-t^2 / 2) g(t) for t = |x|, with a polynomial
    for g that is minimax for the weighted error over [0, 5.5] (5e-8 as computed).
    """
    if ACTIVATION == 0:
        bell = tl.exp2(a * a * -0.7213475204)  # exp(-a^2 / 2)
        t = tl.minimum(tl.abs(a), 5.5)
        g = t * -3.1554663e-07 + 7.708849e-06
        g = g * t - 8.477157e-05
        g = g * t + 5.6365534e-04
        g = g * t - 2.5900975e-03
        g = g * t + 9.00386e-03
        g = g * t - 2.547183e-02
        g = g * t + 6.192394e-02
        g = g * t - 1.328058e-01
        g = g * t + 2.4997257e-01
        g = g * t - 3.989406e-01
        g = g * t + 0.5
        tail = bell * g
        phi = tl.where(a > 0, 1.0 - tail, tail)
        value = a * phi
        slope = phi + a * bell * 0.3989422804
    elif ACTIVATION == 1:  # (x / 2) (1 + tanh(u)) = x sigmoid(2 u)
        square = a * a
        u = a * (0.7978845608 + 0.0356774081 * square)
        small = tl.exp2(tl.abs(u) * -2.8853900818)
        inverse = 1.0 / (1.0 + small)
        sigmoid = tl.where(u < 0, small * inverse, inverse)
        rest = tl.where(u < 0, inverse, small * inverse)  # 1 - sigmoid without cancellation
        value = a * sigmoid
        slope = sigmoid + a * sigmoid * rest * (1.5957691216 + 0.2140644488 * square)
    else:
        value = tl.where(a <= 0, 0.0, a)
        slope = tl.where(a <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def _slice(
    w1,  # [HIDDEN, D], contiguous
    b1,  # [HIDDEN]
    w2,  # [D, HIDDEN], contiguous
    first, D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr,
):
    """Hidden units first, ..., first + BH - 1: w1 [BH, DP], b1 fp32 [BH], w2 [DP, BH]; zero beyond the edges."""
    unit, column = first + tl.arange(0, BH), tl.arange(0, DP)
    here, there = unit < HIDDEN, column < D
    tile_w1 = tl.load(w1 + (unit[:, None] * D + column[None, :]), mask=here[:, None] & there[None, :], other=0.0)
    tile_w2 = tl.load(w2 + (column[:, None] * HIDDEN + unit[None, :]), mask=here[None, :] & there[:, None], other=0.0)
    return tile_w1, tl.load(b1 + unit, mask=here, other=0.0).to(tl.float32), tile_w2


@triton.jit
def _multipliers(seed, start, first, limit, inverse_keep, HIDDEN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """Dropout multipliers [BM, BH]; the row of the map is the token, the column the hidden unit."""
    rows = start + tl.arange(0, BM)
    return dropout_multipliers(tl.load(seed), rows, first // 32, (HIDDEN + 31) // 32, limit, inverse_keep, BH // 32)


@triton.jit
def _forward_kernel(
    x,  # [tokens, D], contiguous
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    b2,  # [D]
    seed,  # int64 [1]; None without DROPOUT
    y,  # [tokens, D], contiguous
    tokens, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """One tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    offsets = row[:, None] * D + column[None, :]
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
    total = tl.zeros((BM, DP), tl.float32)
    for first in tl.range(0, HIDDEN, BH, num_stages=STAGES):
        tile_w1, tile_b1, tile_w2 = _slice(w1, b1, w2, first, D, DP, HIDDEN, BH)
        a = dot(tile_x, tl.trans(tile_w1), None, PRECISION) + tile_b1[None, :]
        hidden, _ = _activate(a, ACTIVATION)
        if DROPOUT:
            hidden *= _multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        total = dot(hidden.to(tile_x.dtype), tl.trans(tile_w2), total, PRECISION)
    total += tl.load(b2 + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + start * D + offsets, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _token_kernel(
    dy, x,  # [tokens, D], contiguous
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    seed,  # int64 [1]; None without DROPOUT
    dx,  # [tokens, D], contiguous
    tokens, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """dX of one tile of BM tokens."""
    start = tl.program_id(0).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, DP)
    offsets = row[:, None] * D + column[None, :]
    inside = (row < tokens - start)[:, None] & (column < D)[None, :]
    tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
    tile_dy = tl.load(dy + start * D + offsets, mask=inside, other=0.0)
    total = tl.zeros((BM, DP), tl.float32)
    for first in tl.range(0, HIDDEN, BH, num_stages=STAGES):
        tile_w1, tile_b1, tile_w2 = _slice(w1, b1, w2, first, D, DP, HIDDEN, BH)
        a = dot(tile_x, tl.trans(tile_w1), None, PRECISION) + tile_b1[None, :]
        _, slope = _activate(a, ACTIVATION)
        if DROPOUT:
            slope *= _multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        da = dot(tile_dy, tile_w2, None, PRECISION) * slope
        total = dot(da.to(tile_x.dtype), tile_w1, total, PRECISION)
    tl.store(dx + start * D + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    dy, x,  # [tokens, D], contiguous
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    seed,  # int64 [1]; None without DROPOUT
    partial,  # fp32 [programs a slice, HIDDEN D + D HIDDEN + HIDDEN + D]: dW1, dW2, db1, db2
    tokens, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr, LAYERS: tl.constexpr,
):
    """The sums of one slice of hidden units over every so-manieth tile of tokens; slice 0 also sums db2.

    LAYERS: 1 sums dW1 and db1, 2 sums dW2 and db2, 3 both.
    """
    SLICES: tl.constexpr = (HIDDEN + BH - 1) // BH
    part, first = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * BH
    row, column, unit = tl.arange(0, BM), tl.arange(0, DP), first + tl.arange(0, BH)
    offsets = row[:, None] * D + column[None, :]
    tile_w1, tile_b1, tile_w2 = _slice(w1, b1, w2, first, D, DP, HIDDEN, BH)
    tile_w2 = tl.trans(tile_w2)
    dw1 = tl.zeros((BH, DP), tl.float32)
    dw2 = tl.zeros((BH, DP), tl.float32)  # transposed
    db1 = tl.zeros((BH,), tl.float32)
    db2 = tl.zeros((DP,), tl.float32)
    for tile in tl.range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // SLICES, num_stages=STAGES):
        start = tl.cast(tile, tl.int64) * BM
        inside = (row < tokens - start)[:, None] & (column < D)[None, :]
        tile_x = tl.load(x + start * D + offsets, mask=inside, other=0.0)
        tile_dy = tl.load(dy + start * D + offsets, mask=inside, other=0.0)
        a = dot(tile_w1, tl.trans(tile_x), None, PRECISION) + tile_b1[:, None]  # [BH, BM]
        hidden, slope = _activate(a, ACTIVATION)
        if DROPOUT:
            kept = tl.trans(_multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH))
            hidden *= kept
            slope *= kept
        if LAYERS & 1:
            da = dot(tile_w2, tl.trans(tile_dy), None, PRECISION) * slope
            db1 += tl.sum(da, axis=1)
            dw1 = dot(da.to(tile_x.dtype), tile_x, dw1, PRECISION)
        if LAYERS & 2:
            dw2 = dot(hidden.to(tile_x.dtype), tile_dy, dw2, PRECISION)
            if first == 0:
                db2 += tl.sum(tile_dy.to(tl.float32), axis=0)
    partial += part.to(tl.int64) * (2 * D * HIDDEN + HIDDEN + D)
    inside = (unit < HIDDEN)[:, None] & (column < D)[None, :]
    if LAYERS & 1:
        tl.store(partial + (unit[:, None] * D + column[None, :]), dw1, mask=inside)
        tl.store(partial + 2 * D * HIDDEN + unit, db1, mask=unit < HIDDEN)
    if LAYERS & 2:
        tl.store(partial + D * HIDDEN + (column[None, :] * HIDDEN + unit[:, None]), dw2, mask=inside)
        tl.store(partial + 2 * D * HIDDEN + HIDDEN + column, db2, mask=(column < D) & (first == 0))


def _launch(kernel: Any, tile: Tile, programs: int, tensors: tuple[torch.Tensor | None, ...],
            shape: tuple[int, int, int], activation: int, dropout_p: float, precision: str, **constants: int) -> None:
    """Run `programs` programs on tensors of shape = (tokens, D, hidden)."""
    tokens, dim, hidden = shape
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](
            *tensors, tokens, threshold(dropout_p), 1.0 / (1.0 - dropout_p), D=dim,
            DP=max(16, triton.next_power_of_2(dim)), HIDDEN=hidden, ACTIVATION=activation, DROPOUT=dropout_p > 0.0,
            PRECISION=precision, BM=tile.tokens, BH=tile.units, STAGES=STAGES, num_warps=tile.warps, **constants)


def _programs_a_slice(tile: Tile, tokens: int, hidden: int, device: torch.device) -> int:
    """How many programs share a slice of the weight kernel: as many as run at once, at 8 warps a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    at_once = processors * (8 // tile.warps) // triton.cdiv(hidden, tile.units)
    return max(1, min(at_once, triton.cdiv(tokens, tile.tokens)))


def _forward(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
             seed: torch.Tensor | None, activation: int, dropout_p: float) -> torch.Tensor:
    """[tokens, D] -> [tokens, D]; all tensors contiguous."""
    y = torch.empty_like(x)
    tiles, precision = tiles_for(x.shape[1], x.dtype, capability(x.device))
    if x.shape[0]:
        _launch(_forward_kernel, tiles.forward, triton.cdiv(x.shape[0], tiles.forward.tokens),
                (x, w1, b1, w2, b2, seed, y), (*x.shape, w1.shape[0]), activation, dropout_p, precision)
    return y


def _grad_tokens(dy: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor,
                 seed: torch.Tensor | None, activation: int, dropout_p: float) -> torch.Tensor:
    """dX [tokens, D]."""
    dx = torch.empty_like(x)
    tiles, precision = tiles_for(x.shape[1], x.dtype, capability(x.device))
    if x.shape[0]:
        _launch(_token_kernel, tiles.token, triton.cdiv(x.shape[0], tiles.token.tokens),
                (dy, x, w1, b1, w2, seed, dx), (*x.shape, w1.shape[0]), activation, dropout_p, precision)
    return dx


def _grad_weights(dy: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor,
                  seed: torch.Tensor | None, activation: int, dropout_p: float) -> list[torch.Tensor]:
    """dW1 [hidden, D], db1 [hidden], dW2 [D, hidden], db2 [D], in the dtype of x."""
    (tokens, dim), hidden = x.shape, w1.shape[0]
    tiles, precision = tiles_for(dim, x.dtype, capability(x.device))
    parts = _programs_a_slice(tiles.weight, tokens, hidden, x.device)
    sizes = (hidden * dim, dim * hidden, hidden, dim)
    partial = torch.empty(parts if tokens else 0, sum(sizes), dtype=torch.float32, device=x.device)
    for layers in tiles.passes if tokens else ():
        _launch(_weight_kernel, tiles.weight, parts * triton.cdiv(hidden, tiles.weight.units),
                (dy, x, w1, b1, w2, seed, partial), (tokens, dim, hidden), activation, dropout_p, precision,
                LAYERS=layers)
    dw1, dw2, db1, db2 = partial.sum(0).to(x.dtype).split(sizes)
    return [dw1.view(hidden, dim), db1, dw2.view(dim, hidden), db2]


class _FFN(torch.autograd.Function):
    """Keeps x, w1, b1, w2 and the seed for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
                activation: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, w1, b1, w2, seed)
        ctx.settings = (activation, dropout_p)
        return _forward(x, w1, b1, w2, b2, seed, activation, dropout_p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arguments = (dy.contiguous(), *ctx.saved_tensors, *ctx.settings)
        dx = _grad_tokens(*arguments) if ctx.needs_input_grad[0] else None
        weights = _grad_weights(*arguments) if any(ctx.needs_input_grad[1:5]) else [None] * 4
        return dx, *weights, None, None, None


def ffn_triton(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
               activation: str, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """[..., D], fp32, bf16 or fp16 -> [..., D]; x, w1, b1 and w2 are all that backward keeps."""
    dim = x.shape[-1]
    if dim > MAX_DIM:
        raise ValueError(f"D={dim}; kernels='triton' takes up to {MAX_DIM}, kernels='eager' any")
    tensors = (t.contiguous() for t in (x.reshape(-1, dim), w1, b1, w2, b2))
    return _FFN.apply(*tensors, list(ACTIVATIONS).index(activation), dropout_p, seed).view(x.shape)


def aot_specs() -> list[Spec]:
    """Every launch configuration, to compile without a GPU: at hidden 256, GELU (erf), with dropout."""
    specs = []
    for (arithmetic, wide, cc), tiles in TILES.items():
        dim, dtype = 128 if wide else 64, "bf16" if arithmetic == "half" else "fp32"
        kinds = {"seed": "*i64", "partial": "*fp32", "tokens": "i32", "limit": "i32", "inverse_keep": "fp32"}
        constants = {"D": dim, "DP": dim, "HIDDEN": 256, "ACTIVATION": 0, "DROPOUT": True, "STAGES": STAGES,
                     "PRECISION": "tf32" if arithmetic == "half" else arithmetic}
        launches = [(_forward_kernel, tiles.forward, {}), (_token_kernel, tiles.token, {})]
        launches += [(_weight_kernel, tiles.weight, {"LAYERS": layers}) for layers in tiles.passes]
        for kernel, tile, extra in launches:
            constexprs = constants | {"BM": tile.tokens, "BH": tile.units} | extra
            signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constexprs}
            part = "" if len(tiles.passes) == 1 or not extra else f" of layer {extra['LAYERS']}"
            name = f"{kernel.__name__[1:]}{part} {dtype if arithmetic == 'half' else arithmetic} D {dim}"
            specs.append(Spec(kernel, signature, constexprs, tile.warps, name, (cc,)))
    return specs

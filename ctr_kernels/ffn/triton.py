"""The feed-forward network in Triton: one kernel forward, two backward; the hidden never leaves the chip.

For a tile of tokens X [BM, D] and a slice of BH hidden units, M the dropout multipliers (philox.py):
    forward    A = X W1^T + b1,  H = act(A) M,  Y += H W2^T                                        2 dots
    backward   A again, dH = dY W2, dA = dH M act'(A)                                              2 dots
               token kernel:   dX += dA W1, over the slices of a tile                              1 dot
               weight kernel:  dW1 += dA^T X, dW2^T += H^T dY, db1 += rowsum(dA^T), db2 += colsum(dY)   2 dots
The weight kernel works on A^T = W1 X^T, so that H^T and dA^T are left operands as they come out. A fixed number of its
programs share a slice; each sums every so-manieth tile in registers and writes fp32 partial sums once, which torch.sum
adds in a fixed order: no atomics, the same bits at every run. Recomputing A and dH in both kernels costs two dots
of seven; one kernel with all the sums in registers spills.

Traffic and work next to the floor, n tokens, elements of e bytes, P partial sums; n=110,592, D=64, hidden=256, fp32:
    forward    2 n D e = 57 MB, the floor (x read, y written); weights (128 KB) come from L2; 4 n D hidden = 7.2 GFLOP
    token      3 n D e = 85 MB, the floor (x, dy read, dx written); 6 n D hidden = 10.9 GFLOP
    weight     2 n D e = 57 MB from memory, hidden / BH times that from L2; 8 n D hidden = 14.5 GFLOP;
               4 P (2 D hidden + hidden + D) bytes = 0.13 MB P of partial sums, written and read once
The backward's floor is 18.1 GFLOP (a dot fewer forward, five backward) and 85 MB; it takes 25.4 GFLOP and 142 MB.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..philox import threshold
from ..triton_support import Spec, capability, dropout_multipliers, input_precision
from .reference import ACTIVATIONS

MAX_DIM = 128


class Tile(NamedTuple):
    """A launch configuration: tokens and hidden units at a time (of these a multiple of 32), and warps."""

    tokens: int
    units: int
    warps: int


class Tiles(NamedTuple):
    """The launch configurations of the three kernels."""

    forward: Tile
    token: Tile
    weight: Tile


# By arithmetic ("half": fp16 and bf16), whether D exceeds 64, and architecture (sm_80 stands for all but 9x and 10x).
TILES: dict[tuple[str, bool, int], Tiles] = {
    ("half", False, 80): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(64, 32, 4)),
    ("half", True, 80): Tiles(Tile(64, 32, 4), Tile(64, 32, 4), Tile(32, 32, 4)),
    ("tf32", False, 80): Tiles(Tile(64, 32, 4), Tile(64, 32, 4), Tile(16, 32, 4)),
    ("tf32", True, 80): Tiles(Tile(64, 32, 4), Tile(64, 32, 4), Tile(16, 32, 4)),
    ("tf32x3", False, 80): Tiles(Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 8)),
    ("tf32x3", True, 80): Tiles(Tile(32, 32, 4), Tile(32, 32, 4), Tile(16, 32, 4)),
}
STAGES = 2  # tiles in flight while one is worked on


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
        a = tl.dot(tile_x, tl.trans(tile_w1), input_precision=PRECISION) + tile_b1[None, :]
        hidden, _ = _activate(a, ACTIVATION)
        if DROPOUT:
            hidden *= _multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        total = tl.dot(hidden.to(tile_x.dtype), tl.trans(tile_w2), total, input_precision=PRECISION)
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
        a = tl.dot(tile_x, tl.trans(tile_w1), input_precision=PRECISION) + tile_b1[None, :]
        _, slope = _activate(a, ACTIVATION)
        if DROPOUT:
            slope *= _multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH)
        da = tl.dot(tile_dy, tile_w2, input_precision=PRECISION) * slope
        total = tl.dot(da.to(tile_x.dtype), tile_w1, total, input_precision=PRECISION)
    tl.store(dx + start * D + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    dy, x,  # [tokens, D], contiguous
    w1, b1, w2,  # [HIDDEN, D], [HIDDEN], [D, HIDDEN], contiguous
    seed,  # int64 [1]; None without DROPOUT
    partial,  # fp32 [programs a slice, HIDDEN D + D HIDDEN + HIDDEN + D]: dW1, dW2, db1, db2
    tokens, limit, inverse_keep,
    D: tl.constexpr, DP: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):
    """The sums of one slice of hidden units over every so-manieth tile of tokens; slice 0 also sums db2."""
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
        a = tl.dot(tile_w1, tl.trans(tile_x), input_precision=PRECISION) + tile_b1[:, None]  # [BH, BM]
        hidden, slope = _activate(a, ACTIVATION)
        if DROPOUT:
            kept = tl.trans(_multipliers(seed, start, first, limit, inverse_keep, HIDDEN, BM, BH))
            hidden *= kept
            slope *= kept
        da = tl.dot(tile_w2, tl.trans(tile_dy), input_precision=PRECISION) * slope
        db1 += tl.sum(da, axis=1)
        dw1 = tl.dot(da.to(tile_x.dtype), tile_x, dw1, input_precision=PRECISION)
        dw2 = tl.dot(hidden.to(tile_x.dtype), tile_dy, dw2, input_precision=PRECISION)
        if first == 0:
            db2 += tl.sum(tile_dy.to(tl.float32), axis=0)
    partial += part.to(tl.int64) * (2 * D * HIDDEN + HIDDEN + D)
    inside = (unit < HIDDEN)[:, None] & (column < D)[None, :]
    tl.store(partial + (unit[:, None] * D + column[None, :]), dw1, mask=inside)
    tl.store(partial + D * HIDDEN + (column[None, :] * HIDDEN + unit[:, None]), dw2, mask=inside)
    tl.store(partial + 2 * D * HIDDEN + unit, db1, mask=unit < HIDDEN)
    tl.store(partial + 2 * D * HIDDEN + HIDDEN + column, db2, mask=(column < D) & (first == 0))


def _tiles(dim: int, dtype: torch.dtype, cc: int) -> tuple[Tiles, str]:
    """Launch configurations and input precision for D = dim on sm_<cc>; 0 is the interpreter."""
    precision = input_precision(dtype)
    arithmetic = precision if dtype == torch.float32 else "half"
    return TILES[arithmetic, dim > 64, cc // 10 * 10 if cc // 10 in (9, 10) else 80], precision


def _constants(x: torch.Tensor, w1: torch.Tensor, activation: int, dropout_p: float, precision: str) -> dict[str, Any]:
    """What all three kernels take alike, next to their tensors."""
    return {
        "tokens": x.shape[0], "limit": threshold(dropout_p), "inverse_keep": 1.0 / (1.0 - dropout_p),
        "D": x.shape[1], "DP": max(16, triton.next_power_of_2(x.shape[1])), "HIDDEN": w1.shape[0],
        "ACTIVATION": activation, "DROPOUT": dropout_p > 0.0, "PRECISION": precision, "STAGES": STAGES,
    }


def _tile(tile: Tile) -> dict[str, int]:
    return {"BM": tile.tokens, "BH": tile.units, "num_warps": tile.warps}


def _programs_a_slice(tile: Tile, tokens: int, hidden: int, device: torch.device) -> int:
    """How many programs share a slice of the weight kernel: as many as run at once, at 8 warps a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    at_once = processors * (8 // tile.warps) // triton.cdiv(hidden, tile.units)
    return max(1, min(at_once, triton.cdiv(tokens, tile.tokens)))


def _forward(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
             activation: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """[tokens, D] -> [tokens, D]; all tensors contiguous."""
    y = torch.empty_like(x)
    tiles, precision = _tiles(x.shape[1], x.dtype, capability(x.device))
    if x.shape[0]:
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(x.shape[0], tiles.forward.tokens),)](
                x, w1, b1, w2, b2, seed, y, **_constants(x, w1, activation, dropout_p, precision),
                **_tile(tiles.forward))
    return y


def _grad_tokens(dy: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor,
                 activation: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """dX [tokens, D]."""
    dx = torch.empty_like(x)
    tiles, precision = _tiles(x.shape[1], x.dtype, capability(x.device))
    if x.shape[0]:
        with torch.cuda.device_of(x):
            _token_kernel[(triton.cdiv(x.shape[0], tiles.token.tokens),)](
                dy, x, w1, b1, w2, seed, dx, **_constants(x, w1, activation, dropout_p, precision),
                **_tile(tiles.token))
    return dx


def _grad_weights(dy: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor,
                  activation: int, dropout_p: float, seed: torch.Tensor | None) -> list[torch.Tensor]:
    """dW1 [hidden, D], db1 [hidden], dW2 [D, hidden], db2 [D], in the dtype of x."""
    (tokens, dim), hidden = x.shape, w1.shape[0]
    sizes = (hidden * dim, dim * hidden, hidden, dim)
    tiles, precision = _tiles(dim, x.dtype, capability(x.device))
    if tokens:
        parts = _programs_a_slice(tiles.weight, tokens, hidden, x.device)
        partial = torch.empty(parts, sum(sizes), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _weight_kernel[(parts * triton.cdiv(hidden, tiles.weight.units),)](
                dy, x, w1, b1, w2, seed, partial, **_constants(x, w1, activation, dropout_p, precision),
                **_tile(tiles.weight))
        total = partial.sum(0).to(x.dtype)
    else:
        total = x.new_zeros(sum(sizes))
    dw1, dw2, db1, db2 = total.split(sizes)
    return [dw1.view(hidden, dim), db1, dw2.view(dim, hidden), db2]


class _FFN(torch.autograd.Function):
    """Keeps x, w1, b1, w2 and the seed for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
                activation: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, w1, b1, w2, seed)
        ctx.settings = (activation, dropout_p)
        return _forward(x, w1, b1, w2, b2, activation, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _grad_tokens(dy, *tensors, *ctx.settings, seed) if ctx.needs_input_grad[0] else None
        weights = _grad_weights(dy, *tensors, *ctx.settings, seed) if any(ctx.needs_input_grad[1:5]) else [None] * 4
        return dx, *weights, None, None, None


def ffn_triton(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
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
        for kernel, tile in zip((_forward_kernel, _token_kernel, _weight_kernel), tiles, strict=True):
            constexprs = constants | {"BM": tile.tokens, "BH": tile.units}
            signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constexprs}
            name = f"{kernel.__name__[1:]} {dtype if arithmetic == 'half' else arithmetic} D {dim}"
            specs.append(Spec(kernel, signature, constexprs, tile.warps, name, (cc,)))
    return specs

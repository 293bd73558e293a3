"""The feed-forward network in Triton: one kernel forward, two backward; the hidden never leaves the chip.

The same kernels (triton_kernels.py) do the second half of a transformer layer, x + ffn(LN(x)) or LN(x + ffn(x)).

For a tile of tokens X [BM, D] and a slice of BH hidden units, M the dropout multipliers (philox.py):
    forward    A = X W1^T + b1,  H = act(A) M,  Y += H W2^T                                        2 dots
    backward   A again, dH = dY W2, dA = dH M act'(A)                                              2 dots
               token kernel:   dX += dA W1, over the slices of a tile                              1 dot
               weight kernel:  dW1 += dA^T X, dW2^T += H^T dY, db1 += rowsum(dA^T), db2 += colsum(dY)   2 dots
With a gate W1 has rows a | b: A and B = X Wb^T + bb, H = A act(B) M, dA = dH M act(B), dB = dH M A act'(B),
dX += dA Wa + dB Wb: one dot more forward, two in the token kernel and in the weight kernel, which also sums dB^T X.
The weight kernel works on A^T = W1 X^T, so that H^T and dA^T are left operands as they come out. A fixed number of its
programs share a slice; each sums every P-th tile in registers and writes fp32 partial sums once, which triton_sums.py
adds in a fixed order: no atomics, the same bits at every run. Recomputing A and dH in both kernels costs two dots
of seven, but one kernel that holds all the sums in registers spills. So do the sums of both layers in fp32 at D > 64
and "highest" precision: there the weight kernel makes a pass for each layer, of three dots and of two.

Traffic and work next to the floor, n tokens, elements of e bytes, P partial sums; n=110,592, D=64, hidden=256, fp32:
    forward    2 n D e = 57 MB, the floor (x read, y written); weights (128 KB) come from L2; 4 n D hidden = 7.2 GFLOP
    token      3 n D e = 85 MB, the floor (x, dy read, dx written); 6 n D hidden = 10.9 GFLOP
    weight     2 n D e = 57 MB from memory, hidden / BH times that from L2; 8 n D hidden = 14.5 GFLOP;
               4 P (2 D hidden + hidden + D) bytes = 0.13 MB P of partial sums, written and read once
The floor of the backward is 18.1 GFLOP (five dots) and 85 MB; it takes 25.4 GFLOP (seven) and 142 MB.

With norm and residual, from and to memory, next to the same in separate kernels (norm, FFN, sum; n D e = 28 MB):
    pre        forward 2 n D e against 7; token 3 (and x and dy once more from the cache) against 9; weight 2
    post       forward 3 n D e (z = x + ffn(x) is kept) against 7; token 5 (z read, its gradient written; and that and x
               once more from the cache) against 9; weight 2
and 16 D tokens / BM bytes of partial sums for the gradients of the norm, written and read once (0.9 MB at BM = 128).
Beyond D = 128 products over D take slices of it: x, backward dy too, come from the cache again for every BH units.
Occupancy: 8 warps a multiprocessor at least, or as many programs of the weight kernel as a tile says (`resident`).
Measured on an H200 (docs/kernels/gpu.md): 1.9 times as fast as torch.compile both ways in bf16; bound by instructions.
"""

import itertools
from typing import Any

import torch
import triton

from ..philox import threshold
from ..triton_launch import (
    ANY,
    Key,
    capability,
    input_precision,
    is_measured,
    launch_choice,
    multiprocessors,
    table_choice,
)
from ..triton_norm import NORMS
from ..triton_sums import sum_parts, sum_rows, sum_spec
from ..triton_support import CAPABILITIES, Spec
from .reference import ACTIVATIONS, GATED
from .triton_kernels import forward_kernel, token_kernel, weight_kernel
from .triton_tiles import TILES, Tile, candidates, default, launch_key, tiles_for

Tensor = torch.Tensor
GATES = {list(ACTIVATIONS).index(name) for name in GATED}
SUMS = {False: 3, True: 7}  # all of the weight kernel's LAYERS, without a gate and with one


def _launch(kernel: Any, tile: Tile, programs: int, tensors: tuple[Any, ...], hidden: int,
            settings: tuple[int, float, int, float], precision: str, **constants: int) -> None:
    """Run `programs` programs; the first tensor is [tokens, D], settings are those of the operators."""
    (tokens, dim), (norm, eps, activation, dropout_p) = tensors[0].shape, settings
    width = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](
            *tensors, tokens, eps, threshold(dropout_p), 1.0 / (1.0 - dropout_p), D=dim, DP=width, HIDDEN=hidden,
            ACTIVATION=activation, NORM=norm, DROPOUT=dropout_p > 0.0, PRECISION=precision, BM=tile.tokens,
            BH=tile.units, DS=min(tile.columns or width, width), STAGES=tile.stages, num_warps=tile.warps, **constants)


def _key(kernel: str, x: Tensor, w1: Tensor, w2: Tensor, norm: int, activation: int) -> Key:
    return launch_key(kernel, x.shape[1], w2.shape[1], norm, activation in GATES, w1.dtype, capability(x.device))


def programs_a_slice(tile: Tile, tokens: int, hidden: int, device: torch.device) -> int:
    """How many programs share a slice of the weight kernel: as many as run at once."""
    at_once = multiprocessors(device) * (tile.resident or 8 // tile.warps) // triton.cdiv(hidden, tile.units)
    return max(1, min(at_once, triton.cdiv(tokens, tile.tokens)))


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor | None,
            norm_bias: Tensor | None, norm: int, eps: float, activation: int, dropout_p: float,
            seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [tokens, D] and z = x + ffn(x), which is empty unless norm is "post"; all tensors contiguous."""
    y, z = torch.empty_like(x), torch.empty_like(x) if norm == NORMS["post"] else x.new_empty(0)

    def run(tile: Tile) -> None:
        _launch(forward_kernel, tile, triton.cdiv(x.shape[0], tile.tokens),
                (x, w1, b1, w2, b2, norm_weight, norm_bias, seed, y, z), w2.shape[1],
                (norm, eps, activation, dropout_p), input_precision(w1.dtype))

    if x.shape[0]:
        run(launch_choice(_key("forward", x, w1, w2, norm, activation), default, candidates, run))
    return y, z


def backward(grad_out: Tensor, x: Tensor, z: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor,
             norm_weight: Tensor | None, norm_bias: Tensor | None, norm: int, eps: float, activation: int,
             dropout_p: float, seed: Tensor | None) -> tuple[Tensor, ...]:
    """dx [tokens, D]; dw1, db1, dw2, db2; the gradients of the norm [2, D] in fp32, empty without one."""
    settings = (norm, eps, activation, dropout_p)
    weights = (w1, b1, w2, norm_weight, norm_bias)
    dx, dz, norms = grad_tokens(grad_out, x, z, weights, settings, seed)
    linears = grad_weights(grad_out if norm != NORMS["post"] else dz, x, weights, settings, seed)
    return dx, *linears, norms


def grad_tokens(dy: Tensor, x: Tensor, z: Tensor | None, weights: tuple[Any, ...],
                settings: tuple[int, float, int, float], seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dX [tokens, D]; dZ, empty unless norm is "post"; the gradients of norm_weight and norm_bias [2, D] in fp32."""
    (w1, b1, w2, norm_weight, norm_bias), (norm, _, activation, _) = weights, settings
    dx, dz = torch.empty_like(x), torch.empty_like(x) if norm == NORMS["post"] else x.new_empty(0)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(x.shape[0], tile.tokens)
        partial = x.new_empty(programs if norm else 0, 2, x.shape[1], dtype=torch.float32)
        if programs:
            _launch(token_kernel, tile, programs,
                    (dy, x, z, w1, b1, w2, norm_weight, norm_bias, seed, dx, dz, partial), w2.shape[1], settings,
                    input_precision(w1.dtype))
        return sum_rows(partial) if norm else partial.new_empty(0)

    return dx, dz, run(launch_choice(_key("token", x, w1, w2, norm, activation), default, candidates, run))


def grad_weights(dy: Tensor, x: Tensor, weights: tuple[Any, ...], settings: tuple[int, float, int, float],
                 seed: Tensor | None) -> list[Tensor]:
    """dW1, db1, dW2 [D, hidden] and db2 [D]; dy is dZ for "post"."""
    (w1, b1, w2, norm_weight, norm_bias), (norm, _, activation, _) = weights, settings
    tokens, (dim, hidden) = x.shape[0], w2.shape
    key = _key("weight", x, w1, w2, norm, activation)

    def run(tile: Tile) -> list[Tensor]:
        parts = programs_a_slice(tile, tokens, hidden, x.device) if tokens else 0
        partial = x.new_empty(parts, w1.numel() + w2.numel() + len(w1) + dim, dtype=torch.float32)
        for layers in tiles_for(key).passes or (SUMS[activation in GATES],) if tokens else ():
            _launch(weight_kernel, tile, parts * triton.cdiv(hidden, tile.units),
                    (dy, x, w1, b1, w2, norm_weight, norm_bias, seed, partial), hidden, settings,
                    input_precision(w1.dtype), LAYERS=layers)
        return sum_parts(partial, (w1.shape, w2.shape, (len(w1),), (dim,)), w1.dtype)

    dw1, dw2, db1, db2 = run(launch_choice(key, default, candidates, run))
    return [dw1, db1, dw2, db2]


def aot_specs() -> list[Spec]:
    """Every launch configuration, to compile without a GPU: at hidden 256, GELU (erf) or ReGLU, with dropout.

    The widest class at D = 192. The norms at D = 64, as the layer uses them, and pre-norm at 192, in the forward and
    token kernels and, before the FFN, in the weight kernel.
    """
    specs = []
    for (arithmetic, width, gated, row), cc in itertools.product(TILES, CAPABILITIES):
        if row not in (cc, ANY) or (row == ANY and (arithmetic, width, gated, cc) in TILES):
            continue
        dim = 192 if width == 256 else width
        norms = {64: [0] if gated else [0, 1, 2], 128: [0], 256: [0, 1] if gated else [0]}[width]
        for norm, name in itertools.product(norms, ("forward", "token", "weight")):
            if name == "weight" and norm == NORMS["post"]:
                continue
            specs += _specs(Key("ffn", name, (width, 256, norm, int(gated)), arithmetic, cc), dim)
    sizes = (256 * 64, 64 * 256, 256, 64)
    return [*specs, *(sum_spec(f"sum_kernel {dtype} D 64", dtype, sizes) for dtype in ("fp32", "bf16"))]


def _specs(key: Key, dim: int) -> list[Spec]:
    """The kernel of that key at a width, in each of its passes."""
    width, hidden, norm, gated = key.shape
    kernel = {"forward": forward_kernel, "token": token_kernel, "weight": weight_kernel}[key.kernel]
    tile, half = table_choice(key, default), key.arithmetic == "half"
    dtype, padded = "bf16" if half else "fp32", max(16, triton.next_power_of_2(dim))
    kinds = {"seed": "*i64", "partial": "*fp32", "tokens": "i32", "limit": "i32", "inverse_keep": "fp32",
             "eps": "fp32", "norm_weight": "*fp32", "norm_bias": "*fp32"}
    constexprs: dict[str, Any] = {
        "D": dim, "DP": padded, "HIDDEN": hidden, "ACTIVATION": 3 if gated else 0, "NORM": norm, "DROPOUT": True,
        "PRECISION": "tf32" if half else key.arithmetic, "BM": tile.tokens, "BH": tile.units, "STAGES": tile.stages,
        "DS": min(tile.columns or padded, padded)}
    absent = [] if norm else ["norm_weight", "norm_bias"]
    absent += ["z"] if norm != NORMS["post"] and kernel is token_kernel else []
    passes = tiles_for(key).passes or (SUMS[bool(gated)],) if kernel is weight_kernel else (0,)
    specs = []
    for layers in passes:
        own = constexprs | dict.fromkeys(absent) | ({"LAYERS": layers} if layers else {})
        signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names if name not in own}
        label = f"{kernel.__name__}{f' of sums {layers}' if len(passes) > 1 else ''}"
        label += f" {dtype if half else key.arithmetic} D {dim}{' reglu' if gated else ''}"
        label += f" {list(NORMS)[norm]}-norm" if norm else ""
        specs.append(Spec(kernel, signature, own, tile.warps, label, (key.architecture,), tensor_cores=True,
                          tuned=width == 64 and not gated and key.arithmetic != "tf32", spills=48 if gated else 0,
                          measured=is_measured(key)))
    return specs

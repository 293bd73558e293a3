"""The feed-forward network in Triton: one kernel forward, two backward; the hidden never leaves the chip.

The same kernels (triton_kernels.py) do the second half of a transformer layer, x + ffn(LN(x)) or LN(x + ffn(x)).

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

With norm and residual, from and to memory, next to the same in separate kernels (norm, FFN, sum; n D e = 28 MB):
    pre        forward 2 n D e against 7; token 3 (and x and dy once more from the cache) against 9; weight 2
    post       forward 3 n D e (z = x + ffn(x) is kept) against 7; token 5 (z read, its gradient written; and that and x
               once more from the cache) against 9; weight 2
and 16 D tokens / BM bytes of partial sums for the gradients of the norm, written and read once (0.9 MB at BM = 128).
Occupancy: 8 warps a multiprocessor at least, as the fixed number of programs of the weight kernel takes for granted.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton

from ..library import LIBRARY, no_double_backward
from ..philox import threshold
from ..triton_autotune import launch_choice, table_choice
from ..triton_norm import NORMS
from ..triton_support import Spec, capability, register
from .reference import ACTIVATIONS
from .triton_kernels import forward_kernel, token_kernel, weight_kernel
from .triton_tiles import CANDIDATES, TILES, Tile, table_key, tiles_for

Tensor = torch.Tensor


def _launch(kernel: Any, tile: Tile, programs: int, tensors: tuple[Any, ...], hidden: int,
            settings: tuple[int, float, int, float], precision: str, **constants: int) -> None:
    """Run `programs` programs; the first tensor is [tokens, D], settings are those of the operators."""
    (tokens, dim), (norm, eps, activation, dropout_p) = tensors[0].shape, settings
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](
            *tensors, tokens, eps, threshold(dropout_p), 1.0 / (1.0 - dropout_p), D=dim,
            DP=max(16, triton.next_power_of_2(dim)), HIDDEN=hidden, ACTIVATION=activation, NORM=norm,
            DROPOUT=dropout_p > 0.0, PRECISION=precision, BM=tile.tokens, BH=tile.units, STAGES=tile.stages,
            num_warps=tile.warps, **constants)


def _choice(kernel: str, default: Tile, x: Tensor, w1: Tensor, norm: int, run: Callable[[Tile], object]) -> Tile:
    key = ("ffn", kernel, *table_key(x.shape[1], w1.dtype, capability(x.device)), len(w1), norm)
    return launch_choice(key, default, CANDIDATES, run)


def _programs_a_slice(tile: Tile, tokens: int, hidden: int, device: torch.device) -> int:
    """How many programs share a slice of the weight kernel: as many as run at once, at 8 warps a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    at_once = processors * (8 // tile.warps) // triton.cdiv(hidden, tile.units)
    return max(1, min(at_once, triton.cdiv(tokens, tile.tokens)))


def _sizes(hidden: int, dim: int) -> tuple[int, int, int, int]:
    """Elements of dW1, dW2, db1 and db2."""
    return hidden * dim, dim * hidden, hidden, dim


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor | None,
             norm_bias: Tensor | None, norm: int, eps: float, activation: int, dropout_p: float,
             seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [tokens, D] and z = x + ffn(x), which is empty unless norm is "post"; all tensors contiguous."""
    y, z = _fake(x, w1, b1, w2, b2, norm_weight, norm_bias, norm)
    tiles, precision = tiles_for(x.shape[1], w1.dtype, capability(x.device))

    def run(tile: Tile) -> None:
        _launch(forward_kernel, tile, triton.cdiv(x.shape[0], tile.tokens),
                (x, w1, b1, w2, b2, norm_weight, norm_bias, seed, y, z), w1.shape[0],
                (norm, eps, activation, dropout_p), precision)

    if x.shape[0]:
        run(_choice("forward", tiles.forward, x, w1, norm, run))
    return y, z


def _grad_tokens(dy: Tensor, x: Tensor, z: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor,
                 norm_weight: Tensor | None, norm_bias: Tensor | None, norm: int, eps: float, activation: int,
                 dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dX [tokens, D]; dZ, empty unless norm is "post"; the gradients of norm_weight and norm_bias [2, D] in fp32."""
    tiles, precision = tiles_for(x.shape[1], w1.dtype, capability(x.device))
    dx, dz, _ = _fake_grad_tokens(dy, x, z, w1, b1, w2, norm_weight, norm_bias, norm)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(x.shape[0], tile.tokens)
        partial = x.new_empty(programs if norm else 0, 2, x.shape[1], dtype=torch.float32)
        if programs:
            _launch(token_kernel, tile, programs,
                    (dy, x, z, w1, b1, w2, norm_weight, norm_bias, seed, dx, dz, partial), w1.shape[0],
                    (norm, eps, activation, dropout_p), precision)
        return partial.sum(0)

    return dx, dz, run(_choice("token", tiles.token, x, w1, norm, run))


def _grad_weights(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, norm_weight: Tensor | None,
                  norm_bias: Tensor | None, norm: int, eps: float, activation: int, dropout_p: float,
                  seed: Tensor | None) -> Tensor:
    """dW1 [hidden, D], dW2 [D, hidden], db1 [hidden], db2 [D] one after the other; dy is dZ for "post"."""
    (tokens, dim), hidden = x.shape, w1.shape[0]
    tiles, precision = tiles_for(dim, w1.dtype, capability(x.device))

    def run(tile: Tile) -> Tensor:
        parts = _programs_a_slice(tile, tokens, hidden, x.device)
        partial = x.new_empty(parts if tokens else 0, sum(_sizes(hidden, dim)), dtype=torch.float32)
        for layers in tiles.passes if tokens else ():
            _launch(weight_kernel, tile, parts * triton.cdiv(hidden, tile.units),
                    (dy, x, w1, b1, w2, norm_weight, norm_bias, seed, partial), hidden,
                    (norm, eps, activation, dropout_p), precision, LAYERS=layers)
        return partial.sum(0)

    return run(_choice("weight", tiles.weight, x, w1, norm, run)).to(w1.dtype)


def _fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor | None,
          norm_bias: Tensor | None, norm: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if norm == NORMS["post"] else x.new_empty(0)


def _fake_grad_tokens(dy: Tensor, x: Tensor, z: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor,
                      norm_weight: Tensor | None, norm_bias: Tensor | None, norm: int,
                      *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(2, x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x) if norm == NORMS["post"] else x.new_empty(0), sums


def _fake_grad_weights(dy: Tensor, x: Tensor, w1: Tensor, *_: Any) -> Tensor:
    return w1.new_empty(2 * w1.numel() + sum(w1.shape))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, _, norm_weight, norm_bias, *ctx.settings, seed = inputs
    ctx.set_materialize_grads(False)  # z, the second output, has none
    z = output[1] if ctx.settings[0] == NORMS["post"] else None
    ctx.save_for_backward(x, z, w1, b1, w2, norm_weight, norm_bias, seed)


def _grads(ctx: Any, dy: Tensor, _: None) -> tuple:
    x, z, w1, b1, w2, norm_weight, norm_bias, seed = ctx.saved_tensors
    dy, post = dy.contiguous(), z is not None
    dx, dz, weights, norms = None, None, [None] * 4, [None] * 2
    if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:7]) or post:
        dx, dz, sums = torch.ops.ctr.ffn_triton_grad_x(dy, x, z, w1, b1, w2, norm_weight, norm_bias, *ctx.settings,
                                                       seed)
        if norm_weight is not None:
            norms = sums.to(norm_weight.dtype).unbind()
    if any(ctx.needs_input_grad[1:5]):
        flat = torch.ops.ctr.ffn_triton_grad_weights(dz if post else dy, x, w1, b1, w2, norm_weight, norm_bias,
                                                     *ctx.settings, seed)
        dw1, dw2, db1, db2 = flat.split(_sizes(*w1.shape))
        weights = [dw1.view(w1.shape), db1, dw2.view(w2.shape), db2]
    return dx, *weights, *norms, None, None, None, None, None


NORM = "Tensor? norm_weight, Tensor? norm_bias, int norm, float eps, int activation, float dropout_p, Tensor? seed"
register("ffn_triton", f"(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, {NORM}) -> (Tensor, Tensor)", _forward,
         _fake)
register("ffn_triton_grad_x", f"(Tensor dy, Tensor x, Tensor? z, Tensor w1, Tensor b1, Tensor w2, {NORM}) "
         "-> (Tensor, Tensor, Tensor)", _grad_tokens, _fake_grad_tokens)
register("ffn_triton_grad_weights", f"(Tensor dy, Tensor x, Tensor w1, Tensor b1, Tensor w2, {NORM}) -> Tensor",
         _grad_weights, _fake_grad_weights)
torch.library.register_autograd("ctr::ffn_triton", _grads, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::ffn_triton_grad_x")
no_double_backward("ctr::ffn_triton_grad_weights")


def ffn_triton(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, dropout_p: float,
               seed: Tensor | None) -> Tensor:
    """[..., D], fp32, bf16 or fp16 -> [..., D]; x, w1, b1 and w2 are all that backward keeps."""
    return _apply(x, w1, b1, w2, b2, (None, None, NORMS[None], 0.0), activation, dropout_p, seed)


def ffn_block_triton(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm: str,
                     layer_norm: torch.nn.LayerNorm, activation: str, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x + ffn(LN(x)) of norm "pre", LN(x + ffn(x)) of "post", which also keeps x + ffn(x): [..., D] -> [..., D].

    The products are computed in the dtype of the weights, norm and sum in fp32; x and the result may have another.
    """
    norms = layer_norm.weight, layer_norm.bias, NORMS[norm], layer_norm.eps
    return _apply(x, w1, b1, w2, b2, norms, activation, dropout_p, seed)


def _apply(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
           norms: tuple[Tensor | None, Tensor | None, int, float], activation: str, dropout_p: float,
           seed: Tensor | None) -> Tensor:
    dim = x.shape[-1]
    tensors = (t.contiguous() for t in (x.reshape(-1, dim), w1, b1, w2, b2))
    index = list(ACTIVATIONS).index(activation)
    return torch.ops.ctr.ffn_triton(*tensors, *norms, index, dropout_p, seed)[0].view(x.shape)


def aot_specs() -> list[Spec]:
    """Every launch configuration, to compile without a GPU: at hidden 256, GELU (erf), with dropout.

    The norms at D = 64, as the layer uses them, in the forward and token kernels and, before the FFN, in the weight
    kernel.
    """
    specs = []
    for (arithmetic, wide, cc), tiles in TILES.items():
        dim, dtype = 128 if wide else 64, "bf16" if arithmetic == "half" else "fp32"
        kinds = {"seed": "*i64", "partial": "*fp32", "tokens": "i32", "limit": "i32", "inverse_keep": "fp32",
                 "eps": "fp32", "norm_weight": "*fp32", "norm_bias": "*fp32"}
        constants = {"D": dim, "DP": dim, "HIDDEN": 256, "ACTIVATION": 0, "DROPOUT": True,
                     "PRECISION": "tf32" if arithmetic == "half" else arithmetic}
        launches = [(forward_kernel, tiles.forward, {}), (token_kernel, tiles.token, {})]
        launches += [(weight_kernel, tiles.weight, {"LAYERS": layers}) for layers in tiles.passes]
        for (kernel, tile, extra), (norm, index) in itertools.product(launches, NORMS.items()):
            if norm and (wide or (kernel is weight_kernel and norm == "post")):
                continue
            key = ("ffn", kernel.__name__.removesuffix("_kernel"), arithmetic, wide, cc, 256, index)
            tile = table_choice(key, tile)
            absent = ["norm_weight", "norm_bias"] if norm is None else []
            absent += ["z"] if norm != "post" and kernel is token_kernel else []
            constexprs = constants | {"BM": tile.tokens, "BH": tile.units, "STAGES": tile.stages, "NORM": index} | extra
            constexprs |= dict.fromkeys(absent)
            signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constexprs}
            part = "" if len(tiles.passes) == 1 or not extra else f" of layer {extra['LAYERS']}"
            name = f"{kernel.__name__}{part} {dtype if arithmetic == 'half' else arithmetic} D {dim}"
            name += f" {norm}-norm" if norm else ""
            specs.append(Spec(kernel, signature, constexprs, tile.warps, name, (cc,), tensor_cores=True,
                              tuned=not wide and arithmetic != "tf32"))
    return specs

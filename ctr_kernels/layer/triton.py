"""The transformer layer in Triton: norm, residual and the projections around the attention in one kernel each.

The attention half, x + out(attention(qkv(LN(x)))) or LN(x + out(attention(qkv(x)))), is one operator of three launches
forward and six backward; the other half is the FFN's (ffn/triton.py). What backward keeps is x, q | k | v, the heads'
output and, post-norm, the sum that the norm takes.

Traffic, n = tokens D elements of e bytes, next to separate kernels (norm, linear, attention, linear, sum); n e = 28 MB:
    pre        forward   qkv 1 + 3, attention 3 + 1, out 2 + 1                             11 n e against 15
               backward  out 1 + 1, its weight 2, attention 4 + 3, qkv 5 + 1, its weight 4   21 n e against 29
    post       forward   qkv 1 + 3, attention 3 + 1, out 2 + 2                             12 n e against 15
               backward  out 2 + 2, its weight 2, attention 4 + 3, qkv 4 + 1, its weight 4   22 n e against 29
and, beside weights that stay in L2, fp32 partial sums as in the FFN: no atomics, the same bits at every run.
Occupancy: 8 warps a multiprocessor at least, as the fixed number of programs of the weight kernel takes for granted.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from ..attention.triton import _backward as attention_backward
from ..attention.triton import _forward as attention_forward
from ..checks import attention_limits, autocast, same_float
from ..ffn import ffn_limits
from ..ffn.triton import ffn_block_triton
from ..library import LIBRARY, no_double_backward
from ..philox import as_seed
from ..triton_autotune import launch_choice, table_choice
from ..triton_norm import NORMS
from ..triton_support import CAPABILITIES, Spec, architecture, arithmetic_of, capability, input_precision, register
from .halves import attention_half, ffn_half, hidden_width
from .triton_kernels import forward_kernel, token_kernel, weight_kernel

if TYPE_CHECKING:
    from . import TransformerLayer

Tensor = torch.Tensor


class Tile(NamedTuple):
    """A launch configuration: tokens and outputs at a time, and warps."""

    tokens: int
    outputs: int
    warps: int


# Forward, token and weight kernel, by arithmetic ("half": fp16 and bf16) and architecture.
TILES: dict[tuple[str, int], tuple[Tile, Tile, Tile]] = {
    (arithmetic, cc): (Tile(64, 64, 8), Tile(64, 64, 8), Tile(32, 64, 8))
    for arithmetic in ("half", "tf32", "tf32x3") for cc in CAPABILITIES
}
TILES["tf32", 90] = (Tile(64, 64, 8), Tile(64, 64, 8), Tile(32, 32, 8))  # with 64 outputs all loads are of 4 bytes
TILES["tf32", 100] = TILES["tf32", 90]
TILES["tf32x3", 80] = (Tile(64, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8))  # with 64 tokens triton 3.6 spills
MAX_DIM = 64  # wider tiles in fp32 exceed the shared memory of a multiprocessor


CANDIDATES = [Tile(*shape) for shape in itertools.product((32, 64, 128), (64, 128), (4, 8))]  # of a search


def _table_key(dtype: torch.dtype, cc: int) -> tuple[str, int]:
    """The row of TILES on sm_<cc>."""
    return arithmetic_of(dtype), architecture(cc)


def _choice(position: int, weight: Tensor, norm: int, run: Callable[[Tile], object]) -> Tile:
    """The launch configuration of the position-th kernel for a weight [N, D]."""
    outputs = len(weight)
    key = _table_key(weight.dtype, capability(weight.device))
    label = ("layer", ("forward", "token", "weight")[position], *key, outputs, norm)
    whole_rows = [tile for tile in CANDIDATES if norm != NORMS["post"] or tile.outputs >= outputs]
    return launch_choice(label, TILES[key][position], whole_rows, run)


def _launch(kernel: Any, tile: Tile, programs: int, tensors: tuple[Tensor | None, ...], weight: Tensor, norm: int,
            eps: float) -> None:
    """Run `programs` programs of a linear layer of weight [N, D]; the first tensor has a row for each token."""
    outputs, dim = weight.shape
    with torch.cuda.device_of(weight):
        kernel[(programs,)](
            *tensors, len(tensors[0]), eps, D=dim, DP=max(16, triton.next_power_of_2(dim)), N=outputs, NORM=norm,
            PRECISION=input_precision(weight.dtype), BM=tile.tokens, BN=tile.outputs, num_warps=tile.warps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: tuple[Tensor, Tensor] | None,
            mode: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[LN](x) W^T + b [+ residual], or LN of that and that ("post", else empty): [tokens, N], in `dtype`."""
    y = x.new_empty(len(x), len(weight), dtype=dtype)
    z = torch.empty_like(y) if mode == NORMS["post"] else y.new_empty(0)

    def run(tile: Tile) -> None:
        _launch(forward_kernel, tile, triton.cdiv(len(x), tile.tokens),
                (x, weight, bias, residual, *(norm or (None, None)), y, z), weight, mode, eps)

    if len(x):
        run(_choice(0, weight, mode, run))
    return y, z


def _linear_grad_x(dy: Tensor, inner: Tensor | None, residual: Tensor | None, weight: Tensor,
                   norm_weight: Tensor | None, mode: int, eps: float,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dX [tokens, D] in `dtype`, dZ of "post", and the gradients of the norm [2, D] in fp32, empty without one."""
    dx = dy.new_empty(len(dy), weight.shape[1], dtype=dtype)
    dz = torch.empty_like(dy) if mode == NORMS["post"] else dy.new_empty(0)
    width = 0 if norm_weight is None else len(norm_weight)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(len(dy), tile.tokens)
        partial = dy.new_empty(programs, 2, width, dtype=torch.float32)
        if programs:
            _launch(token_kernel, tile, programs, (dy, inner, residual, weight, norm_weight, dx, dz, partial), weight,
                    mode, eps)
        return partial.sum(0)

    return dx, dz, run(_choice(1, weight, mode, run))


def _linear_grad_weight(dy: Tensor, x: Tensor, weight: Tensor, norm: tuple[Tensor, Tensor] | None,
                        eps: float) -> tuple[Tensor, Tensor]:
    """dW [N, D] and db [N] in the dtype of the weight; norm: where x was normalised first."""
    cuda = x.device.type == "cuda"
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 2
    mode = NORMS["pre"] if norm else 0

    def run(tile: Tile) -> Tensor:
        slices = triton.cdiv(len(weight), tile.outputs)
        parts = max(1, min(processors * (8 // tile.warps) // slices, triton.cdiv(len(x), tile.tokens)))
        partial = x.new_empty(parts if len(x) else 0, weight.numel() + len(weight), dtype=torch.float32)
        if len(x):
            tensors = (dy, x, weight, *(norm or (None, None)), partial)
            _launch(weight_kernel, tile, parts * slices, tensors, weight, mode, eps)
        return partial.sum(0)

    dw, db = run(_choice(2, weight, mode, run)).to(weight.dtype).split((weight.numel(), len(weight)))
    return dw.view(weight.shape), db


def _forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor,
             out_weight: Tensor, out_bias: Tensor, norm: int, eps: float, num_heads: int, dropout_p: float,
             seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, F, D], and for backward q | k | v, the heads' output, and z, which is empty unless norm is "post"."""
    tokens, affine, dtype = x.flatten(0, 1), (norm_weight, norm_bias), qkv_weight.dtype
    pre = norm == NORMS["pre"]
    qkv, _ = _linear(tokens, qkv_weight, qkv_bias, None, affine if pre else None, norm if pre else 0, eps, dtype)
    qkv = qkv.view(*x.shape[:-1], len(qkv_weight))
    scale = (x.shape[-1] // num_heads) ** -0.5
    heads = attention_forward(*qkv.chunk(3, dim=-1), num_heads, scale, dropout_p, seed)
    y, z = _linear(heads.view(tokens.shape), out_weight, out_bias, tokens, None if pre else affine,
                   0 if pre else norm, eps, x.dtype)
    return y.view(x.shape), qkv, heads, x.new_empty(0) if pre else z.view(x.shape)


def _backward(dy: Tensor, x: Tensor, qkv: Tensor, heads: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor,
              qkv_weight: Tensor, out_weight: Tensor, norm: int, eps: float, num_heads: int, dropout_p: float,
              seed: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of x, of the norm [2, D] in fp32, and of both weights and biases."""
    shape, dtype, pre = x.shape, qkv_weight.dtype, norm == NORMS["pre"]
    x, heads, dy = (t.flatten(0, 1) for t in (x, heads, dy))
    inner = () if pre else (z.view(x.shape), None, out_weight, norm_weight, norm)
    grad_heads, dz, sums = _linear_grad_x(dy, *(inner or (None, None, out_weight, None, 0)), eps, dtype)
    residual = dy if pre else dz
    grad_out = _linear_grad_weight(residual, heads, out_weight, None, eps)
    scale = (shape[-1] // num_heads) ** -0.5
    grad_qkv = attention_backward(grad_heads.view(shape), *qkv.chunk(3, dim=-1), num_heads, scale, dropout_p, seed)
    grad_qkv = grad_qkv.view(len(x), len(qkv_weight))
    dx, _, pre_sums = _linear_grad_x(grad_qkv, x if pre else None, residual, qkv_weight, norm_weight if pre else None,
                                     norm if pre else 0, eps, x.dtype)
    affine = (norm_weight, norm_bias) if pre else None
    return (dx.view(shape), pre_sums if pre else sums, *_linear_grad_weight(grad_qkv, x, qkv_weight, affine, eps),
            *grad_out)


def _fake(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor,
          out_bias: Tensor, norm: int, *_: Any) -> tuple[Tensor, ...]:
    qkv = qkv_weight.new_empty(*x.shape[:-1], len(qkv_weight))
    z = torch.empty_like(x) if norm == NORMS["post"] else x.new_empty(0)
    return torch.empty_like(x), qkv, qkv_weight.new_empty(x.shape), z


def _fake_backward(dy: Tensor, x: Tensor, qkv: Tensor, heads: Tensor, z: Tensor, norm_weight: Tensor,
                   norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    linears = [t for w in (qkv_weight, out_weight) for t in (torch.empty_like(w), w.new_empty(len(w)))]
    return torch.empty_like(x), x.new_empty(2, x.shape[-1], dtype=torch.float32), *linears


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, qkv_weight, _, out_weight, _, *ctx.settings, seed = inputs
    ctx.set_materialize_grads(False)  # the outputs for backward have none
    ctx.save_for_backward(x, *output[1:], norm_weight, norm_bias, qkv_weight, out_weight, seed)


def _grads(ctx: Any, dy: Tensor, *_: None) -> tuple:
    *tensors, seed = ctx.saved_tensors
    dx, sums, *linears = torch.ops.ctr.attention_block_triton_backward(dy.contiguous(), *tensors, *ctx.settings, seed)
    return dx, *sums.to(tensors[4].dtype).unbind(), *linears, None, None, None, None, None


SETTINGS = "int norm, float eps, int num_heads, float dropout_p, Tensor? seed)"
register("attention_block_triton", "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, "
         f"Tensor qkv_bias, Tensor out_weight, Tensor out_bias, {SETTINGS} -> (Tensor, Tensor, Tensor, Tensor)",
         _forward, _fake)
register("attention_block_triton_backward", "(Tensor dy, Tensor x, Tensor qkv, Tensor heads, Tensor z, "
         f"Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor out_weight, {SETTINGS} -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward)
torch.library.register_autograd("ctr::attention_block_triton", _grads, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::attention_block_triton_backward")


def why_attention_is_not_fused(layer: "TransformerLayer", x: torch.Tensor) -> str | None:
    """Why the kernels do not do the attention half of this layer on x [B, F, D]; None if they do."""
    reason = _limits(x) or attention_limits(x.shape[1], x.shape[2], layer.num_heads)
    return reason or attention_half(layer, x, "attention_norm")


def why_ffn_is_not_fused(layer: "TransformerLayer", x: torch.Tensor) -> str | None:
    """Why the kernels do not do the FFN half of this layer on x [B, F, D]; None if they do."""
    return _limits(x) or ffn_half(layer, x, "ffn_norm") or ffn_limits("triton", x.shape[2], hidden_width(layer))


def _limits(x: Tensor) -> str | None:
    return f"D={x.shape[2]}; the fused half takes up to {MAX_DIM}" if x.shape[2] > MAX_DIM else None


def fused_attention(layer: "TransformerLayer", x: Tensor, dropout_p: float) -> Tensor:
    """x + attention(LN(x)) or LN(x + attention(x)), [B, F, D] -> [B, F, D], D <= MAX_DIM.

    Products are computed in the dtype of autocast or x, norms and sums in fp32.
    """
    _check_dtype(x, layer.qkv.weight)
    seed = as_seed(None, x.device) if dropout_p > 0.0 else None
    qkv, out, norm = (autocast(layer.qkv.weight, layer.qkv.bias), autocast(layer.out.weight, layer.out.bias),
                      layer.attention_norm)
    return torch.ops.ctr.attention_block_triton(x.contiguous(), norm.weight, norm.bias, *qkv, *out, NORMS[layer.norm],
                                                norm.eps, layer.num_heads, dropout_p, seed)[0]


def fused_ffn(layer: "TransformerLayer", x: Tensor, dropout_p: float) -> Tensor:
    """x + ffn(LN(x)) or LN(x + ffn(x)), [B, F, D] -> [B, F, D], D <= MAX_DIM."""
    _check_dtype(x, layer.ffn_in.weight)
    seed = as_seed(None, x.device) if dropout_p > 0.0 else None
    first, last = (autocast(linear.weight, linear.bias) for linear in (layer.ffn_in, layer.ffn_out))
    return ffn_block_triton(x, *first, *last, layer.norm, layer.ffn_norm, layer.activation, dropout_p, seed)


def _check_dtype(x: Tensor, weight: Tensor) -> None:
    if not torch.is_autocast_enabled(x.device.type):
        same_float({"x": x, "the layer's weight": weight})


def aot_specs() -> list[Spec]:
    """The three kernels of both projections, pre- and post-norm, in every launch configuration."""
    specs = []
    dim = MAX_DIM
    for (arithmetic, cc), tiles in TILES.items():
        dtype = "bf16" if arithmetic == "half" else "fp32"
        cases = [("qkv pre-norm", 3 * dim, 1, False), ("out", dim, 0, True), ("out post-norm", dim, 2, True)]
        for (name, outputs, norm, residual), (kernel, tile) in itertools.product(
                cases, zip((forward_kernel, token_kernel, weight_kernel), tiles, strict=True)):
            if kernel is weight_kernel and norm == 2:
                continue
            label = ("layer", kernel.__name__.removesuffix("_kernel"), arithmetic, cc, outputs, norm)
            tile = table_choice(label, tile)
            constexprs = {"D": dim, "DP": dim, "N": outputs, "NORM": norm, "BM": tile.tokens, "BN": tile.outputs,
                          "PRECISION": "tf32" if arithmetic == "half" else arithmetic}
            has_residual = residual if kernel is forward_kernel else name.startswith("qkv")
            absent = [] if has_residual else ["residual"]
            absent += [] if norm else ["norm_weight", "norm_bias", "inner"]
            constexprs |= dict.fromkeys(parameter for parameter in absent if parameter in kernel.arg_names)
            kinds = {"partial": "*fp32", "norm_weight": "*fp32", "norm_bias": "*fp32", "tokens": "i32", "eps": "fp32"}
            signature = {parameter: kinds.get(parameter, f"*{dtype}")
                         for parameter in kernel.arg_names if parameter not in constexprs}
            name = f"{kernel.__name__} {name} {dtype if arithmetic == 'half' else arithmetic} D {dim}"
            specs.append(Spec(kernel, signature, constexprs, tile.warps, name, (cc,), tensor_cores=True,
                              tuned=arithmetic != "tf32"))
    return specs

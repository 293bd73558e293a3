"""The halves of a transformer layer as one operator each, where their children are what the operator computes."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..attention.operator import supports as attention_supports
from ..checks import autocast, autocast_enabled, same_float
from ..ffn.operator import feed_forward
from ..ffn.operator import supports as ffn_supports
from ..fusion import out_features, plain_linear, plain_norm, same_kind, weight_and_bias
from ..philox import as_seed
from .operator import attention_half
from .operator import supports as half_supports

if TYPE_CHECKING:
    from . import TransformerLayer

Tensor = torch.Tensor


class Norm(NamedTuple):
    """Which norm an operator takes, as its `norm` argument, and the child that has its parameters; None: none."""

    kind: str | None = None
    child: str | None = None


def attention_norm(layer: "TransformerLayer", backend: str) -> Norm:
    """Post-norm, Triton's half ends with the norm; the native one leaves it to the FFN half, which begins with it."""
    if layer.norm == "pre":
        return Norm("pre", "attention_norm") if layer._modules.get("attention_norm") is not None else Norm()
    return Norm("post", "attention_norm") if backend == "triton" else Norm()


def ffn_norm(layer: "TransformerLayer", backend: str) -> Norm:
    """Post-norm, the native half is n + ffn(n) of n = attention_norm(x), and ffn_norm is called after it."""
    if layer.norm == "pre":
        return Norm("pre", "ffn_norm")
    return Norm("post", "ffn_norm") if backend == "triton" else Norm("normed", "attention_norm")


def why_attention_is_not_fused(layer: "TransformerLayer", x: Tensor, backend: str) -> str | None:
    """Why `ctr::attention_block` of that backend does not do the attention half on x [B, F, D]; None if it does."""
    _, fields, dim = x.shape
    norm, width, queries = attention_norm(layer, backend), out_features(layer._modules.get("qkv")) // 3, layer.queries
    modules = {name: layer._modules.get(name) for name in ("qkv", "out")}
    return (_dtype_limits(x, backend) or plain_linear(modules["qkv"], "qkv", dim, 3 * width)
            or plain_linear(modules["out"], "out", width, dim) or _norm_and_kind(layer, modules, x, norm, backend)
            or attention_supports(backend, queries or fields, fields, width, layer.num_heads)
            or half_supports(backend, dim, width, norm.kind, queries or 0))


def why_ffn_is_not_fused(layer: "TransformerLayer", x: Tensor, backend: str, norm: Norm | None = None) -> str | None:
    """Why `ctr::ffn` of that backend does not do the FFN half, or with Norm() the FFN alone, on x [B, F, D]."""
    whole = norm is None
    norm = ffn_norm(layer, backend) if norm is None else norm
    modules, dim = {name: layer._modules.get(name) for name in ("ffn_in", "ffn_out")}, x.shape[2]
    rows = out_features(modules["ffn_in"])
    hidden = rows // 2 if layer.gated else rows
    return ((_dtype_limits(x, backend) if whole else None)
            or plain_linear(modules["ffn_in"], "ffn_in", dim, 2 * hidden if layer.gated else hidden)
            or plain_linear(modules["ffn_out"], "ffn_out", hidden, dim)
            or _norm_and_kind(layer, modules, x, norm, backend)
            or (ffn_supports(backend, dim, hidden, layer.activation, norm.kind) if whole else None))


def _dtype_limits(x: Tensor, backend: str) -> str | None:
    if backend != "native":
        return None
    if x.dtype != torch.float32:
        return f"the fused half computes in torch.float32, not {x.dtype}"
    return "under autocast linear layers have another dtype than norms" if autocast_enabled("cpu") else None


def _norm_and_kind(layer: "TransformerLayer", modules: dict[str, nn.Module | None], x: Tensor, norm: Norm,
                   backend: str) -> str | None:
    """The same of the norm, and why parameters of `modules` and of it are not all of one dtype and device."""
    if norm.child is not None:
        modules[norm.child] = layer._modules.get(norm.child)
        reason = plain_norm(modules[norm.child], norm.child, x.shape[2])
        if reason is not None:
            return reason
    return same_kind(modules, x.device, x.dtype if backend == "native" and norm.child is not None else None)


def fused_attention(layer: "TransformerLayer", x: Tensor, dropout_p: float, backend: str) -> Tensor:
    """The attention half, norm and residual included: [B, F, D] -> [B, F, D], or [B, queries, D].

    Products are computed in the dtype of autocast or x, norms and sums in fp32.
    """
    _check_dtype(x, layer.qkv.weight)
    w_qkv, b_qkv, w_out, b_out = _weights(layer, "qkv", "out")
    seed = as_seed(None, x.device) if dropout_p > 0.0 else None
    scale = (w_qkv.shape[0] // 3 // layer.num_heads) ** -0.5
    kind, child = attention_norm(layer, backend)
    weight, bias, eps = _affine(layer, child)
    return attention_half(x, w_qkv, b_qkv, w_out, b_out, layer.num_heads, scale, dropout_p, seed, norm=kind,
                          norm_weight=weight, norm_bias=bias, eps=eps, queries=layer.queries or 0)


def fused_ffn(layer: "TransformerLayer", x: Tensor, dropout_p: float, backend: str) -> Tensor:
    """The FFN half, norm and residual included: [B, F, D] -> [B, F, D]."""
    _check_dtype(x, layer.ffn_in.weight)
    w1, b1, w2, b2 = _weights(layer, "ffn_in", "ffn_out")
    seed = as_seed(None, x.device) if dropout_p > 0.0 else None
    kind, child = ffn_norm(layer, backend)
    weight, bias, eps = _affine(layer, child)
    return feed_forward(x, w1, b1, w2, b2, layer.activation, dropout_p, seed, norm=kind, norm_weight=weight,
                        norm_bias=bias, eps=eps)


def _weights(layer: "TransformerLayer", *children: str) -> tuple[Tensor, ...]:
    """Weight and bias of each of these plain children, in the dtype of autocast."""
    return autocast(*(t for name in children for t in weight_and_bias(layer._modules[name])))  # type: ignore[arg-type]


def _affine(layer: "TransformerLayer", child: str | None) -> tuple[Tensor | None, Tensor | None, float]:
    norm = None if child is None else layer._modules[child]
    if not isinstance(norm, nn.LayerNorm):
        return None, None, 0.0
    return (*weight_and_bias(norm), norm.eps)


def _check_dtype(x: Tensor, weight: Tensor) -> None:
    if not autocast_enabled(x.device.type):
        same_float({"x": x, "the layer's weight": weight})

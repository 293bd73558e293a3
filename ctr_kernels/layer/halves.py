"""Which halves of a transformer layer may be fused, whatever the backend."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..fusion import out_features, plain_linear, plain_norm, same_kind

if TYPE_CHECKING:
    from . import TransformerLayer


def attention_half(layer: "TransformerLayer", x: torch.Tensor, norm: str | None,
                   dtype: torch.dtype | None = None) -> str | None:
    """Why qkv, out and the norm of that name, if any, are not those of a kernel on x [B, F, D]; None if they are.

    All parameters must be of `dtype`, or of any one if it is None, and on the device of x.
    """
    modules, dim = layer._modules, x.shape[2]  # the attributes, without the search of nn.Module
    qkv, out = modules.get("qkv"), modules.get("out")
    reason = plain_linear(qkv, "qkv", dim, 3 * dim) or plain_linear(out, "out", dim, dim)
    return reason or _with_norm(layer, {"qkv": qkv, "out": out}, x, norm, dtype)


def ffn_half(layer: "TransformerLayer", x: torch.Tensor, norm: str | None,
             dtype: torch.dtype | None = None) -> str | None:
    """Why ffn_in, ffn_out and the norm of that name, if any, are not those of a kernel on x [B, F, D], or None."""
    modules, dim, hidden = layer._modules, x.shape[2], hidden_width(layer)
    first, second = modules.get("ffn_in"), modules.get("ffn_out")
    reason = plain_linear(first, "ffn_in", dim, hidden) or plain_linear(second, "ffn_out", hidden, dim)
    return reason or _with_norm(layer, {"ffn_in": first, "ffn_out": second}, x, norm, dtype)


def hidden_width(layer: "TransformerLayer") -> int:
    """What ffn_in gives now; 0 where it is no `nn.Linear`."""
    return out_features(layer._modules.get("ffn_in"))


def _with_norm(layer: "TransformerLayer", modules: dict[str, nn.Module | None], x: torch.Tensor, norm: str | None,
               dtype: torch.dtype | None) -> str | None:
    if norm is not None:
        modules[norm] = layer._modules.get(norm)
        reason = plain_norm(modules[norm], norm, x.shape[2])
        if reason is not None:
            return reason
    return same_kind(modules, x.device, dtype)

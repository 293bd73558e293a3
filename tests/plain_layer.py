"""A transformer layer in plain PyTorch, by calls of its children: what any kernel in their place must compute."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ctr_kernels import TransformerLayer


class Doubled(nn.Linear):
    """A subclass of nn.Linear that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def plain_layer(layer: TransformerLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer in eval mode, softmax(q k^T / sqrt(d)) v written out: [B, F, D] -> [B, F, D]."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return layer.out((weights @ v).transpose(1, 2).flatten(2))

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = layer.ffn_in(x)
        act = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}[layer.activation]
        return layer.ffn_out(act(hidden))

    if layer.norm == "pre":
        x = x + attention(layer.attention_norm(x))
        return x + feed_forward(layer.ffn_norm(x))
    x = layer.attention_norm(x + attention(x))
    return layer.ffn_norm(x + feed_forward(x))

"""The transformer layer that FT-Transformer and AutoInt stack, composed of this package's operations."""

import torch
from torch import nn

from ..attention import field_attention_packed
from ..backend import CHOICES, resolve
from ..ffn import ffn
from ..ffn.reference import ACTIVATIONS
from .native import layer_native, takes_blocks


class TransformerLayer(nn.Module):
    """Attention and FFN with residuals, pre- or post-norm (Vaswani et al. 2017; pre-norm: Xiong et al. 2020).

    norm="pre":  x + attention(LN(x)), then x + ffn(LN(x)).
    norm="post": LN(x + attention(x)), then LN(x + ffn(x)).

    Args:
        dim: D, width of a token.
        num_heads: H; D / H is 8, 16, 32 or 64.
        ffn_dim: hidden width of the FFN, a multiple of 8.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
        dropout: applied to the attention weights and to the FFN's hidden units while training.
        kernels: "auto", "eager", "native" or "triton".

    forward: [B, F, D] -> [B, F, D].

    >>> TransformerLayer(64, 4, 256)(torch.randn(2, 27, 64)).shape
    torch.Size([2, 27, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        norm: str = "pre",
        activation: str = "gelu",
        dropout: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm={norm!r}: choose pre or post")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        self.num_heads, self.norm, self.activation = num_heads, norm, activation
        self.dropout, self.kernels = dropout, kernels
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, D] -> [B, F, D]."""
        dropout_p = self.dropout if self.training else 0.0
        backend = resolve(self.kernels, x.device, "field_attention", x.dtype)
        if backend == "triton":
            from .triton import MAX_DIM, layer_triton

            if x.shape[-1] <= MAX_DIM:
                return layer_triton(self, x)
        if backend == "native" and takes_blocks(self, x):
            return layer_native(self, x, dropout_p)
        if self.norm == "pre":
            x = x + self._attention(self.attention_norm(x), dropout_p)
            return x + self._ffn(self.ffn_norm(x), dropout_p)
        x = self.attention_norm(x + self._attention(x, dropout_p))
        return self.ffn_norm(x + self._ffn(x, dropout_p))

    def _attention(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return self.out(field_attention_packed(self.qkv(x), num_heads=self.num_heads, dropout_p=dropout_p,
                                               kernels=self.kernels))

    def _ffn(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return ffn(x, self.ffn_in.weight, self.ffn_in.bias, self.ffn_out.weight, self.ffn_out.bias,
                   activation=self.activation, dropout_p=dropout_p, kernels=self.kernels)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, norm={self.norm!r}, dropout={self.dropout}, kernels={self.kernels!r}"
